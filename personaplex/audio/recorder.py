"""What a listener heard, laid on a time line that begins with their own first word."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from personaplex.config import FRAME_SIZE, SAMPLE_RATE, Pcm


class Recorder:
    """Collects heard audio where a player without a buffer would have played it.

    The first piece stands exactly where it was heard. A later one follows its predecessor unless it came more
    than a frame too late: then there is silence between them, counted in `underruns`.
    """

    def __init__(self, start: float) -> None:
        """`start` is the moment, in seconds of the caller's clock, of sample 0."""
        self.underruns = 0
        self._start = start
        self._pieces: list[Pcm] = []
        self._samples = 0

    def add(self, pcm: Pcm, now: float) -> None:
        """Takes float32 [samples], heard at `now`. The array is kept, not copied."""
        late = round((now - self._start) * SAMPLE_RATE) - self._samples
        if late > (FRAME_SIZE if self._pieces else 0):
            self.underruns += bool(self._pieces)
            self._append(np.zeros(late, np.float32))
        self._append(pcm)

    def pcm(self, samples: int = 0) -> Pcm:
        """Everything heard, float32 [n], with silence behind it to at least `samples`."""
        missing = max(0, samples - self._samples)
        return np.concatenate([*self._pieces, np.zeros(missing, np.float32)])

    def _append(self, pcm: Pcm) -> None:
        self._pieces.append(pcm)
        self._samples += len(pcm)


@dataclass(frozen=True)
class Rhythm:
    """Times between pieces of audio, in milliseconds."""

    p50_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, arrivals: list[float]) -> Rhythm | None:
        """From moments in seconds; None when there are fewer than two."""
        gaps = sorted(1e3 * np.diff(arrivals))
        if not gaps:
            return None
        return cls(
            p50_ms=float(gaps[math.ceil(0.50 * len(gaps)) - 1]),
            p99_ms=float(gaps[math.ceil(0.99 * len(gaps)) - 1]),
            max_ms=float(gaps[-1]),
        )
