"""Recordings of voices as clients upload them: read in processes of their own, a few at a time.

A gateway never decodes what a stranger sends. `Recordings.read` gives the bytes to a child with limits
(personaplex/audio/voiceprocess.py) and takes back samples; at most WORKERS children run and QUEUE uploads
wait. The process that forks the children is started by the first upload, takes no key of ours with it and
ends with the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from personaplex.config import SAMPLE_RATE, Pcm
from personaplex.errors import BadAudio, NoCapacity

LONGEST_S = 30.0
UPLOAD_LIMIT = 2_000_000  # bytes
SAMPLE_LIMIT = 2**24  # of all channels: 64 MiB; 30 s at 192 kHz, stereo, are 11.5 million
WORKERS, QUEUE = 2, 8
START_S = 60.0  # for the libraries
TIMEOUT_S = 25.0  # a little more than a child gives itself
RETRY_S = 5.0
_READY = b"ready"
_AWAY = "recordings cannot be read now"
_TOO_MUCH = "the recording is damaged, or too much work to read"


@dataclass(frozen=True, eq=False)
class Recording:
    """`pcm` float32 [samples] at 24 kHz, normalised; `loudness` in LUFS before; `problems` for the answer."""

    pcm: Pcm
    loudness: float
    problems: list[dict[str, str]]

    @property
    def seconds(self) -> float:
        return len(self.pcm) / SAMPLE_RATE


class Recordings:
    """One gateway's."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(WORKERS, "recordings")
        self._jobs: set[Future[Recording]] = set()
        self._reader = Reader()

    async def read(self, data: bytes) -> Recording:
        """Raises BadAudio for a recording that cannot be used, NoCapacity while too many wait."""
        self._jobs = {job for job in self._jobs if not job.done()}
        if len(self._jobs) >= WORKERS + QUEUE:
            raise NoCapacity("too many recordings are being read", RETRY_S)
        job = self._pool.submit(self._reader.read, data)
        self._jobs.add(job)
        return await asyncio.wrap_future(job)

    def close(self) -> None:
        self._reader.close()


class Reader:
    """The process that forks children; its methods wait and are for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def read(self, data: bytes) -> Recording:
        """What a child makes of a recording. Raises BadAudio, NoCapacity when no child can be had."""
        for _ in range(2):
            result = self._ask(data)
            if result is not None:
                return _unpack(result)
        raise NoCapacity(_AWAY, RETRY_S)

    def _ask(self, data: bytes) -> bytes | None:
        """A child's result; None where no child began, because the process was ended by somebody."""
        with _memory() as source, _memory() as sink:
            source.write(data)
            source.flush()
            source.seek(0)
            ended, alive = os.pipe()
            try:
                try:
                    self._send([source.fileno(), sink.fileno(), alive])
                finally:
                    os.close(alive)
                begun, until = False, time.monotonic() + TIMEOUT_S
                while select.select([ended], [], [], max(0.0, until - time.monotonic()))[0]:
                    if not os.read(ended, 1):  # the child's end
                        break
                    begun = True
                else:
                    raise BadAudio(_TOO_MUCH)
            finally:
                os.close(ended)
            sink.seek(0)
            return sink.read() if begun else None

    def close(self) -> None:
        """Ends the process. Idempotent; children end by their own limits."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None
            if self._process is not None:
                self._process.kill()
                self._process.wait()
                self._process = None

    def _send(self, descriptors: list[int]) -> None:
        with self._lock:
            for _ in range(2):
                try:
                    if self._socket is None:
                        self._start()
                    assert self._socket is not None
                    socket.send_fds(self._socket, [b"j"], descriptors)
                    return
                except OSError:  # it was ended by somebody
                    self._forget()
            raise NoCapacity(_AWAY, RETRY_S)

    def _start(self) -> None:
        here, there = socket.socketpair()
        command = [sys.executable, "-m", "personaplex.audio.voiceprocess", f"{LONGEST_S}", f"{SAMPLE_LIMIT}"]
        with there:
            self._process = subprocess.Popen(
                command,
                stdin=there.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
            )
        self._socket = here
        deadline, said = time.monotonic() + START_S, b""
        while said != _READY:
            here.settimeout(max(0.01, deadline - time.monotonic()))
            more = here.recv(len(_READY) - len(said))
            if not more:
                raise OSError("it ended at once")
            said += more
        here.settimeout(TIMEOUT_S)

    def _forget(self) -> None:
        with contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.close()
        self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None


def _unpack(result: bytes) -> Recording:
    line, _, samples = result.partition(b"\n")
    try:
        head = json.loads(line)
    except ValueError as error:
        raise BadAudio(_TOO_MUCH) from error
    if "error" in head:
        raise BadAudio(head["error"])
    if len(samples) != 4 * head["samples"]:
        raise BadAudio(_TOO_MUCH)
    return Recording(np.frombuffer(samples, "<f4").astype(np.float32), head["loudness"], head["problems"])


def _memory() -> Any:
    """A file without a name, in memory where the system can: a voice is not to be left on a disk."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("recording"), "w+b")
    return tempfile.TemporaryFile()


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, sys.path))
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": os.environ.get("PATH", os.defpath), "PYTHONPATH": path, "LANG": "C.UTF-8", **threads}
