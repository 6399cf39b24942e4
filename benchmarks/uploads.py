"""Recordings that mean harm, sent to `POST /api/voices` by a process of its own. See `access.py`.

Each body is one that a lazy reader would choke on. Whatever comes of it is counted by status, and by what
became of the connection where there was no answer.
"""

from __future__ import annotations

import http.client
import io
import itertools
import os
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection

import numpy as np
import soundfile

PATH = "/api/voices?consent=1"
RATE = 24_000
SAID = {400, 401, 403, 413, 415, 422, 429, 503}  # a refusal that has a type
PIECE = bytes(65_536)
ENDLESS_S = 3.0
TIMEOUT_S = 15.0


def riff(channels: int, rate: int, claimed: int, data: bytes) -> bytes:
    """A WAV file of 16 bits whose header claims so many bytes of sound."""
    block = 2 * channels
    fmt = struct.pack("<HHIIHH", 1, channels, rate, rate * block & 0xFFFFFFFF, block & 0xFFFF, 16)
    head = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", claimed)
    return b"RIFF" + struct.pack("<I", (len(head) + claimed) & 0xFFFFFFFF) + head + data


def expanding() -> bytes:
    """An hour of silence, which FLAC packs into next to nothing."""
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", RATE, 1, format="FLAC") as sound:
        for _ in range(60):
            sound.write(np.zeros(60 * RATE, np.float32))
    return file.getvalue()


def endless_samples() -> bytes:
    """A second of sound whose header, of Sony Wave64, claims 2**36 samples."""
    file = io.BytesIO()
    dice = np.random.default_rng(0)
    soundfile.write(file, 0.1 * dice.standard_normal(RATE), RATE, format="W64", subtype="PCM_16")
    data = bytearray(file.getvalue())
    at = data.index(b"data", 40) + 16
    data[at : at + 8] = struct.pack("<Q", 24 + 2 * 2**36)
    return bytes(data)


def bodies() -> dict[str, bytes | None]:
    """By name; None is a body without an end."""
    noise = np.random.default_rng(1).bytes(200_000)
    return {
        "an hour of silence": expanding(),
        "2^36 samples": endless_samples(),
        "1 Hz": riff(1, 1, 200_000, noise),
        "64 channels": riff(64, RATE, 640_000, bytes(640_000)),
        "wrong magic": noise,
        "zip": b"PK\x03\x04" + noise,
        "empty": b"",
        "too large": bytes(2_000_001),
        "endless": None,
    }


class Sender:
    """Sends the bodies that were `made` in turn, each with the next of `keys`, from `threads` threads."""

    def __init__(
        self, host: str, port: int, keys: Sequence[str], threads: int, made: Mapping[str, bytes | None]
    ) -> None:
        self._host, self._port, self._threads = host, port, threads
        self._keys, self._bodies = itertools.cycle(keys), itertools.cycle(made.items())
        self._lock = threading.Lock()
        self._left = 0
        self.answers: dict[str, Counter[str]] = {}

    def send(self, count: int, seconds: float) -> int:
        """At most so many, for at most so long; how many were answered or cut off."""
        self._left, until = count, time.monotonic() + seconds
        threads = [threading.Thread(target=self._work, args=(until,)) for _ in range(self._threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return count - self._left

    def _work(self, until: float) -> None:
        while time.monotonic() < until:
            with self._lock:
                if not self._left:
                    return
                self._left -= 1
                key, (name, body) = next(self._keys), next(self._bodies)
            came = self._one(key, body)
            with self._lock:
                self.answers.setdefault(name, Counter())[came] += 1

    def _one(self, key: str, body: bytes | None) -> str:
        """The status, or what became of the connection."""
        connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
        try:
            chunked = body is None
            data: bytes | Iterator[bytes] = _endless() if body is None else body
            connection.request("POST", PATH, data, {"X-API-Key": key}, encode_chunked=chunked)
            return str(connection.getresponse().status)
        except (OSError, http.client.HTTPException) as error:
            return _answered(connection) or type(error).__name__
        finally:
            connection.close()


def _answered(connection: http.client.HTTPConnection) -> str:
    """The status that came while the body was still being sent, if one did."""
    try:
        head = connection.sock.recv(64).split()
        return head[1].decode() if len(head) > 1 and head[0].startswith(b"HTTP/") else ""
    except (AttributeError, OSError):
        return ""


def _endless() -> Iterator[bytes]:
    """For ENDLESS_S: a service that had not cut it off by then would have taken gigabytes."""
    until = time.monotonic() + ENDLESS_S
    while time.monotonic() < until:
        yield PIECE


def process(pipe: Connection, host: str, port: int, keys: Sequence[str], threads: int) -> None:
    """A process that sends as often as it is told `(count, seconds)`, and answers with what it met."""
    made = bodies()
    os.nice(10)  # its work is not the neighbour's
    while (told := pipe.recv()) is not None:
        sender = Sender(host, port, keys, threads, made)
        began, cpu = time.monotonic(), time.process_time()
        sent = sender.send(*told)
        found = {name: dict(counter) for name, counter in sorted(sender.answers.items())}
        seconds = time.monotonic() - began
        pipe.send({"sent": sent, "seconds": seconds, "sender_core": (time.process_time() - cpu) / seconds,
                   "answers": found})  # fmt: skip


def untyped(answers: dict[str, dict[str, int]]) -> dict[str, int]:
    """What was neither a typed refusal nor, for a body that may be good sound, a voice, by body and answer.

    A connection that is cut while a body that never ends, or is too large, is still being sent is a refusal.
    """
    fine: Callable[[str, str], bool] = lambda name, came: (  # noqa: E731
        came in map(str, SAID)
        or (came == "200" and name == "2^36 samples")
        or (name in ("endless", "too large") and came in ("BrokenPipeError", "ConnectionResetError"))
    )
    return {
        f"{name}: {came}": count
        for name, each in answers.items()
        for came, count in each.items()
        if not fine(name, came)
    }
