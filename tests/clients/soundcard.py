"""A stand-in for the module `sounddevice`, and how like two recordings are.

Runs in every client's environment: needs numpy alone.
"""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE = 24_000
FRAME_SIZE = 1_920
FRAME_SECONDS = 0.08

Pcm = NDArray[np.float32]


class SoundCard:
    """`module` takes the place of `sounddevice`: `pcm` is what its microphone hears; keeps what is played."""

    def __init__(self, pcm: Pcm) -> None:
        self.played: list[Pcm] = []
        self.module: Any = types.ModuleType("sounddevice")
        frames = iter(pcm.reshape(-1, FRAME_SIZE, 1))

        def microphone(callback: Callable[..., None]) -> None:
            callback(next(frames, np.zeros((FRAME_SIZE, 1), np.float32)), FRAME_SIZE, None, None)

        def speaker(callback: Callable[..., None]) -> None:
            out = np.zeros((FRAME_SIZE, 1), np.float32)
            callback(out, FRAME_SIZE, None, None)
            self.played.append(out[:, 0])

        self.module.InputStream = lambda callback, **_: Stream(lambda: microphone(callback))
        self.module.OutputStream = lambda callback, **_: Stream(lambda: speaker(callback))


class Stream:
    """A device that calls back every 80 ms, on a thread of its own, as PortAudio does."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call, self._stop = call, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Stream:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.wait(max(0.0, due - time.monotonic())):
            self._call()
            due += FRAME_SECONDS


def likeness(said: Pcm, heard: Pcm) -> float:
    """Largest normalised correlation of a second from the middle of `said` with any place in `heard`."""
    middle = len(said) // 2
    piece = said[middle - SAMPLE_RATE // 2 :][:SAMPLE_RATE]
    size = 1 << (len(heard) + len(piece)).bit_length()
    products = np.fft.irfft(np.fft.rfft(heard, size) * np.conj(np.fft.rfft(piece, size)), size)[: len(heard)]
    energy = np.concatenate(([0.0], np.cumsum(np.square(heard, dtype=np.float64))))
    starts = np.arange(len(heard))
    power = np.sqrt(energy[np.minimum(starts + len(piece), len(heard))] - energy[starts])
    return float(np.max(products / (np.linalg.norm(piece) * np.maximum(power, 1e-3))))
