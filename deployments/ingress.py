"""Limits in the first process that reads a client's bytes: Serve's proxy, or a gateway behind HAProxy.

Serve makes its HTTP servers with uvicorn's defaults: permessage-deflate, messages of 16 MiB, no limit on
headers, bodies, fragments or pings, and behind them queues without a bound. Whatever a gateway refuses has
been inflated and copied twice by then. Serve has no option for any of it, but one hook: the function named by
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH (`CALLBACK`) is called in every process that is about to listen, the
proxies and the gateways' own servers alike. `configure` is that function. By uvicorn's public tables of
protocols (`uvicorn.config.WS_PROTOCOLS`, `HTTP_PROTOCOLS`) it puts these in place of "auto":

    Http       a request's head has at most HEAD_LIMIT bytes and one read, its body MESSAGE_LIMIT, and no
               other request may come before its answer is complete; else 400 and a close; and a request that
               does not come whole has a deadline (`connections.PromptHttp`)
    WebSocket  no compression; a message has at most MESSAGE_LIMIT bytes (close code 1009) in FRAGMENT_LIMIT
               pieces; frames and bytes are read at twice the rate a session may send (session/core.py), so
               that a flood waits in the client's own socket; nothing is read from a client that reads nothing

and returns two middlewares: `DropSteering`, which removes the headers by which Serve lets a client steer it
(the request's id in logs, its timeout, whether a hang-up is noticed) and marks the request as having come
through it, and `connections.FitAnswers`. It also makes uvicorn trust no X-Forwarded-For (FORWARDED_ALLOW_IPS,
uvicorn's variable): whom to trust is the setting `trusted_proxies`. Raises ImportError where uvicorn has no
such protocols: the proxy then does not start, which is better than one without limits. Knows no Ray.
"""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import uvicorn.config
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.protocol import State

from deployments.connections import FitAnswers, PromptHttp
from personaplex.allowance import Allowance
from personaplex.session.core import BYTE_BURST, BYTES_PER_S, MESSAGE_BURST, MESSAGES_PER_S
from personaplex.session.moshi import MESSAGE_LIMIT

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"  # Serve's own
CALLBACK = "deployments.ingress.configure"
MARK = "personaplex.limits"  # key of the ASGI scope; no client can write one

# Read by `websockets`: bytes of a request line; a role text of 1000 Chinese characters takes 9,000.
REQUEST_LINE = {"WEBSOCKETS_MAX_LINE_LENGTH": "32768"}
HEAD_LIMIT = 65_536  # bytes of request line and headers; a role text of 1000 Chinese characters takes 9,000
FRAGMENT_LIMIT = 1_024
PIECE = 1_024  # bytes parsed before others have their turn: 170 of the smallest frames
_SLACK = 1.25  # of a session's bursts, so that the session is the one to refuse and to say why
_BAD_UPGRADE = (
    b"HTTP/1.1 400 Bad Request\r\n"
    b"content-type: text/plain; charset=utf-8\r\n"
    b"content-length: 60\r\n"
    b"connection: close\r\n"
    b"\r\n"
    b"this upgrade has too many or too long headers, or has a body"
)
UPLOAD_PATH = b"/api/voices"  # the one address that takes more than MESSAGE_LIMIT
UPLOAD_LIMIT = 2_000_000  # bytes of a recording
UPLOADS_LIMIT = 16  # of more than MESSAGE_LIMIT at once, in one process
_TOO_MANY_UPLOADS = (
    b"HTTP/1.1 503 Service Unavailable\r\n"
    b"content-type: text/plain; charset=utf-8\r\n"
    b"content-length: 26\r\n"
    b"retry-after: 5\r\n"
    b"connection: close\r\n"
    b"\r\n"
    b"too many uploads at once\r\n"
)
_STEERING = frozenset(
    (
        *("x_request_id", "x_session_id", "serve_multiplexed_model_id"),
        *("x_request_timeout_seconds", "x_request_disconnect_disabled"),
    )
)


def configure() -> list[Middleware]:
    """Called by Serve, without arguments; see the module. Idempotent."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:Http"
    uvicorn.config.WS_PROTOCOLS["auto"] = f"{__name__}:WebSocket"
    os.environ["FORWARDED_ALLOW_IPS"] = ""
    return [Middleware(DropSteering), Middleware(FitAnswers)]


def limited(scope: Mapping[str, Any]) -> bool:
    """Whether a request, by its ASGI scope, was read by a process with these limits."""
    return scope.get(MARK) is True


class DropSteering:
    """ASGI middleware that removes the headers Serve obeys and marks requests as read with these limits."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            headers = [header for header in scope["headers"] if not _steers(header[0])]
            scope = {**scope, "headers": headers, MARK: True}
        await self._app(scope, receive, send)


def _steers(name: bytes) -> bool:
    return name.decode("latin-1").lower().replace("-", "_") in _STEERING


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


