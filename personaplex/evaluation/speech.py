"""Who spoke when: spans of speech and words, in seconds from the start of a recording. Pure.

A *segment* is what the detector gives (`vad`). An *utterance* is segments with gaps of at most MERGE_S
between them. A *turn* is an utterance of at least TURN_S or of more than SHORT_WORDS words; anything shorter
may be a backchannel ("uh huh").
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MERGE_S = 0.5
TURN_S = 1.0
SHORT_WORDS = 3
NEAR_S = 0.4  # how far from speech a word may stand and still belong to it
ROUNDING_S = 1e-6  # of sums of decimal fractions


@dataclass(frozen=True, order=True)
class Span:
    """From `start` to `end`, seconds."""

    start: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.start

    def distance(self, moment: float) -> float:
        """Seconds from `moment` to the nearest point of the span, 0 inside."""
        return max(self.start - moment, moment - self.end, 0.0)

    def overlap(self, other: Span) -> float:
        """Seconds that both share."""
        return max(0.0, min(self.end, other.end) - max(self.start, other.start))


@dataclass(frozen=True)
class Word:
    """One word; `end` is None where a recogniser gave none."""

    text: str
    start: float
    end: float | None = None


@dataclass(frozen=True)
class Utterance:
    """A stretch of speech and how many words fall to it."""

    span: Span
    words: int

    @property
    def is_turn(self) -> bool:
        return self.span.length >= TURN_S - ROUNDING_S or self.words > SHORT_WORDS


@dataclass(frozen=True)
class Track:
    """One speaker of a recording of `seconds` length; both lists in order of time."""

    seconds: float
    segments: tuple[Span, ...] = ()
    words: tuple[Word, ...] = field(default=())

    @property
    def utterances(self) -> list[Utterance]:
        """The segments merged over MERGE_S, with each word counted to the nearest within NEAR_S."""
        spans = merge(self.segments, MERGE_S)
        counts = [0] * len(spans)
        for word in self.words:
            index = nearest(spans, word.start)
            if index is not None:
                counts[index] += 1
        return [Utterance(span, count) for span, count in zip(spans, counts, strict=True)]


def merge(spans: Iterable[Span], gap: float) -> list[Span]:
    """Spans in order, those with at most `gap` seconds between them joined."""
    merged: list[Span] = []
    for span in sorted(spans):
        if merged and span.start - merged[-1].end <= gap + ROUNDING_S:
            merged[-1] = Span(merged[-1].start, max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return merged


def nearest(spans: Sequence[Span], moment: float) -> int | None:
    """Index of the span nearest to `moment`, if it is within NEAR_S; the earlier of two equals."""
    if not spans:
        return None
    index = min(range(len(spans)), key=lambda i: spans[i].distance(moment))
    return index if spans[index].distance(moment) <= NEAR_S + ROUNDING_S else None
