"""A service whose slots are all taken, in simulated time: what its callers are told of their wait.

Callers come to gateways, wait in their order with word of the other gateways as old as the service has it,
get a slot and hold it. The turns, the rooms and the waits of the gateways are the service's own, and so is
the fleet's ledger; what is simulated is the clients, the replica and the time that messages take.
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from deployments.gateway.lease import HeldSlot
from deployments.gateway.room import QUEUE_LOOK_EVERY_S, Room
from deployments.gateway.turns import YIELD_S, QueuedRequest, Turns
from deployments.gateway.waits import Waits, close
from deployments.wire.holdings import Holdings, Ledger
from deployments.wire.messages import ReplicaStatus, SessionStatus

LOOK_S = 0.2  # a gateway's, for a free slot
REPORT_S = 0.25  # a gateway's, to the fleet
FREED_S = 0.02  # until a gateway that gave a slot back looks for it
BEGAN_S = 1_000.0  # the clock's

Draw = Callable[[np.random.Generator, float], float]  # seconds, at a time of the clock


@dataclass(frozen=True)
class Load:
    """`length`: seconds a caller talks. `every`: mean seconds between two callers; of a `crowd`, between the
    end of one's session and its return. `keys`: label -> priority and share of the callers. `patience`:
    seconds after which a caller leaves the queue of itself. `limit`, `timeout`: of a gateway's queue.
    `start`, `end`: seconds from the slot to the handshake, and from the end of the conversation until the
    slot is free."""

    length: Draw
    slots: int
    crowd: int = 0
    every: float = 1.0
    gateways: int = 1
    hours: float = 1.0
    keys: Mapping[str, tuple[int, float]] = field(default_factory=lambda: {"": (0, 1.0)})
    patience: Draw = lambda random, now: float("inf")
    limit: int = 64
    timeout: float = 3_600.0
    start: Draw = lambda random, now: float(random.uniform(0.2, 0.5))
    end: Draw = lambda random, now: float(random.uniform(0.05, 0.3))
    slots_at: Callable[[float], int] | None = None  # where they change; `slots` at first


@dataclass
class Outcome:
    """`told`: all that callers were told, with what they waited from then until they could talk."""

    told: list[tuple[float, float]] = field(default_factory=list)
    waited: int = 0  # callers
    informed: int = 0  # of those, who were told something

    @property
    def good(self) -> float:
        """The share of what was told that was good."""
        return sum(close(*one) for one in self.told) / len(self.told) if self.told else 1.0


@dataclass
class Caller:
    gateway: int
    request: QueuedRequest
    place: int = 0  # as last announced; 0: it never waited
    told: list[tuple[float, float]] = field(default_factory=list)  # when, and what


class Clock:
    now = BEGAN_S

    def __call__(self) -> float:
        return self.now


class Desk:
    """The leases of one gateway, as its Room sees them."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.callers: dict[str, Caller] = {}
        self.slots: dict[str, float] = {}  # since when
        self.changes = 0

    @property
    def queued(self) -> int:
        return len(self.callers)

    def waiting(self) -> list[QueuedRequest]:
        return self.turns.order(self.requests())

    def requests(self) -> list[QueuedRequest]:
        return [caller.request for caller in self.callers.values()]

    def held(self) -> list[HeldSlot]:
        return [HeldSlot(name, "replica", since) for name, since in self.slots.items()]


def simulate(load: Load, seed: int) -> Outcome:
    return _Service(load, seed).run()