class Http(PromptHttp):
    """Uvicorn's HTTP protocol with a bound on everything it keeps."""

    uploads: ClassVar[set[Http]] = set()  # whose body is longer than MESSAGE_LIMIT

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._body_limit = MESSAGE_LIMIT
        self._in_head, self._head_bytes, self._body_bytes = False, 0, 0

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:  # still, so all of it belongs there
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_LIMIT and not self.transport.is_closing():
                self.send_400_response("Request head too long.")

    def on_message_begin(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            raise ValueError("a request before the answer to the last")  # the parser makes a 400 of it
        self._in_head, self._head_bytes, self._body_bytes = True, 0, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        path = self.url.partition(b"?")[0]
        uploads = path.endswith(UPLOAD_PATH) and self.parser.get_method() == b"POST"
        self._body_limit = UPLOAD_LIMIT if uploads else MESSAGE_LIMIT
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > self._body_limit:
            raise ValueError("body too long")
        if self._body_bytes > MESSAGE_LIMIT and self not in self.uploads:
            if len(self.uploads) >= UPLOADS_LIMIT:
                self.transport.write(_TOO_MANY_UPLOADS)
                self.transport.close()
                return
            self.uploads.add(self)
        super().on_body(body)

    def on_response_complete(self) -> None:
        self.uploads.discard(self)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.uploads.discard(self)
        super().connection_lost(exc)


class WebSocket(WebSocketsSansIOProtocol):
    """Uvicorn's WebSocket protocol, which reads no more than a session may send.

    What the transport has read waits in `_unread`, at most one of its buffers, and is parsed in pieces: while
    the application has taken every message before, the client takes what it is sent, and the allowances last.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.ws_per_message_deflate = False
        config.ws_max_size = MESSAGE_LIMIT
        super().__init__(config, *args, **kwargs)
        self._unread = bytearray()
        self._client_reads = True
        self._transport_reads = True
        self._again: asyncio.Handle | None = None
        self._frames = Allowance(2 * MESSAGES_PER_S, _SLACK * MESSAGE_BURST)
        self._bytes = Allowance(2 * BYTES_PER_S, _SLACK * BYTE_BURST)

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        if self.handshake_initiated:
            if len(data) <= PIECE and not self._unread and self._may_parse() and not self._wait():
                self._parse(data)
            else:
                self._unread += data
                self._read_on()
            return
        super().data_received(data)  # the whole head
        if not self.handshake_initiated and not self.transport.is_closing():
            self.transport.write(_BAD_UPGRADE)  # uvicorn would wait for another, without end
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unread.clear()
        if self._again is not None:
            self._again.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if self.conn.state is State.CLOSING:  # uvicorn would raise, and leave all other connections open
            self.stop_keepalive()
            self.transport.close()
        else:
            super().shutdown()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._client_reads = False

    def resume_writing(self) -> None:
        super().resume_writing()
        self._client_reads = True
        self._read_on()

    # The application's side

    async def receive(self) -> Any:
        message = await self.queue.get()
        if self.queue.empty():
            self.read_paused = False
            self._look_again()
        return message

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and self.close_sent:
            self.handshake_complete = True  # uvicorn logs an error for each refusal otherwise
        self._look_again()

    # Reading

    def _look_again(self) -> None:
        """After a message of the application's."""
        if self._unread or not self._transport_reads:
            self._read_on()

    def _read_on(self) -> None:
        """Parses the next piece if it may, and lets the transport read exactly while nothing is left."""
        if self.transport.is_closing():
            return
        if self._again is None and self._unread and self._may_parse():
            if wait := self._wait():
                self._again = self.loop.call_later(wait, self._continue)
            else:
                piece = bytes(self._unread[:PIECE])
                del self._unread[:PIECE]
                self._parse(piece)
        reads = not self._unread and self._client_reads
        if reads is not self._transport_reads and not self.transport.is_closing():
            self._transport_reads = reads
            if reads:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    def _may_parse(self) -> bool:
        return bool(self.handshake_complete and self._client_reads and not self.read_paused)

    def _wait(self) -> float:
        """Seconds until the allowances last for another piece."""
        now = self.loop.time()
        return max(self._frames.wait(now), self._bytes.wait(now))

    def _parse(self, piece: bytes) -> None:
        self._bytes.spend(len(piece))
        super().data_received(piece)
        if len(self.frames) > FRAGMENT_LIMIT:
            self.conn.fail(1009, "too many fragments")
            self.handle_parser_exception()
        if self._unread and not self.transport.is_closing():
            self._again = self.loop.call_soon(self._continue)

    def _continue(self) -> None:
        self._again = None
        self._read_on()

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text" and not _is_utf8(b"".join(self.frames)):
            self.conn.fail(1007, "text that is not UTF-8")  # uvicorn writes a traceback for each
            self.handle_parser_exception()
        else:
            # Nothing more is parsed until the application has it; the transport reads on as long as nothing
            # is left unread, which uvicorn would have it stop and start for each message.
            self.read_paused = self.read_paused or not self.close_sent
            super().send_receive_event_to_app()

    def handle_events(self) -> None:
        self._frames.spend(len(self.conn.events))
        super().handle_events()

    def handle_parser_exception(self) -> None:
        if self.conn.close_sent is None:  # not open yet, or not any more: nobody is there to be told
            self.transport.abort()
        else:
            super().handle_parser_exception()

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        self.transport.abort()  # a client that reads nothing would never let the close be written
