"""Connections that do not say what they want, against a real uvicorn: closed in time, and bounded."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ClassVar

import pytest
import uvicorn
import websockets
from rawsocket import CLOSE, frame
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from deployments import ingress
from deployments.connections import FitAnswers, PromptHttp

TIMEOUT_S = 0.4


class Quick(PromptHttp):
    timeout_s = TIMEOUT_S
    read_s = linger_s = TIMEOUT_S
    pending_limit = 20
    pending: ClassVar[dict[PromptHttp, None]] = {}


async def _hello(request: Request) -> PlainTextResponse:
    await asyncio.sleep(float(request.query_params.get("after", 0)))
    return PlainTextResponse("hello")


async def _like_serve(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers as plain HTTP, as Serve does without an application; or talks to a client that has left."""
    if not scope["query_string"]:
        await send({"type": "http.response.start", "status": 404, "headers": [(b"retry-after", b"7")]})
        await send({"type": "http.response.body", "body": b"not here"})
        return
    await receive()
    await send({"type": "websocket.accept"})
    while (await receive())["type"] != "websocket.disconnect":
        pass
    await send({"type": "websocket.send", "bytes": b"too late"})
    LEFT.set()


OPEN: list[set[Any]] = []  # the server's connections
LEFT = threading.Event()
LARGE = 60_000  # bytes: more than sockets keep here, less than what makes uvicorn wait for its peer


async def _large(request: Request) -> PlainTextResponse:
    return PlainTextResponse(bytes(int(request.query_params["bytes"])))


async def _pour(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_bytes(bytes(LARGE))
    await socket.receive()


async def _echo(socket: WebSocket) -> None:
    await socket.accept()
    while True:
        await socket.send_bytes(await socket.receive_bytes())


@contextlib.asynccontextmanager
async def _server(ws: Any = "websockets-sansio") -> AsyncIterator[int]:
    app = Starlette(routes=[Route("/", _hello, methods=["GET", "POST"]), WebSocketRoute("/ws", _echo)])
    app.routes.extend([Route("/large", _large), WebSocketRoute("/pour", _pour)])
    app.routes.append(WebSocketRoute("/none", FitAnswers(_like_serve)))
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, http=Quick, ws=ws, log_config=None, timeout_keep_alive=60)
    )
    running = asyncio.ensure_future(server.serve())
    while not server.started:  # noqa: ASYNC110 (uvicorn has no event for it)
        await asyncio.sleep(0.01)
    listening = server.servers[0].sockets[0]
    with socket.socket(fileno=os.dup(listening.fileno())) as small:
        small.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)  # connections inherit it
    OPEN[:] = [server.server_state.connections]
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        await running


