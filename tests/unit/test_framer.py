"""Frames of 80 ms from pieces of any length."""

from __future__ import annotations

import numpy as np
import pytest

from personaplex.audio.framer import Framer


@pytest.mark.parametrize("piece", [1, 7, 480, 1_919, 1_920, 1_921, 10_000])
def test_pieces_of_any_length(piece: int) -> None:
    pcm = np.arange(10_000, dtype=np.float32)
    framer, frames = Framer(), []
    for start in range(0, len(pcm), piece):
        framer.push(pcm[start : start + piece])
        while (frame := framer.pop()) is not None:
            frames.append(frame)
    assert len(frames) == 5
    assert np.array_equal(np.concatenate(frames), pcm[:9_600])
    rest = framer.flush()
    assert rest is not None
    assert np.array_equal(rest[:400], pcm[9_600:])
    assert not rest[400:].any()
    assert framer.flush() is None


def test_frames_are_the_callers_own() -> None:
    framer, pcm = Framer(), np.ones(1_920, np.float32)
    framer.push(pcm)
    pcm[:] = 0
    first = framer.pop()
    assert first is not None
    framer.push(np.zeros(1_920, np.float32))
    assert first.all()


def test_nothing_from_nothing() -> None:
    framer = Framer()
    framer.push(np.zeros(0, np.float32))
    assert framer.pop() is None
    assert framer.flush() is None
