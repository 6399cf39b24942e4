"""Cuts a stream of samples, in pieces of any length, into frames of 80 ms."""

from __future__ import annotations

from collections import deque

import numpy as np

from personaplex.config import FRAME_SIZE, Pcm


class Framer:
    """Collects samples and gives them back 1920 at a time."""

    def __init__(self) -> None:
        self._frame: Pcm = np.zeros(FRAME_SIZE, np.float32)
        self._filled = 0
        self._ready: deque[Pcm] = deque()

    def push(self, pcm: Pcm) -> None:
        """Takes a copy of float32 [samples]."""
        start = 0
        while start < len(pcm):
            count = min(len(pcm) - start, FRAME_SIZE - self._filled)
            self._frame[self._filled : self._filled + count] = pcm[start : start + count]
            self._filled += count
            start += count
            if self._filled == FRAME_SIZE:
                self._ready.append(self._frame)
                self._frame, self._filled = np.zeros(FRAME_SIZE, np.float32), 0

    def pop(self) -> Pcm | None:
        """The oldest whole frame, float32 [1920], or None. The caller owns it."""
        return self._ready.popleft() if self._ready else None

    def flush(self) -> Pcm | None:
        """The begun frame with zeros to its end, or None when none is begun. Pop whole frames first."""
        assert not self._ready, "flush before every whole frame was popped"
        if not self._filled:
            return None
        frame = self._frame
        self._frame, self._filled = np.zeros(FRAME_SIZE, np.float32), 0
        return frame
