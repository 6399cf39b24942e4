"""Words and when they were said: what a transcript is made of. Stdlib only.

Times are seconds of the conversation, whose frame k, the user's and the agent's alike, begins at 0.08 k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Word:
    """One word, with its punctuation, from `start` to `end`."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Segment:
    """What one speaker said between two pauses, from `start` to `end`; its words in order."""

    text: str
    start: float
    end: float
    words: tuple[Word, ...] = ()

    @classmethod
    def of(cls, words: Sequence[Word]) -> Segment:
        """The segment that `words` make; at least one."""
        return cls(" ".join(word.text for word in words), words[0].start, words[-1].end, tuple(words))


def as_json(segment: Segment) -> dict[str, Any]:
    """`text`, `start_ms`, `end_ms` and `words`, each of which has the same three."""
    return {
        **_timed(segment),
        "words": [_timed(word) for word in segment.words],
    }


def from_json(data: Mapping[str, Any]) -> Segment:
    """The segment in what `as_json` gave. Raises ValueError for anything else."""
    words = data.get("words")
    if not isinstance(words, list):
        raise ValueError("a segment without words")
    return Segment(*_read(data), tuple(Word(*_read(word)) for word in words))


def milliseconds(seconds: float) -> int:
    return round(1_000 * seconds)


def _timed(one: Word | Segment) -> dict[str, Any]:
    return {"text": one.text, "start_ms": milliseconds(one.start), "end_ms": milliseconds(one.end)}


def _read(data: Any) -> tuple[str, float, float]:
    if not isinstance(data, Mapping):
        raise ValueError("a word that is no object")
    text, start, end = data.get("text"), data.get("start_ms"), data.get("end_ms")
    if not isinstance(text, str) or type(start) is not int or type(end) is not int or not 0 <= start <= end:
        raise ValueError("a word without text or without times")
    return text, start / 1_000, end / 1_000
