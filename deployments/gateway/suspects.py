"""Replicas that this gateway lost sessions on a moment ago, and the order in which those sessions ask for
slots.

A replica that died, cannot be reached or does not answer is left out of every request for a slot for a while,
that of new sessions too: the service may need longer to notice. Times are seconds of the monotonic clock.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable

SUSPECT_S = 3.0
GATHER_S = 0.02  # losses this close together have one cause


class Suspects:
    """Names of replicas, each until some time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until: dict[str, float] = {}
        self._held_until: dict[str, float] = {}

    def add(self, replica: str) -> None:
        self._until[replica] = self._clock() + SUSPECT_S

    def hold(self, replica: str, seconds: float) -> None:
        """It is well, but gets no session for so long: an operator wishes it."""
        self._held_until[replica] = self._clock() + seconds

    def clear(self, replica: str) -> None:
        """It answers again."""
        self._until.pop(replica, None)

    def names(self) -> frozenset[str]:
        now = self._clock()
        self._until = {name: until for name, until in self._until.items() if until > now}
        self._held_until = {name: until for name, until in self._held_until.items() if until > now}
        return frozenset({*self._until, *self._held_until})

    def again_in_s(self) -> float:
        """Seconds until one of them may be asked again; infinite while there is none."""
        ends = [*self._until.values(), *self._held_until.values()]
        return min(ends, default=float("inf")) - self._clock()


class ShortestFirst:
    """Sessions that were lost together go on in the order of their lengths: the shortest is soonest rebuilt,
    and no long one is much later for it."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    async def turn(self, frames: int) -> None:
        """Returns when a session of `frames` frames may ask for its slot, within about GATHER_S."""
        loop = asyncio.get_running_loop()
        if not self._waiting:
            loop.call_later(GATHER_S, self._release)
        mine: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._waiting, (frames, next(self._numbers), mine))
        await mine

    def _release(self) -> None:
        waiting, self._waiting = self._waiting, []
        while waiting:
            future = heapq.heappop(waiting)[2]
            if not future.done():
                future.set_result(None)
