"""Whose turn it is among the sessions that wait for a slot: a pure table; arrival times are passed in.

1. A higher priority before a lower one.
2. Within a priority who has waited longest is next. A holder's callers wait one after the other: the second
   since the first one got its slot. So a holder with a hundred callers delays another's by one slot's turn.
3. Of one holder, who came first.

A queue's places are shared by the same thought: a holder may have at most as many callers waiting as there
are free places, so alone it gets half of them and there is always one left for somebody else.

Gateways know of each other's queues through the fleet, and ask it again when there is a free slot to share.
One whose own caller is not the first over all leaves a free slot to the others for YIELD_S before it takes
it; no slot is ever kept from anybody for longer, whatever the fleet knows.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.wire.holdings import Elsewhere, Waiting
from deployments.wire.messages import LeaseRequest

YIELD_S = 0.6  # three looks of another gateway for a free slot
STALE_S = 4.0  # word of other gateways' queues


@dataclass(frozen=True)
class QueuedRequest(LeaseRequest):
    """A LeaseRequest as its own gateway sees it; to the replica it travels as a plain one."""

    holder: str = field(default="", repr=False)
    priority: int = 0
    arrived: float = 0.0
    turns: Turns | None = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return LeaseRequest, (self.session, self.voice, self.excluded)


class Turns:
    """One gateway's; `clock` gives seconds of the monotonic clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._served: dict[str, float] = {}  # when each holder last got a slot
        self._flying: dict[str, str] = {}  # sessions that were sent to a replica, and their holders
        self._elsewhere, self._heard = Elsewhere(), float("-inf")
        self.ask: Callable[[], Awaitable[None]] | None = None  # the fleet, which ends in `heard`

    def order(self, waiting: Iterable[QueuedRequest]) -> list[QueuedRequest]:
        """In the order in which they will get their slots, if nobody else comes: those first that are on
        their way to one."""
        groups: dict[str, deque[QueuedRequest]] = {}
        found: list[QueuedRequest] = []
        for one in sorted(waiting, key=lambda one: (-one.priority, one.arrived)):
            if one.session in self._flying:
                found.append(one)
            else:
                groups.setdefault(one.holder, deque()).append(one)
        heap = [(self._rank(group[0]), holder) for holder, group in groups.items()]
        heapq.heapify(heap)
        turn = self._clock()
        while heap:
            _, holder = heapq.heappop(heap)
            group, turn = groups[holder], turn + 1.0
            found.append(group.popleft())
            if group:
                heapq.heappush(heap, ((-group[0].priority, turn, group[0].arrived), holder))
        return found

    def places(self, queued: Sequence[QueuedRequest]) -> tuple[dict[str, int], int]:
        """The place of each session `queued` here among the callers of all gateways, 1 being next, and the
        last place; none for one that is on its way to a slot. Of a holder's callers elsewhere only the first
        one's arrival is known: the others are taken to have come evenly since then."""
        now = self._clock()
        age = now - self._heard
        others = [
            QueuedRequest(
                "", "", frozenset(), holder, one.priority, now - (one.longest_s + age) * (1 - n / one.count)
            )
            for holder, one in (self._elsewhere.waiting.items() if age <= STALE_S else ())
            for n in range(one.count)
        ]
        order = self.order([*self._still(queued), *others])
        places = {one.session: place for place, one in enumerate(order, start=1) if one.session}
        return places, len(order)

    def pick(self, waiting: Sequence[QueuedRequest]) -> QueuedRequest:
        """The one whose turn it is, of at least one."""
        for one in waiting:  # it is back, since the replica had no slot after all
            self._flying.pop(one.session, None)
        return min(waiting, key=self._rank)

    def sent(self, request: QueuedRequest) -> None:
        """`request` was sent to a replica, which may still refuse it; till then its holder had its turn."""
        self._flying[request.session] = request.holder

    def granted(self, request: QueuedRequest) -> None:
        self._flying.pop(request.session, None)
        self._served[request.holder] = self._clock()

    def gone(self, request: QueuedRequest) -> None:
        """It waits no more, with a slot or without."""
        self._flying.pop(request.session, None)

    def full_for(self, holder: str, waiting: Sequence[QueuedRequest], places: int) -> bool:
        """Whether `holder` has as many callers among those `waiting` as it may."""
        return sum(one.holder == holder for one in waiting) >= places - len(waiting)

    # Other gateways

    async def refresh(self) -> None:
        """Makes what is known of other gateways current, if callers wait there."""
        if self.ask is not None and self._elsewhere.waiting:
            await self.ask()

    def heard(self, elsewhere: Elsewhere) -> None:
        """What the fleet says about the others."""
        self._elsewhere, self._heard = elsewhere, self._clock()

    def yields(self, waiting: Sequence[QueuedRequest]) -> bool:
        """Whether somebody at another gateway comes before all of those `waiting` here."""
        age = self._clock() - self._heard
        if age > STALE_S or not self._elsewhere.waiting or not waiting:
            return False
        mine, now = min(map(self._rank, waiting)), self._clock()
        return any(
            self._turn(holder, one.priority, now - one.longest_s - age) < mine
            for holder, one in self._elsewhere.waiting.items()
        )

    def waiting(self, queued: Iterable[QueuedRequest]) -> dict[str, Waiting]:
        """For the fleet: the callers in this gateway's queue that are not on their way to a slot."""
        now, queued = self._clock(), self._still(queued)
        counts = Counter(one.holder for one in queued)
        return {
            holder: Waiting(
                max(one.priority for one in queued if one.holder == holder),
                count,
                now - min(one.arrived for one in queued if one.holder == holder),
            )
            for holder, count in counts.items()
        }

    def served_s(self, kept_s: float) -> dict[str, float]:
        """For the fleet: how long ago holders got a slot here, or are about to. Those of more than `kept_s`
        are forgotten."""
        now = self._clock()
        self._served = {holder: at for holder, at in self._served.items() if now - at < kept_s}
        flying = dict.fromkeys(self._flying.values(), 0.0)
        return {holder: now - at for holder, at in self._served.items()} | flying

    def _still(self, queued: Iterable[QueuedRequest]) -> list[QueuedRequest]:
        return [one for one in queued if one.session not in self._flying]

    def _rank(self, request: QueuedRequest) -> tuple[float, float, float]:
        return self._turn(request.holder, request.priority, request.arrived)

    def _turn(self, holder: str, priority: int, arrived: float) -> tuple[float, float, float]:
        """What callers are ordered by."""
        return -priority, max(self._last(holder), arrived), arrived

    def _last(self, holder: str) -> float:
        """When a holder last got a slot, here or elsewhere."""
        now = self._clock()
        if holder in self._flying.values():
            return now
        last = self._served.get(holder, float("-inf"))
        age = now - self._heard
        if age <= STALE_S and holder in self._elsewhere.served_s:
            last = max(last, now - self._elsewhere.served_s[holder] - age)
        return last
