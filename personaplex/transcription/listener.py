"""One user's sound, heard as it comes and cut into pieces of speech for the transcriber.

Frames of 80 ms at 24 kHz become windows of 32 ms at 16 kHz. A window no louder than the room gets
probability 0 for nothing; the others go to Silero's network, or, where that is not installed, are judged by
their loudness. Knows no clock: times are those of the frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from personaplex.config import FRAME_SECONDS, SAMPLE_RATE, Pcm
from personaplex.transcription.cutter import Cutter, Piece, windows
from personaplex.transcription.silero import CONTEXT, RATE, WINDOW, Silero, State, windows_of

Pcm16 = npt.NDArray[np.int16]

BEFORE_S, AFTER_S = 0.25, 0.2  # of sound around a piece of speech: whispered onsets, the last consonant
SILENCE = 1e-3  # RMS nobody speaks at: -60 dBFS
FLOOR_S = 2.0  # the quietest window of the last two such spans is the room
AUDIBLE = 1.41  # times the room's RMS: 3 dB
FAINT, LOUD = 2.0, 4.0  # the same, by which speech is told without a network
LINGER_S = 0.5  # windows that are judged after an audible one
LOUD_RMS = 3e-3


@dataclass(frozen=True, eq=False)
class Speech:
    """Sound for the transcriber: int16 [samples] at 16 kHz, its first sample at `begin` seconds of the
    conversation. Somebody speaks from `start` to `end`, and in the `spoken` spans between; `waited` is how
    much was heard after `end` before this was known."""

    pcm: Pcm16 = field(repr=False)
    begin: float
    start: float
    end: float
    spoken: tuple[tuple[float, float], ...]
    waited: float = 0.0
    judged: bool = True

    @property
    def seconds(self) -> float:
        return len(self.pcm) / RATE


class Listener:
    """One session. Not thread-safe; a detector may be shared."""

    def __init__(self, silero: Silero | None) -> None:
        self._silero = silero
        self._next = -1  # number of the frame that would follow the last one
        self._restart(0)

    def hear(self, number: int, frame: Pcm) -> list[Speech]:
        """Takes frame `number` of the conversation, float32 [1920] at 24 kHz; what ended with it. Where
        numbers jump, the speech before ends, and listening begins anew."""
        ended = [] if number == self._next else self.end()
        if number != self._next:
            self._restart(number)
        self._next = number + 1
        return ended + self._take(self._resampler.resample_chunk(frame))

    def end(self) -> list[Speech]:
        """The speech that goes on, ended here."""
        tail = self._resampler.resample_chunk(np.zeros(0, np.float32), last=True)
        found = self._take(np.concatenate([tail, np.zeros(-len(tail) % WINDOW, np.float32)]))
        last = self._cutter.flush()
        if last is not None:
            found.append(self._speech(last))
        self._restart(self._next)
        return found

    def _restart(self, number: int) -> None:
        import soxr

        self._origin = number * FRAME_SECONDS
        self._resampler: Any = soxr.ResampleStream(SAMPLE_RATE, RATE, 1, dtype="float32", quality="MQ")
        self._kept: Pcm = np.zeros(CONTEXT, np.float32)  # the sound that may still be needed
        self._kept_from = -CONTEXT  # sample number of its first
        self._windows = 0  # done
        self._cutter = Cutter()
        self._room = _Room()
        self._linger = 0
        self._state: State | None = None

    def _take(self, pcm: Pcm) -> list[Speech]:
        """Takes float32 [samples] at 16 kHz."""
        self._kept = np.concatenate([self._kept, pcm])
        begin = self._windows * WINDOW - self._kept_from
        fresh = windows_of(self._kept[begin - CONTEXT :])
        found = []
        for probability in self._judge(fresh):
            self._windows += 1
            piece = self._cutter.add(probability)
            if piece is not None:
                found.append(self._speech(piece))
        self._forget()
        return found

    def _judge(self, fresh: Pcm) -> list[float]:
        """The probability of speech in each of `fresh`, float32 [n, 64 + 512]."""
        levels = [float(np.sqrt(np.dot(one[CONTEXT:], one[CONTEXT:]) / WINDOW)) for one in fresh]
        loudness = [self._room.hear(level) for level in levels]
        if self._silero is None:
            return [_guess(level, times) for level, times in zip(levels, loudness, strict=True)]
        audible = [level > SILENCE and t > AUDIBLE for level, t in zip(levels, loudness, strict=True)]
        if not any(audible) and not self._linger:
            self._state = None
            return [0.0] * len(levels)
        self._linger = windows(LINGER_S) if any(audible) else max(0, self._linger - len(levels))
        if self._state is None:
            _, self._state = self._silero.run(self._just_before(), self._silero.start())
        found, self._state = self._silero.run(fresh, self._state)
        return list(found)

    def _just_before(self) -> Pcm:
        """The windows before the next one, so that the network does not wake up within a word."""
        end = self._windows * WINDOW - self._kept_from
        count = min(windows(BEFORE_S), (end - CONTEXT) // WINDOW)
        return windows_of(self._kept[end - CONTEXT - count * WINDOW : end])

    def _forget(self) -> None:
        start = self._windows if self._cutter.start is None else self._cutter.start
        first = (start - windows(BEFORE_S) - 1) * WINDOW - CONTEXT
        if first > self._kept_from:
            self._kept = self._kept[first - self._kept_from :].copy()
            self._kept_from = first

    def _speech(self, piece: Piece) -> Speech:
        before = 0 if piece.resumed else windows(BEFORE_S)
        first = max(self._kept_from, (piece.start - before) * WINDOW, 0)
        last = piece.end * WINDOW + (0 if piece.cut else round(AFTER_S * RATE))
        sound = self._kept[first - self._kept_from : last - self._kept_from]
        return Speech(
            pcm=np.round(np.clip(sound, -1, 1) * 32767).astype(np.int16),
            begin=self._origin + first / RATE,
            start=self._at(piece.spoken[0][0]),
            end=self._at(piece.spoken[-1][1]),
            spoken=tuple((self._at(start), self._at(end)) for start, end in piece.spoken),
            judged=self._silero is not None,
            waited=(self._windows - piece.spoken[-1][1]) * WINDOW / RATE,
        )

    def _at(self, window: int) -> float:
        return self._origin + window * WINDOW / RATE


class _Room:
    """How loud it is when nobody speaks: the quietest window of the last two spans of FLOOR_S."""

    def __init__(self) -> None:
        self._before = self._least = float("inf")
        self._count = 0

    def hear(self, level: float) -> float:
        """How many times louder than the room a window of this RMS is."""
        self._least = min(self._least, level)
        floor = max(min(self._least, self._before), SILENCE / LOUD)
        self._count += 1
        if self._count >= windows(FLOOR_S):
            self._before, self._least, self._count = self._least, float("inf"), 0
        return level / floor


def _guess(level: float, times: float) -> float:
    """Speech by loudness alone: sure, maybe (which ends nothing), none."""
    if level < LOUD_RMS or times < FAINT:
        return 0.0
    return 1.0 if times >= LOUD else 0.4
