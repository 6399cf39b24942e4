"""An operator's orders to move sessions, from whichever gateway hears one to the gateways that hold them.

Gateways ask the fleet for orders all the time (`next`), and every order goes to each of them: only a gateway
knows which sessions its clients hold. Each answers with what came of its own, `run` returns all of it. A
gateway that stops asking has died; nobody waits for it, and the result says that it gave no answer. Nothing
outlives the fleet's process: an order that it took with it is given again.

The answer to a question also says whether the gateway is outdated: one of another version has begun later and
asks too, so that clients which can come back do well to come over to it.

A new gateway asks whether it stands in a replica's way. Where all CPUs are taken, the one that a stopped
replica left may have gone to it, while the replica's successor waits for the old gateway to end, and the old
gateway's sessions for that successor.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

ASK_S = 4.0  # the longest a gateway's question waits for an order
LAPSE_S = 3 * ASK_S  # without a question: the gateway has died
SETTLE_S = 3.0  # from a gateway's first question until the proxies know it
KNOWN_S = 2.0  # from a fleet's begin until all gateways have asked
ALONE_S = 6.0  # without a report of any replica: there is none
_WATCH_EVERY_S = 0.1  # whether one reports
_LOOK_EVERY_S = 0.5  # whether a gateway died that is waited for

MOVED, BUSY, ENDED = "moved", "busy", "ended"  # outcomes beside those of a failover


@dataclass(frozen=True)
class MoveOrder:
    """One session, or all at one replica, which gets no new one for `hold_s`."""

    session: str = ""
    replica: str = ""
    hold_s: float = 0.0


@dataclass(frozen=True)
class MovedSession:
    """`outcome`: moved; no_capacity, refused or failed, and it stayed; busy, it was on its way to another
    replica already; ended. `source` and `target` are replicas."""

    session: str
    outcome: str
    source: str
    target: str


@dataclass(frozen=True)
class OrderResult:
    """`silent`: gateways that gave no answer."""

    sessions: tuple[MovedSession, ...]
    silent: int = 0


Numbered = tuple[int, MoveOrder]


@dataclass(frozen=True)
class GatewayBirth:
    """Who a gateway is. `version`: of its code and settings, as Serve has it. `began`: by the wall clock."""

    name: str
    version: str = ""
    began: float = 0.0


@dataclass(frozen=True)
class News:
    """What a gateway is told."""

    orders: tuple[Numbered, ...] = ()
    outdated: bool = False


@dataclass(eq=False)
class _Inbox:
    """A gateway's."""

    birth: GatewayBirth
    first_asked: float
    asked: float
    orders: list[Numbered] = field(default_factory=list)
    filled: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class _Running:
    """An order, until every gateway has answered."""

    awaited: set[str]
    found: list[MovedSession] = field(default_factory=list)
    answered: asyncio.Event = field(default_factory=asyncio.Event)


class Orders:
    """The fleet's. `clock` gives seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._inboxes: dict[str, _Inbox] = {}
        self._running: dict[int, _Running] = {}
        self._numbers = itertools.count()
        self._gave_way: set[str] = set()  # versions
        self._reports = 0

    def reported(self) -> None:
        """A replica has, as each does every second."""
        self._reports += 1

    async def in_the_way(self, birth: GatewayBirth) -> bool:
        """Whether a gateway had better give its CPU to a replica. True once for a version: perhaps none can
        start. Waits for a replica's report, at most ALONE_S."""
        began, reports = self._clock(), self._reports
        while self._reports == reports and birth.version not in self._gave_way:
            older = any(
                other.birth.version != birth.version and other.birth.began < birth.began
                for other in self._living().values()
            )
            waited = self._clock() - began
            if older and waited >= ALONE_S:
                self._gave_way.add(birth.version)
                return True
            if not older and waited >= KNOWN_S:
                return False
            await asyncio.sleep(_WATCH_EVERY_S)
        return False

    async def next(self, birth: GatewayBirth, wait_s: float = ASK_S) -> News:
        """The orders for a gateway that it has not got yet; waits for one, at most `wait_s`."""
        now = self._clock()
        inbox = self._inboxes.setdefault(birth.name, _Inbox(birth, now, now))
        inbox.asked = now
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(inbox.filled.wait(), wait_s)
        inbox.filled.clear()
        given, inbox.orders = inbox.orders, []
        return News(tuple(given), self._outdated(birth))

    def answer(self, gateway: str, number: int, moved: list[MovedSession]) -> None:
        """What came of a gateway's sessions, if any were meant."""
        running = self._running.get(number)
        if running is not None and gateway in running.awaited:
            running.awaited.discard(gateway)
            running.found += moved
            running.answered.set()

    def forget(self, gateway: str) -> None:
        """A gateway that ends."""
        self._inboxes.pop(gateway, None)

    async def run(self, order: MoveOrder, timeout_s: float) -> OrderResult:
        """Gives the order to every gateway; returns once all have answered, at most after `timeout_s`."""
        until = self._clock() + timeout_s
        number = next(self._numbers)
        running = self._running[number] = _Running(set(self._alive()))
        for gateway in running.awaited:
            inbox = self._inboxes[gateway]
            inbox.orders.append((number, order))
            inbox.filled.set()
        try:
            while running.awaited & self._alive() and (left := until - self._clock()) > 0:
                running.answered.clear()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(running.answered.wait(), min(left, _LOOK_EVERY_S))
        finally:
            del self._running[number]
        return OrderResult(tuple(running.found), len(running.awaited))

    def _outdated(self, birth: GatewayBirth) -> bool:
        settled = self._clock() - SETTLE_S
        return any(
            other.birth.version != birth.version
            and other.birth.began > birth.began
            and other.first_asked <= settled
            for other in self._living().values()
        )

    def _alive(self) -> set[str]:
        return set(self._living())

    def _living(self) -> dict[str, _Inbox]:
        since = self._clock() - LAPSE_S
        self._inboxes = {name: one for name, one in self._inboxes.items() if one.asked >= since}
        return self._inboxes
