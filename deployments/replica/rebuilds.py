"""The line before the engine for sessions that go on from their logs: the shortest first, a few at a time.

When a card with many sessions dies, all of them come at once. The engine rebuilds so many at a time
(`EngineConfig.rebuilds`) and refuses more; those wait here, each with a slot of its own that is not in use
yet.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from personaplex.sessionlog import SessionLog

H = TypeVar("H")  # whoever holds the slot


@dataclass(order=True)
class _Waiting(Generic[H]):
    frames: int
    number: int  # first come first served among equals
    holder: H = field(compare=False)
    log: SessionLog = field(compare=False)


class Rebuilds(Generic[H]):
    """`start(holder, log)` begins a rebuild; whoever began it says `done` when it is over, however it
    ended."""

    def __init__(self, limit: int, start: Callable[[H, SessionLog], None]) -> None:
        self._limit, self._start = limit, start
        self._numbers = itertools.count()
        self._waiting: list[_Waiting[H]] = []  # a heap
        self._running: set[H] = set()

    def add(self, holder: H, log: SessionLog) -> None:
        """Starts the rebuild as soon as there is room for it."""
        heapq.heappush(self._waiting, _Waiting(log.frames, next(self._numbers), holder, log))
        self._start_next()

    def done(self, holder: H) -> None:
        """This rebuild has ended or is not wanted any more. Idempotent."""
        self._running.discard(holder)
        left = [one for one in self._waiting if one.holder is not holder]
        if len(left) < len(self._waiting):
            self._waiting = left
            heapq.heapify(self._waiting)
        self._start_next()

    def _start_next(self) -> None:
        while self._waiting and len(self._running) < self._limit:
            first = heapq.heappop(self._waiting)
            self._running.add(first.holder)
            self._start(first.holder, first.log)
