"""A stream of samples from one rate to another, with a delay of 2 ms.

A polyphase FIR filter: a Kaiser window (beta 6) over a low-pass whose length is 4 ms, so that its delay is
half of that at any pair of rates. Its edge lies at 0.925 of the lower rate's half: -0.5 dB at 3.4 kHz between
8 and 24 kHz, -65 dB from 4.4 kHz. Filters with a sharper edge hold telephone audio back for 40 ms and more.

The output is the same however the stream is cut.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from personaplex.config import Pcm

DELAY_S = 0.002
_EDGE = 0.4625  # of the lower rate
_BETA = 6.0


class Resampler:
    """One stream, float32; `rate_in` and `rate_out` in Hz."""

    def __init__(self, rate_in: int, rate_out: int) -> None:
        divisor = math.gcd(rate_in, rate_out)
        self._up, self._down = rate_out // divisor, rate_in // divisor
        self._phases = _phases(rate_in, rate_out)
        self._length = self._phases.shape[1]
        self._kept: Pcm = np.zeros(self._length - 1, np.float32)  # input that later outputs still need
        self._next = 0  # of the next output: its place in the stream raised to rate_in * up, from `_kept` on

    def push(self, pcm: Pcm) -> Pcm:
        """The output that float32 [samples] completes: on average samples * rate_out / rate_in."""
        if self._up == self._down:
            return pcm
        data = np.concatenate((self._kept, pcm))
        end = len(pcm) * self._up  # outputs before this place are complete
        count = max(0, -(-(end - self._next) // self._down))
        output = np.empty(count, np.float32)
        if count:
            windows = np.lib.stride_tricks.sliding_window_view(data, self._length)
            # Outputs that are `up` apart share a phase and are `down` inputs apart.
            for first in range(min(self._up, count)):
                start, phase = divmod(self._next + first * self._down, self._up)
                some = output[first :: self._up]
                some[:] = windows[start :: self._down][: len(some)] @ self._phases[phase]
        self._next += count * self._down - end
        self._kept = data[len(data) - self._length + 1 :].copy()
        return output


@cache
def _phases(rate_in: int, rate_out: int) -> Pcm:
    """float32 [up, taps]: for each phase of the output the taps, oldest input first."""
    divisor = math.gcd(rate_in, rate_out)
    up = rate_out // divisor
    common = rate_in * up
    half = round(DELAY_S * common)
    places = np.arange(-half, half + 1)
    edge = _EDGE * min(rate_in, rate_out) / common  # cycles per sample
    taps = np.sinc(2 * edge * places) * np.kaiser(len(places), _BETA)
    taps *= up / taps.sum()
    length = -(-len(taps) // up)
    padded = np.zeros(length * up)
    padded[: len(taps)] = taps
    return np.ascontiguousarray(padded.reshape(length, up).T[:, ::-1], np.float32)
