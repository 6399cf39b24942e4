"""The media link: one TCP connection per session between a gateway and the replica that holds its slot.

Every message is `length: uint32 LE | kind: uint8 | payload` (messages.py), length counting the kind and the
payload. Contract: bytes and connections only, no Ray, no engine. Nothing is queued without a bound: while the
peer does not read, the newest `outbox` frames are kept, older ones are dropped and counted. The kernel ends
a connection whose other machine is gone, or whose other process stands still, within about a second more than
`stall_s` (the setting `stall_limit_s`): a shorter stall is a gap. A process that ends closes it at once.
Bytes outside this protocol raise ProtocolError and end the connection.

Before the first message both ends prove that they know the application's secret (handshake.py); over TLS the
proof names the replica's certificate (tls.py). Who proves nothing is told nothing and is cut off.
"""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, cast

from deployments.wire.handshake import Handshake
from deployments.wire.messages import FRAME_BYTES, MessageKind, pack_error
from deployments.wire.tls import digest_of_peer
from personaplex.errors import PersonaplexError, ProtocolError

SOCKET_BYTES = 65_536  # the kernel's send buffer: 8 frames
MESSAGE_LIMIT = 65_536  # bytes; no message of this protocol comes near

_LENGTH = struct.Struct("<I")
_KINDS = {int(kind): kind for kind in MessageKind}

OnMessage = Callable[["Link", MessageKind, bytes], None]
OnLost = Callable[["Link"], None]


