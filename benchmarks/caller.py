"""A client that costs next to nothing: a benchmark on one machine is to measure the service, not its clients.

It speaks RFC 6455 by hand: what it sends is framed once for all callers (masked with zeros, which a server
unmasks as it would anything), of what it hears only the number of an answer is read. Pings are answered.
"""

from __future__ import annotations

import asyncio
import base64
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from typing import cast
from urllib.parse import urlsplit

TEXT, BINARY, _CLOSE, _PING, _PONG = 1, 2, 8, 9, 10
_SEQUENCE = slice(19, 23)  # of an Ogg page behind the message's kind
_HEADER_PAGES = 2

LIVE = -1
# Opcode, data, begin and end of a message to the number of the answer it is, LIVE, or None for anything else.
Hear = Callable[[int, bytes, int, int], int | None]


def hear_chat() -> Hear:
    """/api/chat: the handshake, and pages by their number from the first after the headers."""

    def hear(opcode: int, data: bytes, begin: int, end: int) -> int | None:
        if opcode != BINARY or begin == end or data[begin] > 1:
            return None
        if data[begin] == 0:
            return LIVE
        number = int.from_bytes(data[begin:][_SEQUENCE], "little") - _HEADER_PAGES
        return number if number >= 0 else None

    return hear


def framed(payload: bytes, opcode: int = BINARY) -> bytes:
    """One client's WebSocket frame of less than 64 KiB."""
    size = len(payload)
    length = bytes((0x80 | size,)) if size < 126 else struct.pack(">BH", 0x80 | 126, size)
    return bytes((0x80 | opcode,)) + length + bytes(4) + payload


class Caller(asyncio.Protocol):
    """One conversation. `sent` holds when each message left, `heard` when each answer came, by its number;
    seconds of the monotonic clock."""

    def __init__(
        self,
        url: str,
        opening: Sequence[bytes],
        *,
        headers: Mapping[str, str] | None = None,
        hear: Hear | None = None,
        settle_s: float = 0.0,
    ) -> None:
        """`opening`: framed messages, sent as soon as the connection is open; `headers`: of the upgrade.
        `hear`: the protocol's; where it tells nobody that a session is live, it counts as live `settle_s`
        after the opening."""
        self.sent: list[float] = []
        self.heard: dict[int, float] = {}
        self._url, self._opening, self._headers = urlsplit(url), opening, headers or {}
        self._hear_message, self._settle_s = hear or hear_chat(), settle_s
        self._live: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._received = b""
        self._upgraded = False

    async def open(self) -> None:
        """Returns when the session is live. Raises ConnectionError."""
        loop = asyncio.get_running_loop()
        host, port = self._url.hostname or "127.0.0.1", self._url.port or 80
        await loop.create_connection(lambda: self, host, port)
        await asyncio.wait_for(self._live, 30)

    async def talk(
        self, pages: Sequence[bytes], phase_s: float, period_s: float, listen_s: float = 0.5
    ) -> None:
        """Sends the framed `pages`, one every `period_s`, then listens on for `listen_s` and hangs up."""
        due = time.monotonic() + phase_s
        for page in pages:
            await asyncio.sleep(due - time.monotonic())
            self.sent.append(time.monotonic())
            self._transport.write(page)
            due += period_s
        await asyncio.sleep(listen_s)
        self._transport.write(framed(b"", _CLOSE))
        self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = (
            f"GET {self._url._replace(scheme='', netloc='').geturl()} HTTP/1.1",
            f"Host: {self._url.netloc}",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Key: {key}",
            "Sec-WebSocket-Version: 13",
            *(f"{name}: {value}" for name, value in self._headers.items()),
        )
        self._transport.write("\r\n".join((*lines, "", "")).encode())

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        self._received = data = self._received + data
        if not self._upgraded:
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                return
            if b" 101 " not in head.partition(b"\r\n")[0]:
                self._live.set_exception(ConnectionError("no upgrade"))
            self._upgraded = True
            for message in self._opening:
                self._transport.write(message)
            if self._settle_s:
                asyncio.get_running_loop().call_later(self._settle_s, self._settle)
        start = 0
        while (frame := _frame(data, start)) is not None:
            opcode, begin, start = frame
            self._hear(opcode, data, begin, start, now)
        self._received = data[start:]

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._live.done():
            self._live.set_exception(ConnectionError("hung up"))

    def _settle(self) -> None:
        if not self._live.done():
            self._live.set_result(None)

    def _hear(self, opcode: int, data: bytes, begin: int, end: int, now: float) -> None:
        if opcode == _PING:
            self._transport.write(framed(data[begin:end], _PONG))
            return
        number = self._hear_message(opcode, data, begin, end)
        if number == LIVE:
            if not self._settle_s:
                self._settle()
        elif number is not None:
            self.heard.setdefault(number, now)


def _frame(data: bytes, start: int) -> tuple[int, int, int] | None:
    """Opcode, begin and end of the payload of the frame at `start`, or None while it is incomplete."""
    if len(data) < start + 4:  # nothing of interest is shorter
        return None
    size, begin = data[start + 1], start + 2
    if size == 126:
        size, begin = int.from_bytes(data[begin : begin + 2], "big"), begin + 2
    if len(data) < begin + size:
        return None
    return data[start] & 15, begin, begin + size
