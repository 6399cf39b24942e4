"""The agent's codes: what a locked frame is made of, said in eight small numbers.

Levels 0 to 3 are the phones in the frame's four quarters, 4 the phone that begins the next frame, 5 the
periods in the frame (a pitch of 12.5 Hz each), 6 its loudness, 7 the voice. Words begin at a frame's first
sample, so that a word has the same codes wherever it stands, whatever the voice says but the pitch and the
voice itself. A frame of silence has code SILENCE on every level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personaplex.config import FRAME_SECONDS, FRAME_SIZE, SAMPLE_RATE
from personaplex.training.synth import (
    HOP,
    LABEL_RATE,
    LOCK_HOP,
    LOWEST_PERIODS,
    Array,
    Spoken,
    Voice,
    periods_of,
)

CODES = 64  # of a level
SILENCE = CODES
QUARTERS = 4
NEXT, PERIODS, LOUDNESS, VOICE = 4, 5, 6, 7  # levels behind the phones'
ALPHABET = "AIOWYSTabdefhijklmnpstuvwzæðŋɐɑɔəɛɜɡɪɹʃʊʌʒʤʧθᵊᵻ"  # phone n + 1 is ALPHABET[n]; 0: none  # noqa: RUF001
_STEP, _STEPS = 3.0, 20  # dB of a loudness code, and how many there are
_MEAN, _INTONATION = 190.0, 0.7  # Hz of the natural voice, and the power of what differs from it
_LEAD, _TAIL = 1, 1  # frames before the first word and behind the last

VOICES = {
    **{f"NATF{i}": Voice(p, f) for i, (p, f) in enumerate(
        ((0.95, 1.0), (1.04, 1.02), (0.87, 0.98), (1.12, 1.04)))},
    **{f"NATM{i}": Voice(p, f) for i, (p, f) in enumerate(
        ((0.55, 0.86), (0.62, 0.88), (0.5, 0.84), (0.68, 0.9)))},
    **{f"VARF{i}": Voice(p, f, tilt=t) for i, (p, f, t) in enumerate(
        ((0.8, 1.0, 0.2), (1.0, 0.97, -0.3), (1.18, 1.06, 0.0), (0.9, 1.05, 0.3), (1.08, 0.98, -0.2)))},
    **{f"VARM{i}": Voice(p, f, tilt=t) for i, (p, f, t) in enumerate(
        ((0.52, 0.9, 0.3), (0.58, 0.83, -0.2), (0.72, 0.87, 0.0), (0.65, 0.84, 0.3), (0.6, 0.92, -0.3)))},
}  # fmt: skip
NAMES = tuple(VOICES)


@dataclass(frozen=True)
class Plan:
    """How a sentence is laid over frames: `starts[i]` is the frame of word i, `starts[-1]` the end.

    `place` is the moment of the network's prediction, in seconds, at every LOCK_HOP samples.
    """

    frames: int
    starts: tuple[int, ...]
    place: NDArray[np.float64]


@dataclass(frozen=True)
class Said:
    """Words without a voice: phones [F, 4], loudness code [F], pitch [F] in Hz of the voice as it is."""

    phones: NDArray[np.int64]
    loudness: NDArray[np.int64]
    pitch: Array

    def __len__(self) -> int:
        return len(self.phones)

    def part(self, start: int, end: int) -> Said:
        return Said(self.phones[start:end], self.loudness[start:end], self.pitch[start:end])

    def rows(self) -> NDArray[np.int16]:
        """[F, 6], as files hold it; `of_rows` is its inverse but for the pitch, which is whole Hz there."""
        return np.column_stack([self.phones, self.loudness, np.round(self.pitch)]).astype(np.int16)

    @classmethod
    def of_rows(cls, rows: NDArray[np.int16]) -> Said:
        return cls(
            rows[:, :QUARTERS].astype(np.int64),
            rows[:, QUARTERS].astype(np.int64),
            rows[:, QUARTERS + 1].astype(np.float32),
        )


def joined(parts: Sequence[Said]) -> Said:
    return Said(
        np.concatenate([p.phones for p in parts]),
        np.concatenate([p.loudness for p in parts]),
        np.concatenate([p.pitch for p in parts]),
    )


def plan(spoken: Spoken, least: Sequence[int] = ()) -> Plan:
    """Words at frames' begins, each at least `least[i]` frames long."""
    begins = [start for _, start, _ in spoken.words]
    ends = [*begins[1:], spoken.words[-1][2] + 0.5 * FRAME_SECONDS]
    source, target = [max(0.0, begins[0] - _LEAD * FRAME_SECONDS), begins[0]], [0, _LEAD]
    for index, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        count = max(1, round((end - begin) / FRAME_SECONDS), least[index] if least else 1)
        source.append(end)
        target.append(target[-1] + count)
    frames = target[-1] + _TAIL
    source.append(source[-1] + _TAIL * FRAME_SECONDS)
    times = np.arange(frames * FRAME_SIZE // LOCK_HOP + 1) * LOCK_HOP / SAMPLE_RATE
    place = np.interp(times, np.array([*target, frames]) * FRAME_SECONDS, source)
    return Plan(frames, tuple(target[1:]), place)


def said(spoken: Spoken, made: Plan, names: Sequence[str]) -> Said:
    """The sentence without its voice; `names[p]` is the phone with number p in `spoken`."""
    quarter = FRAME_SIZE // QUARTERS // LOCK_HOP
    middles = made.place[quarter // 2 :: quarter][: made.frames * QUARTERS]
    index = np.floor(middles * LABEL_RATE).astype(int)
    inside = (index >= 0) & (index < len(spoken.phones))
    numbers = np.where(inside, spoken.phones[np.clip(index, 0, len(spoken.phones) - 1)], 0)
    known = np.array([0, *(ALPHABET.find(name) + 1 for name in names[1:])])
    steps = FRAME_SIZE // LOCK_HOP
    position = np.clip((made.place * SAMPLE_RATE / HOP - 0.5), 0, len(spoken.f0) - 1)
    near = np.round(position).astype(int)
    power = np.exp(2 * spoken.harmonic).mean(0) + np.exp(2 * spoken.noise).mean(0)
    level = 10 * np.log10(power[near[: made.frames * steps]].reshape(made.frames, steps).mean(1) + 1e-9)
    loudness = np.clip(np.round((level - level.max()) / _STEP) + _STEPS, 0, _STEPS).astype(np.int64)
    pitch = spoken.f0[near[: made.frames * steps]].reshape(made.frames, steps)
    voiced = [row[row > 40] for row in pitch]
    hertz = np.array([np.median(row) if len(row) >= 2 else 0.0 for row in voiced], np.float32)
    return Said(known[numbers].reshape(made.frames, QUARTERS).astype(np.int64), loudness, hertz)


def codes(words: Said, voice: str) -> NDArray[np.int64]:
    """[F, 8] of what `voice` says."""
    out = np.zeros((len(words), 8), np.int64)
    out[:, :QUARTERS] = words.phones
    out[:-1, NEXT] = words.phones[1:, 0]
    voiced = words.pitch > 0
    hertz = np.zeros_like(words.pitch)
    hertz[voiced] = _MEAN * VOICES[voice].pitch * (words.pitch[voiced] / _MEAN) ** _INTONATION
    out[:, PERIODS] = np.clip(periods_of(hertz[:, None], len(words)), LOWEST_PERIODS, CODES - 1)
    out[:, LOUDNESS] = words.loudness
    out[:, VOICE] = NAMES.index(voice)
    return out
