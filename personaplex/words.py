"""Words and when they were said: what a transcript is made of. Pure.

Times are seconds of the conversation, whose frame k, the user's and the agent's alike, begins at 0.08 k.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from personaplex.config import FRAME_SECONDS

PAUSE_S = 1.0
_SPACE = re.compile(r"\s")


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


def word_errors(said: Sequence[str], read: Sequence[str]) -> int:
    """The fewest words to insert, delete or replace to get from one to the other (Levenshtein)."""
    row = list(range(len(read) + 1))
    for i, word in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(read, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


def spelled(pieces: Iterable[tuple[int, str]]) -> list[Word]:
    """The words that pieces of text with their frames spell, in order, each with the times of the frames it
    came with. A piece that begins with a space begins a word."""
    found: list[Word] = []
    spelling = False  # the last word may go on
    for frame, piece in pieces:
        start, end = round(frame * FRAME_SECONDS, 2), round((frame + 1) * FRAME_SECONDS, 2)
        for number, part in enumerate(_SPACE.split(piece)):
            spelling = spelling and number == 0
            if part and spelling:
                found[-1] = Word(found[-1].text + part, found[-1].start, end)
            elif part:
                found.append(Word(part, start, end))
                spelling = True
    return found


def segments(words: Iterable[Word], pause_s: float = PAUSE_S) -> list[Segment]:
    """Words in order, cut where nothing is said for more than `pause_s`."""
    rows: list[list[Word]] = []
    for word in words:
        if rows and word.start - rows[-1][-1].end <= pause_s:
            rows[-1].append(word)
        else:
            rows.append([word])
    return [Segment.of(row) for row in rows]


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
