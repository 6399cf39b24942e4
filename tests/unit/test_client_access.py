"""The client command's key from a file and its own voice."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from golden import GOLDEN

from personaplex import client
from personaplex.client_access import UPLOAD_LIMIT, key_of, read_key, upload_voice
from personaplex.client_io import chat_url, parser
from personaplex.errors import (
    BadAudio,
    ConfigError,
    Forbidden,
    NoCapacity,
    PersonaplexError,
    ProtocolError,
    SessionLost,
    TooManySessions,
    Unauthorized,
)
from personaplex.persona import own_voice

VOICE = GOLDEN / "voice.wav"
NAME = own_voice("0f" * 32)
MADE = {"voice": NAME, "seconds": 2.4, "problems": [{"kind": "short", "text": "it lasts only 2.4 s"}]}


@contextlib.contextmanager
def answering(status: int, body: bytes) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A service that answers every upload like this; its chat address, and what was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            key = self.headers.get("authorization", "")
            asked.append({"path": self.path, "data": data, "key": key})
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.server_port}/talk/api/chat?status=1", asked
        finally:
            server.shutdown()
            thread.join()


def test_a_recording_is_uploaded_beside_the_chat_with_the_key() -> None:
    with answering(200, json.dumps(MADE).encode()) as (url, asked):
        voice = upload_voice(url, VOICE, "k", None)
    assert (voice.name, voice.seconds, voice.problems) == (NAME, 2.4, ("it lasts only 2.4 s",))
    assert asked == [{"path": "/talk/api/voices?consent=1", "data": VOICE.read_bytes(), "key": "Bearer k"}]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, Unauthorized),
        (403, Forbidden),
        (413, BadAudio),
        (422, BadAudio),
        (429, TooManySessions),
        (503, NoCapacity),
        (404, ProtocolError),
    ],
)
def test_a_refusal_is_a_typed_error_with_the_services_words(
    status: int, kind: type[PersonaplexError]
) -> None:
    with answering(status, b"the voice recording is silent\n") as (url, _):
        with pytest.raises(kind, match="recording is silent") as caught:
            upload_voice(url, VOICE, None, None)
        assert f"HTTP {status}" in str(caught.value)


@pytest.mark.parametrize("body", [b"", b"[]", b'{"voice": 5}', b"\xff"])
def test_an_answer_that_is_none_is_said_so(body: bytes) -> None:
    with answering(200, body) as (url, _), pytest.raises(ProtocolError, match="cannot be read"):
        upload_voice(url, VOICE, None, None)


def test_files_that_cannot_be_sent_are_not(tmp_path: Path) -> None:
    (tmp_path / "large.wav").write_bytes(bytes(UPLOAD_LIMIT + 1))
    with pytest.raises(BadAudio, match="2,000,000"):
        upload_voice("ws://127.0.0.1:9/api/chat", tmp_path / "large.wav", None, None)
    with pytest.raises(FileNotFoundError):
        upload_voice("ws://127.0.0.1:9/api/chat", tmp_path / "nobody.wav", None, None)
    with pytest.raises(SessionLost, match="could not be uploaded"):
        upload_voice("ws://127.0.0.1:9/api/chat", VOICE, None, None)


def test_a_key_file_gives_its_first_key_without_its_options(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# ours\nfirst label=acme sessions=2\nsecond\n")
    assert read_key(tmp_path / "keys") == "first"
    assert key_of(None, tmp_path / "keys") == "first"
    assert key_of("given", None) == "given"
    with pytest.raises(ConfigError, match="one of the two"):
        key_of("given", tmp_path / "keys")
    (tmp_path / "odd").write_text("schlüssel\n")
    with pytest.raises(ConfigError, match="header"):
        read_key(tmp_path / "odd")


def test_an_own_voice_is_asked_for_by_its_name() -> None:
    options = parser().parse_args(["--voice", NAME])
    assert f"voice_prompt={NAME.replace(':', '%3A')}&" in chat_url(options)
    assert "voice_prompt=NATF2.pt&" in chat_url(parser().parse_args(["--voice", "NATF2"]))
    with pytest.raises(ConfigError, match="not allowed with"):
        parser().parse_args(["--voice", "NATF2", "--own-voice", "v.wav"])


def test_the_command_says_what_is_wrong_with_the_recording(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("k\n")
    with answering(422, b"the voice recording is silent\n") as (url, asked):
        options = ["--url", url, "--input-wav", str(VOICE), "--own-voice", str(VOICE)]
        assert client.main([*options, "--key-file", str(tmp_path / "keys")]) == 1
    assert "the voice recording is silent" in capsys.readouterr().err
    assert asked[0]["key"] == "Bearer k"
