"""`python -m personaplex.sessions` against a service's address: what it says, asks for and how it ends."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from personaplex import sessions

LISTED = {
    "replicas": [
        {
            "replica": "r0",
            "node": "n",
            "slots": 4,
            "accepting": True,
            "sessions": [{"session": "aa", "seconds": 61.2}],
            "detached": ["bb"],
        },
        {"replica": "r1", "node": "n", "slots": 4, "accepting": False, "sessions": [], "detached": []},
    ]
}


def moved(*outcomes: str, silent: int = 0) -> dict[str, Any]:
    rows = [{"session": "aa", "outcome": one, "from": "r0", "to": "r1"} for one in outcomes]
    return {"sessions": rows, "gateways_silent": silent}


class Operated(http.server.BaseHTTPRequestHandler):
    status, answer = 200, b""
    asked: list[tuple[str, str, bytes]]

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.asked.append((f"{self.command} {self.path}", self.headers["authorization"], body))
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.answer)

    do_GET = do_POST = _any

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Operated]]]:
    monkeypatch.setattr(Operated, "asked", [], raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Operated) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/talk/", Operated
        server.shutdown()
        thread.join()


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "admin"
    path.write_text("# ours\nword label=me\n")
    return path


def run(
    service: tuple[str, type[Operated]],
    key: Path,
    *flags: str,
    answer: Any = None,
    status: int = 200,
    monkeypatch: pytest.MonkeyPatch,
) -> int:
    url, kind = service
    monkeypatch.setattr(kind, "status", status)
    monkeypatch.setattr(kind, "answer", answer if isinstance(answer, bytes) else json.dumps(answer).encode())
    return sessions.main(["--url", url, "--key-file", str(key), *flags])


def test_sessions_are_listed_by_replica(
    service: Any, key: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(service, key, answer=LISTED, monkeypatch=monkeypatch) == 0
    assert service[1].asked == [("GET /talk/api/admin/sessions", "Bearer word", b"")]
    assert capsys.readouterr().out == (
        "r0: 1 of 4 slots\n  aa  61 s\n  bb  its client is away\nr1: 0 of 4 slots, takes no new ones\n"
    )


@pytest.mark.parametrize(
    ("flags", "order"),
    [
        (["--move", "aa"], {"session": "aa"}),
        (["--drain", "r0"], {"replica": "r0", "hold_s": 60.0}),
        (["--drain", "r0", "--hold", "5"], {"replica": "r0", "hold_s": 5.0}),
    ],
)
def test_orders(
    service: Any,
    key: Path,
    flags: list[str],
    order: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(service, key, *flags, answer=moved("moved"), monkeypatch=monkeypatch) == 0
    ((request, _, body),) = service[1].asked
    assert (request, json.loads(body)) == ("POST /talk/api/admin/moves", order)
    assert capsys.readouterr().out == "aa: moved, r0 -> r1\n"


@pytest.mark.parametrize("answer", [moved("moved", "no_capacity"), moved("busy"), moved("moved", silent=1)])
def test_a_session_that_stayed_is_a_failure(
    service: Any, key: Path, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(service, key, "--drain", "r0", answer=answer, monkeypatch=monkeypatch) == 1


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (401, b"an operator's key is needed\n", "HTTP 401): an operator's key"),
        (403, b"no", "HTTP 403): no"),
        (404, b"there is no live session of this name\n", "HTTP 404): there is no live session"),
        (503, b"starting", "HTTP 503"),
        (200, b"<html>", "cannot be read"),
        (200, b"[]", "cannot be read"),
        (200, b'{"sessions": [1], "gateways_silent": 0}', "cannot be read"),
        (200, b'{"sessions": []}', "cannot be read"),
    ],
)
def test_refusals_are_told(
    service: Any,
    key: Path,
    status: int,
    answer: bytes,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(service, key, "--move", "aa", answer=answer, status=status, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "word" not in told.replace("words", ""), "the key"


def test_nobody_answers(key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sessions.main(["--url", "http://127.0.0.1:1", "--key-file", str(key)]) == 2
    assert "does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["ws://a", "localhost:8998", "http://", "http://a:b"])
def test_addresses_that_are_none(url: str, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sessions.main(["--url", url, "--key-file", str(key)]) == 2
    assert "--url must look like" in capsys.readouterr().err