class Link(asyncio.Protocol):
    """One end of a connection. `on_message(kind, payload)` and `on_lost()` are called on the event loop;
    `on_lost` once, after the last message. A ProtocolError raised by `on_message` ends the connection.
    `outbox` is the number of frames that may wait for a peer that does not read. `handshake` comes before the
    first message; `certificate` is the digest of a replica's own, b"" without TLS and in a gateway."""

    def __init__(
        self,
        on_message: OnMessage,
        on_lost: OnLost,
        *,
        handshake: Handshake,
        outbox: int,
        stall_s: float,
        certificate: bytes = b"",
    ) -> None:
        self._on_message, self._on_lost = on_message, on_lost
        self._handshake, self._certificate = handshake, certificate
        self._outbox_limit, self._stall_s = outbox, stall_s
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._outbox: deque[bytes] = deque()
        self._writable = True
        self._closing = False
        self.settled = asyncio.Event()  # the handshake is over, or the connection
        self.dropped = 0  # messages not sent because the peer does not read

    @property
    def open(self) -> bool:
        """Whether messages can be sent: the other end has proved what it is, and the link was not closed."""
        return self._transport is not None and not self._closing and self._handshake.done

    def send(self, kind: MessageKind, payload: bytes) -> None:
        """Sends one message in order, however much is waiting. Without effect while the link is not open."""
        if self.open:
            assert self._transport is not None
            self._flush()
            self._transport.write(_LENGTH.pack(len(payload) + 1) + bytes((kind,)) + payload)

    def send_frame(self, kind: MessageKind, payload: bytes) -> None:
        """Sends one FRAME or REPLY; while the peer does not read, only the newest `outbox` are kept."""
        if self._writable:
            self.send(kind, payload)
            return
        self._outbox.append(_LENGTH.pack(len(payload) + 1) + bytes((kind,)) + payload)
        if len(self._outbox) > self._outbox_limit:
            self._outbox.popleft()
            self.dropped += 1

    def close(self, error: PersonaplexError | None = None) -> None:
        """Says why, sends what is waiting and closes; a peer that does not read is cut off after a while by
        the kernel. Who has not proved what it is is told nothing. A link that is not connected yet never will
        be. Idempotent."""
        if self._transport is None or self._closing:
            self._closing = True
            return
        if not self._handshake.done:
            self._closing = True
            self._transport.abort()
            return
        self.send(MessageKind.CLOSE, b"{}" if error is None else pack_error(error))
        self._closing = True
        if self._writable:
            self._transport.close()
        else:
            self._transport.abort()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=2 * FRAME_BYTES)  # beyond it frames wait in the outbox
        tune(cast(socket.socket, transport.get_extra_info("socket")), self._stall_s)
        if self._closing:
            self._transport.abort()
            return
        self._transport.write(self._handshake.begin(self._certificate or digest_of_peer(transport)))

    def data_received(self, data: bytes) -> None:
        try:
            if self._handshake.done and not self._received:  # most often one whole message
                self._received += data[self._parse(data) :]
                return
            self._received += data
            if not self._handshake.done:
                self._shake_hands()
            if self._handshake.done:
                del self._received[: self._parse(self._received)]
        except ProtocolError as error:
            self._received.clear()
            self.close(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.settled.set()
        self._on_lost(self)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._flush()

    def _shake_hands(self) -> None:
        if self._closing:
            self._received.clear()
            return
        assert self._transport is not None
        self._transport.write(self._handshake.receive(self._received))
        if self._handshake.done:
            self.settled.set()

    def _parse(self, data: bytes | bytearray) -> int:
        """Hands on the messages that `data` begins with; how many bytes they are."""
        start = 0
        while not self._closing and len(data) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(data, start)
            if not 1 <= length <= MESSAGE_LIMIT:
                raise ProtocolError("a message of an impossible length")
            end = start + _LENGTH.size + length
            if len(data) < end:
                break
            kind = _KINDS.get(data[start + _LENGTH.size])
            if kind is None:
                raise ProtocolError("a message of an unknown kind")
            self._on_message(self, kind, bytes(data[start + _LENGTH.size + 1 : end]))
            start = end
        return start

    def _flush(self) -> None:
        while self._outbox and self._transport is not None:
            self._transport.write(self._outbox.popleft())


def tune(sock: Any, stall_s: float) -> None:
    """No delay for small messages; whoever answers nothing, or reads nothing, for longer than `stall_s` is
    given up by the kernel, about a second later."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    probes = min(math.ceil(stall_s), 127)
    for name, value in (("TCP_KEEPIDLE", 1), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", probes)):
        if hasattr(socket, name):  # not on macOS
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1_000 * (stall_s + 1)))


async def connect(
    host: str,
    port: int,
    on_message: OnMessage,
    on_lost: OnLost,
    *,
    handshake: Handshake,
    outbox: int,
    stall_s: float,
    tls: ssl.SSLContext | None = None,
) -> Link:
    """A link to a listening replica that has proved what it is; see `Link`. Raises OSError, ssl.SSLError
    among them. However long it takes: the caller bounds it."""
    link = Link(on_message, on_lost, handshake=handshake, outbox=outbox, stall_s=stall_s)
    try:
        await asyncio.get_running_loop().create_connection(lambda: link, host, port, ssl=tls)
        await link.settled.wait()
    except BaseException:
        link.close()
        raise
    if not link.open:
        raise ConnectionError("the replica hung up at once, or is none of this application")
    return link


async def listen(
    make_link: Callable[[], Link],
    host: str,
    port_min: int = 0,
    port_max: int = 0,
    tls: ssl.SSLContext | None = None,
    tls_timeout_s: float = 5.0,
) -> tuple[asyncio.Server, int]:
    """A server on the first free port of the range (0: any), and that port. OSError when none is free."""
    loop = asyncio.get_running_loop()
    secure: dict[str, Any] = {} if tls is None else {"ssl": tls, "ssl_handshake_timeout": tls_timeout_s}
    for port in range(port_min, max(port_min, port_max) + 1):
        try:
            server = await loop.create_server(make_link, host, port, backlog=512, **secure)
        except OSError:
            if port >= port_max:
                raise
            continue
        return server, server.sockets[0].getsockname()[1]
    raise AssertionError("the range holds at least one port")
