"""Raw sockets for what no library would send: just enough of HTTP and WebSocket to say anything at all."""

from __future__ import annotations

import base64
import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

CONT, TEXT, BINARY, CLOSE, PING = 0, 1, 2, 8, 9
SOURCE = "127.0.0.2"  # another loopback address than the neighbours'


@dataclass(frozen=True)
class Target:
    """Where the service listens; `path` begins with a slash."""

    host: str
    port: int
    path: str = "/api/chat"


def frame(opcode: int, data: bytes, *, final: bool = True, compressed: bool = False) -> bytes:
    """One masked frame, with a mask of zeros."""
    head = bytes([(0x80 if final else 0) | (0x40 if compressed else 0) | opcode])
    if len(data) < 126:
        size = bytes([0x80 | len(data)])
    elif len(data) < 65_536:
        size = bytes([0x80 | 126]) + struct.pack(">H", len(data))
    else:
        size = bytes([0x80 | 127]) + struct.pack(">Q", len(data))
    return head + size + bytes(4) + data


class Raw:
    """A connection from `source`. Raises OSError like its socket."""

    made = 0  # connections, bytes that were taken from all of them, and how long one of a crowd was kept
    taken = 0
    longest_s = 0.0

    def __init__(self, target: Target, source: str = SOURCE) -> None:
        self.target = target
        self.socket = socket.create_connection((target.host, target.port), 10, source_address=(source, 0))
        Raw.made += 1

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def request(self, *headers: str, method: str = "GET", end: bool = True) -> None:
        lines = [f"{method} {self.target.path} HTTP/1.1", f"Host: {self.target.host}", *headers]
        self.socket.sendall("\r\n".join([*lines, "", ""] if end else [*lines, ""]).encode())

    def ask_for_websocket(self, *headers: str) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        self.request(
            *("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
            *(f"Sec-WebSocket-Key: {key}", *headers),
        )

    def upgrade(self, *headers: str) -> str:
        """Asks for a WebSocket; the head of the answer."""
        self.ask_for_websocket(*headers)
        return self.head()

    def pour(self, data: bytes) -> None:
        """Sends all of `data`; waits as long as the socket's timeout for a server that does not read."""
        left = memoryview(data)
        while left:
            sent = self.socket.send(left)
            Raw.taken += sent
            left = left[sent:]

    def head(self) -> str:
        """Reads up to the end of an answer's head, byte by byte."""
        read = b""
        while not read.endswith(b"\r\n\r\n"):
            byte = self.socket.recv(1)
            if not byte:
                break
            read += byte
        return read.decode("latin-1")

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """What the server sends, until it hangs up."""
        stream = self.socket.makefile("rb")
        with contextlib.suppress(OSError):
            while len(head := stream.read(2)) == 2:
                size = head[1] & 127
                if size == 126:
                    (size,) = struct.unpack(">H", stream.read(2))
                elif size == 127:
                    (size,) = struct.unpack(">Q", stream.read(8))
                yield head[0] & 15, stream.read(size)

    def close_code(self) -> int | None:
        """The code of the server's close; None when it just hangs up."""
        for opcode, data in self.frames():
            if opcode == CLOSE:
                return int(struct.unpack(">H", data[:2])[0]) if data else 1005
        return None
