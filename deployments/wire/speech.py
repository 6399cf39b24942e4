"""What a transcriber answers a gateway that sent it a `Speech`. Knows no Ray."""

from __future__ import annotations

from dataclasses import dataclass

from personaplex.words import Segment


@dataclass(frozen=True)
class Reading:
    """What was said; `segment` is None where it was no speech after all."""

    segment: Segment | None


@dataclass(frozen=True)
class Unready:
    """No model yet, or none at all: `reason` in words of our own. Worth another try."""

    reason: str


@dataclass(frozen=True)
class Unreadable:
    """This piece made the model fail, and would again."""


Answer = Reading | Unready | Unreadable
