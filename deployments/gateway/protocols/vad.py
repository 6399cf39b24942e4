"""When a client speaks, by the energy of its audio over an adaptive floor. Counts time in samples.

For clients that want to be told, never for the model, which hears everything. Speech begins with START_FRAMES
active frames in a row and ends after a given time without one. The floor follows quiet frames down at once
and noise up slowly, so that a fan is no speech after some seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from personaplex.audio.g711 import Samples
from personaplex.config import FRAME_SECONDS

START_FRAMES = 3
LEAST_DBFS = -50.0  # what is quieter is no speech, whatever the floor
OVER_FLOOR_DB = 9.0
FLOOR_DBFS = -90.0  # digital silence
RISE_DB = 0.25  # of the floor, a frame
_FRAME_MS = round(1_000 * FRAME_SECONDS)


@dataclass(frozen=True)
class Started:
    """Speech began `at_ms` after the first audio."""

    at_ms: int


@dataclass(frozen=True)
class Stopped:
    """Speech ended `at_ms` after the first audio."""

    at_ms: int


def level_dbfs(samples: Samples) -> float:
    """Of int16 [samples], not empty; -200 for silence."""
    pcm = samples.astype(np.float32)
    return 10 * float(np.log10(np.dot(pcm, pcm) / len(pcm) / 2**30 + 1e-20))


class SpeechDetector:
    """One client's audio, frame by frame."""

    def __init__(self, silence_ms: int) -> None:
        self.silence_ms = silence_ms
        self.speaking = False
        self._frames = 0
        self._active = 0  # in a row
        self._quiet = 0  # in a row
        self._floor = LEAST_DBFS - OVER_FLOOR_DB

    def push(self, level: float) -> Started | Stopped | None:
        """Takes one frame's level in dBFS; what began or ended with it."""
        active = level > max(LEAST_DBFS, self._floor + OVER_FLOOR_DB)
        self._floor = max(FLOOR_DBFS, min(level, self._floor + RISE_DB))
        self._frames += 1
        self._active = self._active + 1 if active else 0
        self._quiet = 0 if active else self._quiet + 1
        if not self.speaking and self._active >= START_FRAMES:
            self.speaking = True
            return Started((self._frames - self._active) * _FRAME_MS)
        if self.speaking and self._quiet * _FRAME_MS >= self.silence_ms:
            return self.stop()
        return None

    def stop(self) -> Stopped | None:
        """Ends speech where the last active frame ended; None when there is none."""
        if not self.speaking:
            return None
        self.speaking = False
        return Stopped((self._frames - self._quiet) * _FRAME_MS)
