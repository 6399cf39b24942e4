"""Clients that mean harm, over raw sockets, since libraries would not send such things.

The attacks are plain functions over a host, a port and a path; each returns when it was refused, when it ran
out of things to send, or at `until` (seconds of the monotonic clock). None of them shows a key. FLOODS say
too much, CROWDS say nothing, CUTS begin and leave.
"""

from __future__ import annotations

import contextlib
import json
import random
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rawsocket import BINARY, CONT, PING, Raw, Target, frame

CROWD = 500  # connections of one that wants nothing
AGAIN_S = 0.5  # between two bytes of a slow request, and before a connection that was closed is opened again
PATIENCE_S = 15.0  # for a crowd's last connections to be closed


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


def half_open(target: Target, until: float) -> None:
    """Connections that say nothing."""
    _crowd(target, until, b"", b"")


def slow_headers(target: Target, until: float) -> None:
    """Requests whose head comes byte by byte."""
    head = f"GET {target.path} HTTP/1.1\r\nHost: x\r\nX-Slow: ".encode()
    _crowd(target, until, head, b"a")


def cut_upgrades(target: Target, until: float) -> None:
    """Upgrades, one after the other, cut at any moment of the way, half of them by a reset."""
    draw = random.Random(1)
    while time.monotonic() < until:
        with contextlib.suppress(OSError), Raw(target) as raw:
            raw.ask_for_websocket()
            time.sleep(draw.random() * 0.02)
            if draw.random() < 0.5:
                linger = struct.pack("ii", 1, 0)
                raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


Attack = Callable[[Target, float], None]
FLOODS: tuple[Attack, ...] = (
    *(deflate_bomb, big_messages, small_frames, empty_fragments, pings, large_audio),
    *(endless_header, endless_body, pipeline),
)
CROWDS: tuple[Attack, ...] = (half_open, slow_headers)
CUTS: tuple[Attack, ...] = (cut_upgrades,)


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
        thread.join(seconds + PATIENCE_S + 5)


def _crowd(target: Target, until: float, first: bytes, then: bytes) -> None:
    """CROWD connections that say `first` and then `then`, over and over; one that is closed is opened anew
    while the time lasts. Ends when all of them were closed, or PATIENCE_S after that."""
    waiting = selectors.DefaultSelector()
    due = time.monotonic()
    while (now := time.monotonic()) < until or (waiting.get_map() and now < until + PATIENCE_S):
        if now >= due:
            due = now + AGAIN_S
            for key in list(waiting.get_map().values()):
                with contextlib.suppress(OSError):
                    key.fileobj.send(then)  # type: ignore[union-attr]
            for _ in range(CROWD - len(waiting.get_map()) if now < until else 0):
                one = Raw(target).socket
                one.sendall(first)
                one.setblocking(False)
                waiting.register(one, selectors.EVENT_READ, time.monotonic())
        for key, _ in waiting.select(0.05):
            if _gone(key.fileobj):
                waiting.unregister(key.fileobj)
                Raw.longest_s = max(Raw.longest_s, time.monotonic() - key.data)
    if waiting.get_map():
        Raw.longest_s = float("inf")


def _gone(one: Any) -> bool:
    """Whether the other side has closed this connection; then it is closed here too."""
    try:
        if one.recv(65_536):
            return False
    except BlockingIOError:
        return False
    except OSError:
        pass
    one.close()
    return True


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


@contextlib.contextmanager
def attackers(
    attacks: Sequence[Attack], target: Target, connections: int, seconds: float
) -> Iterator[tuple[Callable[[], None], Callable[[], dict[str, float]]]]:
    """Attackers in a process of their own, so that their work is not the neighbours': what lets them loose,
    and what waits for their own count. Floods have the lowest priority; the others work little."""
    niceness = "19" if set(attacks) & set(FLOODS) else "0"
    names = ",".join(attack.__name__ for attack in attacks)
    arguments = [names, target.host, str(target.port), target.path, str(connections), str(seconds)]
    with subprocess.Popen(
        ["nice", "-n", niceness, sys.executable, __file__, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"

        def start() -> None:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

        def report() -> dict[str, float]:
            assert process.stdout is not None
            return dict(json.loads(process.stdout.readline()))

        try:
            yield start, report
        finally:
            process.kill()


def _main() -> None:
    names, host, port, path, connections, seconds = sys.argv[1:]
    chosen = [attack for attack in (*FLOODS, *CROWDS, *CUTS) if attack.__name__ in names.split(",")]
    print("ready", flush=True)
    sys.stdin.readline()
    assault(chosen, Target(host, int(port), path), int(connections), float(seconds))
    counts = {"connections": Raw.made, "mb_taken": Raw.taken / 1e6, "kept_s": Raw.longest_s}
    print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    _main()
