"""How much room a gateway has: its open sessions, the slots there are, and how long callers wait for one."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from deployments.gateway.leases import Leases
from deployments.gateway.observer import Observer
from deployments.gateway.turns import Turns
from deployments.gateway.waits import Expected, Waits
from deployments.wire.messages import ReplicaStatus
from personaplex.errors import NoCapacity

# Between two looks at who holds the slots: a call to the fleet costs as much as 30 frames.
LOOK_EVERY_S = 30.0
QUEUE_LOOK_EVERY_S = 2.0  # while callers wait
_TICK_S = 0.5  # until it is noticed that one does
PLAYED_S = 0.25  # for which a forecast of an unchanged queue holds


class Room:
    """One gateway's. `open` counts its sessions, those that are still being refused among them."""

    def __init__(
        self,
        fleet: Observer,
        leases: Leases,
        turns: Turns,
        waits: Waits,
        *,
        limit: int,
        changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`limit`: of the open sessions. `changed` is called when `open` has changed."""
        self._fleet, self._leases, self._turns, self._waits = fleet, leases, turns, waits
        self._limit, self._changed, self._clock = limit, changed, clock
        self._seen: Sequence[ReplicaStatus] = ()
        self._seen_at = float("-inf")
        self._expected: list[Expected] = []  # of each place over all gateways
        self._places: dict[str, int] = {}  # of this gateway's callers
        self._played_at, self._played = float("-inf"), -1  # when, and the queue's changes by then
        self.open = 0
        self.empty = asyncio.Event()  # no session is open
        self.empty.set()

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """A session is open until the end of the block."""
        self.open += 1
        self.empty.clear()
        self._changed()
        try:
            yield
        finally:
            self.open -= 1
            if not self.open:
                self.empty.set()
            self._changed()

    def check_limit(self, further: int = 0) -> None:
        """Raises NoCapacity when more sessions are open than may be; `further`: that are not counted yet."""
        if self.open + further > self._limit:
            raise NoCapacity("this gateway holds as many sessions as it may")

    async def check(self) -> None:
        """Raises NoCapacity when a session would find neither a slot nor a place in the queue now."""
        if self._leases.queue_full and not await self._any_free():
            raise NoCapacity("every slot is taken and the queue is full")

    def wait(self, session: str) -> float | None:
        """What a session in this gateway's queue may be told of its wait, in seconds."""
        now = self._clock()
        self._play(now)
        place = self._places.get(session, 0)
        if not 0 < place <= len(self._expected):
            return None
        return self._waits.told(session, self._expected[place - 1], now)

    async def expected_wait(self) -> float | None:
        """What a caller would wait who came now, as far as it may be said."""
        if await self._any_free():
            return 0.0
        now = self._clock()
        self._play(now)
        found = self._waits.sayable(self._expected[-1]) if self._expected else None
        return None if found is None else round(found, 1)

    async def watch(self) -> None:
        """Keeps what is known of the sessions that callers in the queue wait for, for ever."""
        while True:
            every_s = QUEUE_LOOK_EVERY_S if self._leases.queued else LOOK_EVERY_S
            if self._clock() - self._seen_at >= every_s:
                self.see(await self._fleet.describe())
            await asyncio.sleep(_TICK_S)

    def see(self, replicas: Sequence[ReplicaStatus]) -> None:
        """All replicas as of now."""
        self._seen, self._seen_at = replicas, self._clock()

    async def _any_free(self) -> bool:
        self.see(await self._fleet.describe())
        return any(one.accepting and one.used < one.slots for one in self._seen)

    def _play(self, now: float) -> None:
        """Plays the queue of all gateways, and of one caller more, forward from `now`; what was played a
        moment ago holds until the queue changes."""
        if self._played == self._leases.changes and now - self._played_at < PLAYED_S:
            return
        self._played_at, self._played = now, self._leases.changes
        queued = self._leases.waiting()
        self._places, last = self._turns.places(queued)
        own, elsewhere = self._ages(now)
        self._expected = self._waits.forecast(own, elsewhere, last + 1, now)

    def _ages(self, now: float) -> tuple[list[float], list[float]]:
        """Of the sessions that hold the slots callers wait for: this gateway's, which are known, and others',
        as last seen. Of those the oldest have ended where they are more than the slots there are; a slot
        that was seen free was taken since, or somebody waited in vain."""
        usable = {one.replica: one for one in self._seen if one.accepting}
        held = self._leases.held()
        own = [now - one.since for one in held if one.replica in usable]
        names = {one.session for one in held}
        slots = sum(one.slots for one in usable.values())
        others = sorted(
            one.seconds + now - self._seen_at
            for replica in usable.values()
            for one in replica.sessions
            if one.session not in names
        )[: max(0, slots - len(own))]
        return own, others + [0.0] * (slots - len(own) - len(others))
