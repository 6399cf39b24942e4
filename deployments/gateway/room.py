"""How much room a gateway has: its open sessions, the slots there are, and how long callers wait for one."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator

from deployments.gateway.accounts import Accounts
from deployments.gateway.leases import Leases
from deployments.gateway.observer import Observer
from deployments.gateway.waits import Waits
from personaplex.errors import NoCapacity

SLOTS_EVERY_S = 5.0  # between two looks at how many slots there are


class Room:
    """One gateway's. `open` counts its sessions, those that are still being refused among them."""

    def __init__(
        self,
        fleet: Observer,
        leases: Leases,
        accounts: Accounts,
        waits: Waits,
        *,
        limit: int,
        changed: Callable[[], None],
    ) -> None:
        """`limit`: of the open sessions. `changed` is called when `open` has changed."""
        self._fleet, self._leases, self._accounts, self._waits = fleet, leases, accounts, waits
        self._limit, self._changed = limit, changed
        self._slots = 0
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

    def wait(self, session: str, place: int) -> float | None:
        """What a session at `place` of this gateway's queue may be told of its wait, in seconds."""
        return self._waits.queued(session, self._place(place), self._slots, time.monotonic())

    async def expected_wait(self) -> float | None:
        """What a caller would wait who came now, as far as it may be said."""
        if await self._any_free():
            return 0.0
        place = self._place(self._leases.queued + 1)
        found = self._waits.estimate(place, self._slots, time.monotonic())
        return round(found, 1) if found is not None and self._waits.honest else None

    async def count_slots(self) -> None:
        """Keeps the number of slots that callers in the queue wait for, for ever."""
        while True:
            self._slots = sum(one.slots for one in await self._fleet.describe() if one.accepting)
            await asyncio.sleep(SLOTS_EVERY_S)

    async def _any_free(self) -> bool:
        return any(one.accepting and one.used < one.slots for one in await self._fleet.describe())

    def _place(self, place: int) -> int:
        """A place in this gateway's queue, among those of all gateways: they take turns."""
        return round(place * (1 + self._accounts.waiting_elsewhere / max(self._leases.queued, place)))