class _Service:
    def __init__(self, load: Load, seed: int) -> None:
        self._load, self._random, self._clock = load, np.random.default_rng(seed), Clock()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._ledger = Ledger(BEGAN_S)
        self._gateways = range(load.gateways)
        self._turns = [Turns(self._clock) for _ in self._gateways]
        self._desks = [Desk(turns) for turns in self._turns]
        self._waits = [Waits(3_600.0, load.timeout) for _ in self._gateways]
        self._rooms = [self._room(gateway) for gateway in self._gateways]
        self._sessions: dict[str, float] = {}  # that hold a slot, since when
        self._free_since = BEGAN_S
        self._outcome = Outcome()

    def run(self) -> Outcome:
        for _ in range(self._load.crowd or 1):
            self._after(self._random.uniform(0, 10), self._arrive)
        for gateway in self._gateways:
            for every, what in (
                (REPORT_S, self._report),
                (QUEUE_LOOK_EVERY_S, self._see),
                (LOOK_S, self._look),
            ):
                self._again(every, functools.partial(what, gateway), self._random.uniform(0, every))
        until = BEGAN_S + 3_600 * self._load.hours
        while self._events[0][0] < until:
            self._clock.now, _, happen = heapq.heappop(self._events)
            happen()
        return self._outcome

    def _room(self, gateway: int) -> Room:
        desk: Any = self._desks[gateway]
        return Room(
            cast(Any, None),
            desk,
            self._turns[gateway],
            self._waits[gateway],
            limit=0,
            changed=lambda: None,
            clock=self._clock,
        )

    def _after(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._clock.now + seconds, next(self._numbers), happen))

    def _again(self, every: float, happen: Callable[[], None], first: float) -> None:
        def once() -> None:
            self._after(every, once)
            happen()

        self._after(first, once)

    # Callers

    def _arrive(self) -> None:
        if not self._load.crowd:
            self._after(self._random.exponential(self._load.every), self._arrive)
        labels, now = list(self._load.keys), self._clock.now
        label = labels[self._random.choice(len(labels), p=[share for _, share in self._load.keys.values()])]
        gateway = int(self._random.integers(self._load.gateways))
        desk, turns, limit = self._desks[gateway], self._turns[gateway], self._load.limit
        if desk.queued >= limit or (label and turns.full_for(label, desk.requests(), limit)):
            return
        name, priority = str(next(self._numbers)), self._load.keys[label][0]
        caller = Caller(gateway, QueuedRequest(name, "", frozenset(), label, priority, now))
        desk.callers[name] = caller
        self._look(gateway)
        if name in desk.callers:
            patience = min(self._load.timeout, self._load.patience(self._random, now))
            if patience < float("inf"):
                self._after(patience, lambda: self._give_up(name, caller))
            self._announce(gateway)

    def _give_up(self, name: str, caller: Caller) -> None:
        if self._desks[caller.gateway].callers.pop(name, None) is not None:
            self._waits[caller.gateway].left(name, self._clock.now)
            self._announce(caller.gateway)

    def _announce(self, gateway: int) -> None:
        desk = self._desks[gateway]
        desk.changes += 1
        for place, request in enumerate(desk.waiting(), start=1):
            caller = desk.callers[request.session]
            if caller.place != place:
                caller.place = place
                said = self._rooms[gateway].wait(request.session)
                if said is not None:
                    caller.told.append((self._clock.now, said))

    # Slots

    @property
    def _slots(self) -> int:
        return self._load.slots if self._load.slots_at is None else self._load.slots_at(self._clock.now)

    def _look(self, gateway: int) -> None:
        """As SessionRouter does."""
        desk, turns = self._desks[gateway], self._turns[gateway]
        while desk.callers and len(self._sessions) < self._slots:
            self._report(gateway)
            if turns.yields(desk.requests()) and self._clock.now - self._free_since < YIELD_S:
                return
            chosen = turns.pick(desk.requests())
            turns.sent(chosen)
            self._grant(gateway, chosen)

    def _grant(self, gateway: int, request: QueuedRequest) -> None:
        desk, now, name = self._desks[gateway], self._clock.now, request.session
        caller = desk.callers.pop(name)
        self._sessions[name] = desk.slots[name] = self._free_since = now
        self._turns[gateway].granted(request)
        self._turns[gateway].gone(request)
        self._waits[gateway].served(name, now)
        self._announce(gateway)
        start = self._load.start(self._random, now)
        self._after(start, lambda: self._begin(name, caller))
        held = start + self._load.length(self._random, now) + self._load.end(self._random, now)
        self._after(held, lambda: self._end(name, caller))

    def _begin(self, name: str, caller: Caller) -> None:
        now = self._clock.now
        self._waits[caller.gateway].live(name, now)
        if caller.place:
            self._outcome.waited += 1
            self._outcome.informed += bool(caller.told)
            self._outcome.told += [(said, now - at) for at, said in caller.told]

    def _end(self, name: str, caller: Caller) -> None:
        now = self._clock.now
        self._waits[caller.gateway].left(name, now)
        self._waits[caller.gateway].ended(now - self._sessions.pop(name), now)
        del self._desks[caller.gateway].slots[name]
        self._free_since = now
        self._after(FREED_S, lambda: self._look(caller.gateway))
        if self._load.crowd:
            self._after(self._random.exponential(self._load.every), self._arrive)

    # Word of each other

    def _report(self, gateway: int) -> None:
        turns, desk = self._turns[gateway], self._desks[gateway]
        holdings = Holdings(0, waiting=turns.waiting(desk.requests()), served_s=turns.served_s(3_600.0))
        turns.heard(self._ledger.report(str(gateway), holdings, self._clock.now))

    def _see(self, gateway: int) -> None:
        now = self._clock.now
        sessions = tuple(SessionStatus(name, round(now - since, 1)) for name, since in self._sessions.items())
        self._rooms[gateway].see([ReplicaStatus("replica", "", 0, "", (), self._slots, True, sessions)])