def _run(scenario: Callable[[int], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with _server() as port:
            result = await scenario(port)
        assert not Quick.pending
        return result

    return asyncio.run(run())


async def _closed_after(port: int, *pieces: bytes, every_s: float = 0.0) -> tuple[float, bytes]:
    """Seconds until the server closed a connection that sends `pieces`, and what it said."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    began = time.monotonic()

    async def send() -> None:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(every_s)

    sending = asyncio.ensure_future(send())
    answer = b""
    with contextlib.suppress(ConnectionError):  # it was closed while we wrote
        while piece := await asyncio.wait_for(reader.read(4_096), 5):
            answer += piece
    sending.cancel()
    writer.close()
    return time.monotonic() - began, answer


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ((), b""),
        ((b"GET / HTTP/1.1\r\nhost: a\r\n",), b"408"),
        ((b"G", b"E", b"T", b" ", b"/", *[b"x"] * 60), b"408"),
        ((b"GET /ws HTTP/1.1\r\nhost: a\r\nupgrade: webs",), b"408"),
        ((b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 900\r\n\r\n", *[b"x"] * 60), b"200"),
        ((b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", b"GET /", *[b"x"] * 60), b"200"),
    ],
    ids=["nothing", "half a head", "a head byte by byte", "half an upgrade", "a slow body", "a second head"],
)
def test_a_peer_that_does_not_finish_is_let_go(pieces: tuple[bytes, ...], status: bytes) -> None:
    """However many bytes it sends meanwhile; an answer it had before is not taken back."""
    took, answer = _run(lambda port: _closed_after(port, *pieces, every_s=0.05))
    assert TIMEOUT_S - 0.1 < took < TIMEOUT_S + 1.0, "the server's clock began when it took the connection"
    assert answer[9:12] == status


def test_a_slow_answer_and_a_pause_between_requests_are_none_of_it() -> None:
    async def scenario(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for path in (b"/?after=0.6", b"/"):
            writer.write(b"GET " + path + b" HTTP/1.1\r\nhost: a\r\n\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            assert head.startswith(b"HTTP/1.1 200")
            assert await reader.readexactly(5) == b"hello"
            await asyncio.sleep(1.5 * TIMEOUT_S)
        writer.close()

    _run(scenario)


def test_pipelined_requests_are_all_answered() -> None:
    async def scenario(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /?after=0.3 HTTP/1.1\r\nhost: a\r\n\r\n" * 3)
        answer = b""
        while answer.count(b"hello") < 3:
            answer += await asyncio.wait_for(reader.read(4_096), 5)
        writer.close()
        return answer

    assert _run(scenario).count(b"200 OK") == 3


def test_a_websocket_stays() -> None:
    async def scenario(port: int) -> None:
        async with websockets.connect(f"ws://127.0.0.1:{port}/ws") as socket:
            await asyncio.sleep(1.5 * TIMEOUT_S)
            await socket.send(b"still here")
            assert await socket.recv() == b"still here"

    _run(scenario)


UPGRADE = (
    b"GET /pour HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


@pytest.mark.parametrize(
    "said",
    [
        b"GET /large?bytes=9000000 HTTP/1.1\r\nhost: a\r\n\r\n",
        f"GET /large?bytes={LARGE} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".encode(),
        UPGRADE + frame(CLOSE, b"\x03\xe8"),
    ],
    ids=["more than fits", "the rest of a closed one", "the rest of a closed WebSocket"],
)
def test_a_peer_that_reads_nothing_is_let_go(said: bytes) -> None:
    """Asyncio would wait for it for ever, with what it does not read."""

    async def scenario(port: int) -> float:
        with socket.socket() as peer:
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
            peer.connect(("127.0.0.1", port))
            head, _, rest = said.partition(b"\r\n\r\n")
            peer.sendall(head + b"\r\n\r\n")
            await asyncio.sleep(0.2)
            peer.sendall(rest)
            began = time.monotonic()
            (connections,) = OPEN
            assert connections
            while connections:
                assert time.monotonic() - began < 5
                await asyncio.sleep(0.02)
            return time.monotonic() - began

    assert _run(scenario) > 0.5 * TIMEOUT_S - 0.2, "it had time to read"


@pytest.mark.parametrize(
    ("opening", "said", "half_closed"),
    [
        (UPGRADE, frame(CLOSE, b"\x03\xe8"), False),
        (UPGRADE, frame(CLOSE, b"\x03\xe8"), True),
        (UPGRADE, b"no frame at all", False),
        (UPGRADE, b"", True),
        (UPGRADE[:-2], b"", False),
    ],
    ids=["a close", "a close and an end", "garbage", "an end", "half an upgrade"],
)
def test_a_server_that_ends_tells_everybody_also_beside_one_who_is_leaving(
    opening: bytes, said: bytes, half_closed: bool
) -> None:
    async def run() -> int | None:
        with contextlib.ExitStack() as peers:
            async with _server(ingress.WebSocket) as port:
                leaving = peers.enter_context(socket.socket())
                leaving.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
                leaving.connect(("127.0.0.1", port))
                leaving.sendall(opening)
                await asyncio.sleep(0.1)
                leaving.sendall(said)  # and reads nothing, so that it stays
                if half_closed:
                    leaving.shutdown(socket.SHUT_WR)
                staying = [await websockets.connect(f"ws://127.0.0.1:{port}/ws") for _ in range(3)]
                await asyncio.sleep(0.1)
                (connections,) = OPEN
                assert 3 <= len(connections) <= 4
            await asyncio.gather(*(one.wait_closed() for one in staying))
        (code,) = {one.close_code for one in staying}
        return code

    assert asyncio.run(run()) == 1012


def test_a_peer_that_reads_slowly_gets_all() -> None:
    async def scenario(port: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2_048)
        writer.write(b"GET /large?bytes=400000 HTTP/1.1\r\nhost: a\r\n\r\n")
        read = 0
        while read < 400_000:
            read += len(await asyncio.wait_for(reader.read(20_000), 5))
            await asyncio.sleep(0.05)
        writer.close()
        return read

    assert _run(scenario) > 400_000


def test_what_serve_answers_to_an_upgrade_is_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(port: int) -> None:
        with pytest.raises(websockets.InvalidStatus) as caught:
            async with websockets.connect(f"ws://127.0.0.1:{port}/none"):
                pass
        response = caught.value.response
        assert (response.status_code, response.body, response.headers["retry-after"]) == (
            404,
            b"not here",
            "7",
        )
        async with websockets.connect(f"ws://127.0.0.1:{port}/none?leave"):
            LEFT.clear()
        assert await asyncio.to_thread(LEFT.wait, 5), "what came too late was dropped"

    _run(scenario)
    assert not [record for record in caplog.records if record.exc_info]


def test_of_those_who_wait_too_many_the_oldest_goes() -> None:
    """And who sends a request at once is answered in the middle of it."""

    async def scenario(port: int) -> None:
        began = time.monotonic()
        async with contextlib.AsyncExitStack() as closing:

            async def connect() -> asyncio.StreamReader:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                closing.callback(writer.close)
                return reader

            crowd = [await connect() for _ in range(Quick.pending_limit)]
            await asyncio.sleep(0.05)
            more = [await connect() for _ in range(5)]
            took, answer = await _closed_after(port, b"GET / HTTP/1.0\r\n\r\n")
            assert answer.endswith(b"hello")
            assert took < 0.2
            for reader in crowd[:5]:
                assert await asyncio.wait_for(reader.read(), 1) == b""
            assert time.monotonic() - began < TIMEOUT_S, "they went before their time"
            assert not crowd[-1].at_eof()
            for reader in crowd + more:
                await asyncio.wait_for(reader.read(), 2)

    _run(scenario)
