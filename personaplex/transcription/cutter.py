"""Where to cut a stream into pieces of speech, from one probability a window. Pure: no sound, no clock.

Speech begins at ENTER and ends END_S after it last was LEAVE or more, so that a comma does not end a
sentence. What goes on for LONGEST_S is cut at its least likely window of the last CUT_S: at a breath, if
there is one.
"""

from __future__ import annotations

from dataclasses import dataclass

from personaplex.transcription.silero import RATE, WINDOW

WINDOWS_PER_S = RATE / WINDOW
ENTER, LEAVE = 0.5, 0.35
END_S = 0.6
LONGEST_S = 15.0
CUT_S = 7.0
LEAST_S = 0.15  # of windows at ENTER or more: what has fewer is a click


def windows(seconds: float) -> int:
    return round(seconds * WINDOWS_PER_S)


@dataclass(frozen=True)
class Piece:
    """Windows `start` to `end` (excluded). `spoken` are the runs of windows in it at LEAVE or more.
    `resumed`: it goes on, without a pause, from the piece before; `cut`: so does the next from this one."""

    start: int
    end: int
    spoken: tuple[tuple[int, int], ...]
    resumed: bool = False
    cut: bool = False


class Cutter:
    """One stream. Windows are counted from 0."""

    def __init__(self) -> None:
        self._now = 0
        self._start: int | None = None
        self._row: list[float] = []  # probabilities since `_start`
        self._resumed = False

    @property
    def start(self) -> int | None:
        """The first window of the speech that goes on; None in a pause."""
        return self._start

    def add(self, probability: float) -> Piece | None:
        """Takes the next window; the piece that it ends, if there is one."""
        now, self._now = self._now, self._now + 1
        if self._start is None:
            if probability < ENTER:
                return None
            self._start = now
        self._row.append(probability)
        if len(self._row) >= windows(LONGEST_S):
            return self._cut()
        quiet = windows(END_S)
        if len(self._row) > quiet and max(self._row[-quiet:]) < LEAVE:
            return self._end()
        return None

    def flush(self) -> Piece | None:
        """The speech that goes on, ended here."""
        return None if self._start is None else self._end()

    def _end(self) -> Piece | None:
        assert self._start is not None
        piece = piece_of(self._start, self._row, self._resumed, cut=False)
        self._start, self._row, self._resumed = None, [], False
        return piece

    def _cut(self) -> Piece | None:
        assert self._start is not None
        tail = self._row[-windows(CUT_S) :]
        place = len(self._row) - len(tail) + min(range(len(tail)), key=lambda i: (tail[i], -i))
        piece = piece_of(self._start, self._row[:place], self._resumed, cut=True)
        self._start, self._row, self._resumed = self._start + place, self._row[place:], True
        return piece


def piece_of(start: int, row: list[float], resumed: bool = False, cut: bool = False) -> Piece | None:
    """The piece that probabilities from window `start` on make; None where hardly anything was speech."""
    runs: list[tuple[int, int]] = []
    for number, probability in enumerate(row, start):
        if probability < LEAVE:
            continue
        if runs and runs[-1][1] == number:
            runs[-1] = (runs[-1][0], number + 1)
        else:
            runs.append((number, number + 1))
    if sum(probability >= ENTER for probability in row) < windows(LEAST_S):
        return None
    return Piece(start, start + len(row) if cut else runs[-1][1], tuple(runs), resumed, cut)
