"""Where somebody speaks: Silero's detector by onnxruntime and numpy, without its package and without torch.

The model file comes with the `silero-vad` package (extra `evaluate`); the package itself is never imported,
which would load torch. Segments equal those of its `get_speech_timestamps` with default settings.
On synthetic speech onsets are found -0.04 to +0.06 s from the truth, offsets -0.01 to +0.14 s: stop latencies
read about 0.1 s long, gaps up to 0.1 s short.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from personaplex.audio.wav import resample
from personaplex.config import Pcm
from personaplex.errors import ConfigError
from personaplex.evaluation.speech import Span
from personaplex.transcription.silero import CONTEXT, RATE, SILERO_VAD, WINDOW, Silero, find, windows_of

ENTER, LEAVE = 0.5, 0.35  # probabilities at which speech begins and ends
SHORTEST_SPEECH = RATE * 250 // 1_000
SHORTEST_SILENCE = RATE * 100 // 1_000
PAD = RATE * 30 // 1_000
_MISSING = "detecting speech needs: pip install 'personaplex-serve[evaluate]'"


class Detector:
    """One loaded model; keeps nothing between recordings."""

    def __init__(self) -> None:
        """Raises ConfigError when the extra `evaluate` is not installed."""
        self._silero = Silero(model_file(), _MISSING)

    def segments(self, pcm: Pcm, rate: int) -> list[Span]:
        """Speech in float32 [samples] at `rate` Hz, in seconds."""
        mono = resample(pcm, rate, RATE)
        return segments(self.probabilities(mono), len(mono))

    def probabilities(self, pcm: Pcm) -> npt.NDArray[np.float32]:
        """Of speech in each 512 samples at 16 kHz, the last ones filled with zeros; float32 [windows]."""
        count = -(-len(pcm) // WINDOW)
        padded = np.zeros(CONTEXT + count * WINDOW, np.float32)
        padded[CONTEXT : CONTEXT + len(pcm)] = pcm
        found, _ = self._silero.run(windows_of(padded), self._silero.start())
        return np.array(found, np.float32)


def model_file() -> Path:
    """The model inside the installed `silero-vad`. Raises ConfigError when it is not there."""
    path = find(SILERO_VAD)
    if path is None:
        raise ConfigError(_MISSING)
    return path


def segments(probabilities: Sequence[float] | npt.NDArray[np.float32], samples: int) -> list[Span]:
    """Probabilities of windows of 512 samples at 16 kHz to speech in seconds, of `samples` samples in all."""
    return [Span(start / RATE, end / RATE) for start, end in _padded(_raw(probabilities, samples), samples)]


def _raw(probabilities: Sequence[float] | npt.NDArray[np.float32], samples: int) -> list[tuple[int, int]]:
    """Speech begins at ENTER and ends where LEAVE was last crossed, after a silence of SHORTEST_SILENCE."""
    found: list[tuple[int, int]] = []
    start: int | None = None
    quiet: int | None = None  # since when the probability has been below LEAVE, or between the two
    for number, probability in enumerate(probabilities):
        now = number * WINDOW
        if probability >= ENTER:
            quiet = None
            start = now if start is None else start
        elif probability < LEAVE and start is not None:
            quiet = now if quiet is None else quiet
            if now - quiet >= SHORTEST_SILENCE:
                if quiet - start > SHORTEST_SPEECH:
                    found.append((start, quiet))
                start = quiet = None
    if start is not None and samples - start > SHORTEST_SPEECH:
        found.append((start, samples))
    return found


def _padded(found: list[tuple[int, int]], samples: int) -> list[tuple[int, int]]:
    """Each widened by PAD at both ends; two that would meet share the silence between them."""
    bounds = [list(one) for one in found]
    if bounds:
        bounds[0][0] = max(0, bounds[0][0] - PAD)
        bounds[-1][1] = min(samples, bounds[-1][1] + PAD)
    for one, after in pairwise(bounds):
        silence = after[0] - one[1]
        extra = silence // 2 if silence < 2 * PAD else PAD
        one[1] += extra
        after[0] -= extra
    return [(start, end) for start, end in bounds]
