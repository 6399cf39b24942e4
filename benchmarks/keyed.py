"""Callers with keys, for `access.py`: a keys file that changes, sessions with a key, memory of a service."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import websockets

from benchmarks.dialects import speech
from deployments.processes import below
from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SECONDS
from personaplex.session.moshi import Audio, Handshake, Metadata, decode

WATCH_EVERY_S = 1.0  # a look at every process costs as much as a session's frames in that time


class Keys:
    """A keys file that changes as a Secret that Kubernetes mounts: a new folder and one rename."""

    def __init__(self, folder: Path, lines: Sequence[str]) -> None:
        self._folder, self._number = folder, 0
        self.path = folder / "keys"
        self.swap(lines)
        self.path.symlink_to("..data/keys")

    def swap(self, lines: Sequence[str]) -> None:
        """These are the keys now."""
        self._number += 1
        place = self._folder / f"..{self._number}"
        place.mkdir()
        (place / "keys").write_text("\n".join([*lines, ""]))
        (self._folder / "..tmp").symlink_to(place.name)
        os.replace(self._folder / "..tmp", self._folder / "..data")


class Memory:
    """Watches every process of the service from a thread; `grown` is the most each kind grew above idle."""

    def __init__(self, server: Sequence[int]) -> None:
        self.idle = {pid: _resident(pid) for pid in server}
        self.grown: dict[str, float] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(WATCH_EVERY_S):
            for pid in processes_of_service():
                grown = (_resident(pid) - self.idle.get(pid, 0)) / 1e6
                name = _name(pid) if pid in self.idle else "child"
                self.grown[name] = max(self.grown.get(name, 0.0), grown)


def processes_of_service() -> list[int]:
    """Everything below this process but the uploaders and multiprocessing's own."""
    found = []
    for pid in below(os.getpid()):
        with contextlib.suppress(OSError):
            if "multiprocessing" not in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
    return found


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0].rpartition("/")[2][:60]
    return "gone"


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


@dataclasses.dataclass(frozen=True)
class Pages:
    """Speech as pages of one frame, encoded once, and the header pages before them."""

    headers: list[bytes]
    pages: list[bytes]

    @classmethod
    def make(cls, seconds: float) -> Pages:
        encoder = Transcoder()
        return cls(encoder.headers(), [encoder.send(frame) for frame in speech(seconds)])


@dataclasses.dataclass
class Call:
    """What one caller met. Seconds of the monotonic clock; `foretold` in seconds, with when it was said."""

    began: float = dataclasses.field(default_factory=time.monotonic)
    queued: float = 0.0  # when it was told its place in the queue; 0.0: never
    live: float = 0.0
    settled: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)  # it is live, or over
    foretold: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    pages: list[float] = dataclasses.field(default_factory=list)


class Place:
    """The service under test."""

    def __init__(self, base: str, keys: Keys) -> None:
        self.base, self.keys = base, keys
        self.url = f"{base.replace('http', 'ws')}/api/chat?status=1"

    async def call(
        self, key: str, seconds: float, stream: Pages | None = None, call: Call | None = None
    ) -> Call:
        """One session: waits for its turn, then holds its slot for so long, talking if it has a stream. What
        it meets is in `call` at once. Raises what websockets raises when it is refused."""
        call = call or Call()
        try:
            return await self._call(key, seconds, stream, call)
        finally:
            call.settled.set()

    async def _call(self, key: str, seconds: float, stream: Pages | None, call: Call) -> Call:

        async def listen(socket: Any) -> None:
            async for message in socket:
                match decode(message):
                    case Handshake():
                        call.live = time.monotonic()
                        call.settled.set()
                    case Metadata(data) if data.get("type") == "queue":
                        call.queued = call.queued or time.monotonic()
                        if "wait_s" in data:
                            call.foretold.append((time.monotonic(), float(data["wait_s"])))
                    case Audio():
                        call.pages.append(time.monotonic())

        async with websockets.connect(
            self.url, additional_headers={"X-API-Key": key}, max_size=None, compression=None, open_timeout=30
        ) as socket:
            listening = asyncio.ensure_future(listen(socket))
            try:
                if stream is not None:
                    for page in stream.headers:
                        await socket.send(b"\x01" + page)
                listening.add_done_callback(lambda _: call.settled.set())
                await call.settled.wait()
                if not call.live:
                    raise ConnectionError("it ended before it was live")
                due, until = time.monotonic(), time.monotonic() + seconds
                while due < until:
                    if stream is not None:
                        number = round((due - until + seconds) / FRAME_SECONDS) % len(stream.pages)
                        await socket.send(b"\x01" + stream.pages[number])
                    due += FRAME_SECONDS
                    await asyncio.sleep(due - time.monotonic())
            finally:
                listening.cancel()
        return call


def gap(call: Call, since: float, until: float) -> float:
    """The longest silence between two pages of that time; infinite where there were none."""
    times = [at for at in call.pages if since <= at <= until]
    return float(np.max(np.diff(times))) if len(times) > 1 else float("inf")
