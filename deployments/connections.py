"""Connections that have not said what they want yet: how long they may take, and how many there may be.

Uvicorn waits for the rest of a request for ever. `PromptHttp` is its HTTP protocol with a deadline wherever
it waits for its peer: for the first request of a connection, for the rest of a request that has begun, and
for a body nobody reads any more. No byte a peer sends moves the deadline; only a request that is complete, up
to its body, ends it. Between requests uvicorn's own keep-alive timeout applies. When PENDING_LIMIT
connections of this process wait, the one that has waited longest makes room: whoever sends a request at once
is never that one.

A peer that reads nothing has deadlines too, since asyncio waits for it without end, even to close: READ_S for
some of the answer, and LINGER_S, WebSockets included, for what is left when the connection is closed.
`FitAnswers` is ASGI middleware that makes what Serve answers fit for a WebSocket.

Knows no Ray; `deployments.ingress` puts both in front of Serve.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, ClassVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.utils import ClientDisconnected

REQUEST_TIMEOUT_S = 10.0  # for a request's head, and for what is left of a body once it has been answered
PENDING_LIMIT = 512
READ_S = 30.0  # for a peer to make room for more of an answer: it reads 2 kB/s or leaves
LINGER_S = 10.0  # at least, and at most twice that

_TIMED_OUT = (
    b"HTTP/1.1 408 Request Timeout\r\n"
    b"content-type: text/plain; charset=utf-8\r\n"
    b"content-length: 30\r\n"
    b"connection: close\r\n"
    b"\r\n"
    b"the request did not come whole"
)


class _CloseWatch:
    """Aborts a transport that has been closing for `period_s`: its peer does not take what is left."""

    def __init__(self, transport: asyncio.Transport, period_s: float) -> None:
        self._transport, self._period_s = transport, period_s
        self._closing = False
        self._wait()

    def cancel(self) -> None:
        self._timer.cancel()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._period_s, self._look)

    def _look(self) -> None:
        if self._closing:
            self._transport.abort()
        else:
            self._closing = self._transport.is_closing()
            self._wait()


class PromptHttp(HttpToolsProtocol):
    """Uvicorn's HTTP protocol for peers that send their requests and take their answers promptly; others are
    disconnected."""

    timeout_s: ClassVar[float] = REQUEST_TIMEOUT_S
    read_s: ClassVar[float] = READ_S
    linger_s: ClassVar[float] = LINGER_S
    pending_limit: ClassVar[int] = PENDING_LIMIT
    pending: ClassVar[dict[PromptHttp, None]] = {}  # that wait for their peer, the longest first

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None  # runs while our peer leaves no room for more
        self._in_head, self._whole = False, True  # the request that is being read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._close_watch = _CloseWatch(transport, self.linger_s)  # goes on when this becomes a WebSocket
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        self._close_watch.cancel()
        if self._unread is not None:
            self._unread.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(self.read_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing() or self.transport.get_protocol() is not self or self._answering():
            self._wait_no_more()  # get_protocol: it is a WebSocket now
        else:
            self._wait()

    def on_message_begin(self) -> None:
        self._in_head, self._whole = True, False
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._whole = True
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._whole and not self._answering() and not self.transport.is_closing():
            self._wait()

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        """Starts the deadline, unless it runs."""
        if self._deadline is not None:
            return
        self._deadline = self.loop.call_later(self.timeout_s, self._give_up)
        self.pending[self] = None
        if len(self.pending) > self.pending_limit:
            next(iter(self.pending))._give_up()

    def _wait_no_more(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
            del self.pending[self]

    def _give_up(self) -> None:
        self._wait_no_more()
        if not self.transport.is_closing():
            if self._in_head:
                self.transport.write(_TIMED_OUT)
            self.transport.close()


class FitAnswers:
    """ASGI middleware for what the application says to WebSockets.

    Serve answers an upgrade it cannot serve (no such application, no gateway, too late) as if it were a plain
    request; uvicorn makes 500 of that and a traceback. Here it becomes the refusal it is meant to be. What is
    sent to a client that has left is dropped: `receive` has reported that it left, and Serve logs a traceback
    for each message that cannot be sent.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"].startswith("http."):
                message = {**message, "type": f"websocket.{message['type']}"}
            with contextlib.suppress(ClientDisconnected):
                await send(message)

        await self._app(scope, receive, answer if scope["type"] == "websocket" else send)
