"""The limits of the first process that reads: a real uvicorn as Serve makes it, and hostile clients."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import uvicorn
import uvicorn.config
import websockets.sync.client
from attackers import endless_header
from ports import free_port
from rawsocket import BINARY, CONT, PING, SOURCE, TEXT, Raw, Target, frame

from deployments import ingress
from deployments.application import GATEWAY_ENVIRONMENT
from deployments.command import ENVIRONMENT
from deployments.gateway.app import warn_of_proxies_without_limits
from deployments.ingress import FRAGMENT_LIMIT, HEAD_LIMIT, UPLOAD_LIMIT
from deployments.settings import PROXY_CALLBACK, Settings
from personaplex.session.core import MESSAGE_BURST
from personaplex.session.moshi import MESSAGE_LIMIT


class Application:
    """Takes WebSockets and remembers their messages: all at once, as Serve's proxy does, while `reads`
    is set. Answers HTTP once `answer` is."""

    def __init__(self) -> None:
        self.reads, self.answer = threading.Event(), threading.Event()
        self.scopes: deque[Any] = deque()
        self.messages: deque[Any] = deque()
        self.reads.set()
        self.answer.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        if scope["type"] == "http":
            reading = asyncio.ensure_future(self._read_body(receive))
            await asyncio.to_thread(self.answer.wait)
            reading.cancel()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"ok"})
            return
        await receive()
        await send({"type": "websocket.accept"})
        await asyncio.to_thread(self.reads.wait)
        while True:
            message = await receive()
            self.messages.append(message)
            if message["type"] == "websocket.disconnect":
                return
            if message.get("bytes") == b"close":
                await send({"type": "websocket.close", "code": 1000})

    async def _read_body(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


@pytest.fixture
def application() -> Application:
    return Application()


@pytest.fixture
def target(request: pytest.FixtureRequest, application: Application) -> Iterator[Target]:
    """A uvicorn set up by `configure`, in a thread; torn down with its connections."""
    with pytest.MonkeyPatch.context() as patch:
        for table in (uvicorn.config.WS_PROTOCOLS, uvicorn.config.HTTP_PROTOCOLS):
            patch.setitem(table, "auto", table["auto"])
        patch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1")
        app: Any = application
        for middleware in ingress.configure():
            app = middleware.cls(app, *middleware.args, **middleware.kwargs)
        port = free_port()
        config = uvicorn.Config(
            app,
            port=port,
            lifespan="off",
            log_config=None,
            access_log=False,
            loop=getattr(request, "param", "uvloop"),
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Target("127.0.0.1", port)
        finally:
            application.answer.set()
            application.reads.set()
            server.should_exit = server.force_exit = True
            thread.join(10)


both_loops = pytest.mark.parametrize("target", ["asyncio", "uvloop"], indirect=True)  # Serve takes either


def _until(condition: Any, timeout_s: float = 5.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _url(target: Target, scheme: str = "http") -> str:
    return f"{scheme}://{target.host}:{target.port}{target.path}"


def test_every_way_to_start_names_the_callback() -> None:
    assert ENVIRONMENT[ingress.VARIABLE] == ingress.CALLBACK
    assert GATEWAY_ENVIRONMENT[ingress.VARIABLE] == ingress.CALLBACK
    # Ray sorts them; the proxies' own value must have been read before the gateway's takes its place.
    assert sorted(GATEWAY_ENVIRONMENT).index(PROXY_CALLBACK) < sorted(GATEWAY_ENVIRONMENT).index(
        ingress.VARIABLE
    )
    module, _, name = ingress.CALLBACK.rpartition(".")
    assert (module, name) == (ingress.__name__, ingress.configure.__name__)


@pytest.mark.parametrize(("given", "lines"), [("", 1), ("some.other", 1), (ingress.CALLBACK, 0)])
def test_a_gateway_says_when_proxies_have_no_limits(
    given: str, lines: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(PROXY_CALLBACK, given)
    monkeypatch.setattr(logging.getLogger("deployments"), "propagate", True)
    warn_of_proxies_without_limits()
    assert len(caplog.records) == lines
    assert all(ingress.CALLBACK in record.getMessage() for record in caplog.records)
    assert Settings().slots, "the variable is no unknown setting"


@both_loops
def test_ordinary_clients_notice_nothing(target: Target, application: Application) -> None:
    assert requests.get(_url(target), timeout=5).text == "ok"
    body = bytes(range(256)) * 400
    with websockets.sync.client.connect(_url(target, "ws")) as socket:
        assert not socket.protocol.extensions, "no compression"
        for message in (b"", b"a", body, "text"):
            socket.send(message)
        socket.send([b"in ", b"three ", b"parts"])
        socket.send(b"close")
        with pytest.raises(websockets.ConnectionClosedOK):
            socket.recv(5)
    _until(lambda: application.messages[-1]["type"] == "websocket.disconnect")
    heard = [message.get("bytes", message.get("text")) for message in application.messages]
    assert heard[:6] == [b"", b"a", body, "text", b"in three parts", b"close"]
    assert all(ingress.limited(scope) for scope in application.scopes)


def test_what_steers_serve_is_taken_away_and_nobody_is_believed(
    target: Target, application: Application
) -> None:
    hostile = {
        "X-Request-ID": "forged\xff",
        "X-Request-Timeout-Seconds": "0.001",
        "x-request-disconnect-disabled": "?1",
        "Serve-Multiplexed-Model-Id": "a",
        "X-Session-Id": "b",
        "X-Forwarded-For": "192.0.2.1",
        "Personaplex.Limits": "1",
    }
    requests.get(_url(target), headers={**hostile, "X-API-Key": "k"}, timeout=5)
    (scope,) = application.scopes
    names = {name for name, _ in scope["headers"]}
    assert b"x-api-key" in names
    assert b"x-forwarded-for" in names, "admission.py reads it, where trusted_proxies says so"
    assert not {name.lower().encode() for name in list(hostile)[:5]} & names
    assert scope["client"][0] == "127.0.0.1"
    assert not ingress.limited({"type": "http", "headers": scope["headers"]}), "no header makes the mark"


def test_nothing_is_inflated(target: Target, application: Application) -> None:
    with Raw(target) as raw:
        head = raw.upgrade("Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits")
        assert head.startswith("HTTP/1.1 101")
        assert "extensions" not in head.lower()
        raw.socket.sendall(frame(BINARY, b"x" * 100, compressed=True))
        assert raw.close_code() == 1002


@pytest.mark.parametrize("parts", [1, 3])
def test_a_message_over_the_limit_is_refused_however_it_comes(target: Target, parts: int) -> None:
    size = MESSAGE_LIMIT // parts + 1
    with Raw(target) as raw:
        raw.upgrade()
        for part in range(parts):
            data = frame(CONT if part else BINARY, bytes(size), final=part == parts - 1)
            with contextlib.suppress(OSError):
                raw.socket.sendall(data)
        assert raw.close_code() == 1009


def test_a_message_in_crumbs_is_refused(target: Target, application: Application) -> None:
    with Raw(target) as raw:
        raw.upgrade()
        with contextlib.suppress(OSError):
            raw.socket.sendall(frame(BINARY, b"", final=False))
            raw.socket.sendall(frame(CONT, b"", final=False) * (FRAGMENT_LIMIT + 200))
        assert raw.close_code() == 1009
    _until(lambda: application.messages)
    assert [message["type"] for message in application.messages] == ["websocket.disconnect"]


@both_loops
def test_a_flood_waits_in_the_clients_own_socket(target: Target, application: Application) -> None:
    """Whoever reads as greedily as Serve gets a session's burst and then a session's rate, not a flood."""
    with Raw(target) as raw:
        raw.upgrade()
        raw.socket.settimeout(0.5)
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 60_000_000:
                sent += raw.socket.send(frame(BINARY, b"\x06") * 5_000)
        assert sent < 20_000_000, "what the kernel holds and a session's burst, and no more"
        assert MESSAGE_BURST < len(application.messages) < 3 * MESSAGE_BURST


@both_loops
def test_an_application_that_does_not_read_is_sent_no_more(target: Target, application: Application) -> None:
    application.reads.clear()
    with Raw(target) as raw:
        raw.upgrade()
        raw.socket.settimeout(0.5)
        with contextlib.suppress(OSError):
            for _ in range(400):
                raw.socket.sendall(frame(BINARY, bytes(131_000)))
            pytest.fail("52 MB were taken")
        application.reads.set()
        _until(lambda: len(application.messages) >= 2)  # and then it goes on, at a session's pace


@both_loops
def test_who_reads_nothing_is_not_read(target: Target, application: Application) -> None:
    """Answers to pings would be kept for it without end."""
    with Raw(target) as raw:
        raw.upgrade()
        raw.socket.settimeout(0.5)
        with contextlib.suppress(OSError):
            for _ in range(400):
                raw.socket.sendall(frame(PING, bytes(125)) * 1_000)
            pytest.fail("52 MB of pings were taken")


@pytest.mark.parametrize(
    "headers",
    [[f"X-{number}: a" for number in range(200)], ["X-A: " + "a" * 40_000], ["Content-Length: 5"]],
    ids=["too many", "too long", "a body"],
)
def test_an_upgrade_that_cannot_be_read_is_answered(
    target: Target, application: Application, headers: list[str]
) -> None:
    """Uvicorn waits for another one on the same connection, for ever."""
    with Raw(target) as raw:
        head = raw.upgrade(*headers)
        assert head.startswith("HTTP/1.1 400"), head
        body = ingress._BAD_UPGRADE.partition(b"\r\n\r\n")[2]
        assert f"content-length: {len(body)}\r" in head
        assert raw.socket.makefile("rb").read() == body, "and closed"
    assert not application.scopes


@pytest.mark.parametrize("pieces", [[b"\xff"], [b"\xc3", b"\xa9", b"\xc3"]])
def test_text_that_is_none_is_one_close_and_no_traceback(
    target: Target, pieces: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with Raw(target) as raw:
        raw.upgrade()
        for number, piece in enumerate(pieces):
            last = number == len(pieces) - 1
            raw.socket.sendall(frame(CONT if number else TEXT, piece, final=last))
        assert raw.close_code() == 1007
    assert not [record for record in caplog.records if record.exc_info]


def test_a_head_without_an_end_is_cut(target: Target) -> None:
    began = time.monotonic()
    endless_header(target, began + 10)
    assert time.monotonic() - began < 5
    with Raw(target) as raw:
        raw.socket.sendall(b"GET / HTTP/1.1\r\nX: " + b"a" * (HEAD_LIMIT + 1))
        assert raw.head().startswith("HTTP/1.1 400")


def test_a_body_over_the_limit_is_cut_also_while_the_answer_takes_time(
    target: Target, application: Application
) -> None:
    application.answer.clear()
    with Raw(target) as raw:
        raw.request("Transfer-Encoding: chunked", method="POST")
        with contextlib.suppress(OSError):
            for _ in range(100):
                raw.socket.sendall(b"10000\r\n" + bytes(65_536) + b"\r\n")
            pytest.fail("6 MB were taken")


def test_one_address_takes_recordings_and_so_many_at_once(
    target: Target, application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    voices = dataclasses.replace(target, path="/api/voices")
    place = f"{_url(voices)}?consent=1"
    fit, large = bytes(UPLOAD_LIMIT), bytes(UPLOAD_LIMIT + 1)

    def post(url: str, body: bytes) -> int:
        with contextlib.suppress(requests.ConnectionError):
            return requests.post(url, body, timeout=10).status_code
        return 0  # cut off

    application.answer.set()
    assert post(place, fit) == 200
    application.answer.clear()  # it answers nothing that it has not read
    for url, body in ((place, large), (_url(target), fit), (f"{_url(target)}?x=/api/voices", fit)):
        assert post(url, body) in (0, 400)
    monkeypatch.setattr(ingress, "UPLOADS_LIMIT", 2)
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            raw = stack.enter_context(Raw(voices))
            raw.request(f"Content-Length: {UPLOAD_LIMIT}", method="POST")
            raw.socket.sendall(bytes(MESSAGE_LIMIT + 1))
        _until(lambda: len(ingress.Http.uploads) == 2)
        with Raw(voices) as third:
            third.request(f"Content-Length: {UPLOAD_LIMIT}", method="POST")
            with contextlib.suppress(OSError):
                third.socket.sendall(bytes(MESSAGE_LIMIT + 1))
            assert third.head().startswith("HTTP/1.1 503")
    _until(lambda: not ingress.Http.uploads)


def test_one_request_at_a_time(target: Target, application: Application) -> None:
    application.answer.clear()
    with Raw(target) as raw:
        raw.socket.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2_000)
        assert raw.head().startswith("HTTP/1.1 400")
    with requests.Session() as session:  # on one connection
        application.answer.set()
        assert [session.get(_url(target), timeout=5).text for _ in range(3)] == ["ok"] * 3
    assert len(application.scopes) <= 4


def test_attackers_come_from_another_address(target: Target, application: Application) -> None:
    with Raw(target) as raw:
        raw.upgrade()
    assert application.scopes[0]["client"][0] == SOURCE
