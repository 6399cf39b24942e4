"""What gateways tell the fleet about keys, and are told: who holds sessions, used minutes, waits in queues.

A holder is whom limits count: a label of the keys file, or a digest of a key that has none. Ledger is the
fleet's side, a pure table with the time passed in; gateway/accounts.py is the other one. A gateway tells all
it holds again and again (`report`), so nothing here has to outlive the fleet; before a session of a holder
with a limit begins, the fleet judges (`enter`), one at a time for all gateways. Seconds are of one day (UTC).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

FORGET_AFTER_S = 5.0  # a gateway without a report; its sessions are gone with it
YOUNG_S = 2.5  # of a fleet's life: it has not heard of every gateway's sessions yet
SETTLE_S = 3.0  # a session that was let in may be missing from reports that were on their way

Judgement = Literal["enter", "sessions", "minutes", "unsure"]


@dataclass(frozen=True)
class Limits:
    """Of one holder; 0 is no limit."""

    sessions: int = 0
    seconds_a_day: float = 0.0


@dataclass(frozen=True)
class Waiting:
    """A holder's callers in one or more queues."""

    priority: int
    count: int
    longest_s: float


@dataclass(frozen=True)
class Holdings:
    """All that one gateway knows of its own: sessions by name with their holders, seconds used on `day` (a
    number that grows by one at midnight UTC), callers in its queue, and when it last gave each of the
    holders that wait or talk a slot, in seconds before the report."""

    day: int
    sessions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    waiting: Mapping[str, Waiting] = field(default_factory=dict)
    served_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Elsewhere:
    """The sum of what all other gateways hold."""

    sessions: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    waiting: Mapping[str, Waiting] = field(default_factory=dict)
    served_s: Mapping[str, float] = field(default_factory=dict)


@dataclass
class _Gateway:
    told: float  # when it reported last
    holdings: Holdings
    entered: dict[str, tuple[str, float]] = field(default_factory=dict)  # since: holder and time

    def holders(self) -> Mapping[str, str]:
        return {**self.holdings.sessions, **{name: holder for name, (holder, _) in self.entered.items()}}


class Ledger:
    """Times are seconds of one monotonic clock, but for `day`."""

    def __init__(self, now: float) -> None:
        self._began = now
        self._gateways: dict[str, _Gateway] = {}

    def enter(
        self, gateway: str, session: str, holder: str, limits: Limits, day: int, now: float
    ) -> Judgement:
        """Whether a session of `holder` may begin; if so it is counted from now on. `unsure`: this fleet is
        too young to know, and the gateway judges by what it heard before."""
        held = sum(
            1
            for one in self._living(now)
            for name, whose in one.holders().items()
            if whose == holder and name != session
        )
        used = sum(self._seconds(day, holder, one) for one in self._gateways.values())
        verdict: Judgement = "enter"
        if limits.sessions and held >= limits.sessions:
            verdict = "sessions"
        elif limits.seconds_a_day and used >= limits.seconds_a_day:
            verdict = "minutes"
        elif now - self._began < YOUNG_S:
            verdict = "unsure"
        if verdict in ("enter", "unsure"):
            self._gateway(gateway, day, now).entered[session] = (holder, now)
        return verdict

    def leave(self, gateway: str, session: str) -> None:
        """The session has ended."""
        known = self._gateways.get(gateway)
        if known is not None:
            known.entered.pop(session, None)
            left = {name: one for name, one in known.holdings.sessions.items() if name != session}
            known.holdings = replace(known.holdings, sessions=left)

    def report(self, gateway: str, holdings: Holdings, now: float) -> Elsewhere:
        """Replaces what is known of a gateway; the answer is about all others."""
        known = self._gateway(gateway, holdings.day, now)
        known.told, known.holdings = now, holdings
        known.entered = {name: entry for name, entry in known.entered.items() if now - entry[1] < SETTLE_S}
        self._drop_old(holdings.day, now)
        others = [one for name, one in self._gateways.items() if name != gateway]
        living = [one for one in others if now - one.told < FORGET_AFTER_S]
        seconds: Counter[str] = Counter()
        for one in others:
            if one.holdings.day == holdings.day:
                seconds.update(one.holdings.seconds)
        return Elsewhere(
            sessions=Counter(holder for one in living for holder in one.holders().values()),
            seconds=dict(seconds),
            waiting=_sum_of(living),
            served_s=_latest(living, now),
        )

    def forget(self, gateway: str) -> None:
        """A gateway has ended in good order: it holds no session. What it used today stays used."""
        known = self._gateways.get(gateway)
        if known is not None:
            known.holdings = Holdings(known.holdings.day, seconds=known.holdings.seconds)
            known.entered = {}

    def _gateway(self, name: str, day: int, now: float) -> _Gateway:
        return self._gateways.setdefault(name, _Gateway(now, Holdings(day)))

    def _living(self, now: float) -> Iterator[_Gateway]:
        return (one for one in self._gateways.values() if now - one.told < FORGET_AFTER_S)

    def _seconds(self, day: int, holder: str, gateway: _Gateway) -> float:
        return gateway.holdings.seconds.get(holder, 0.0) if gateway.holdings.day == day else 0.0

    def _drop_old(self, day: int, now: float) -> None:
        self._gateways = {
            name: one
            for name, one in self._gateways.items()
            if one.holdings.day == day or now - one.told < FORGET_AFTER_S
        }


def _sum_of(gateways: list[_Gateway]) -> dict[str, Waiting]:
    found: dict[str, Waiting] = {}
    for gateway in gateways:
        for holder, one in gateway.holdings.waiting.items():
            known = found.get(holder, Waiting(one.priority, 0, 0.0))
            found[holder] = Waiting(
                max(known.priority, one.priority),
                known.count + one.count,
                max(known.longest_s, one.longest_s),
            )
    return found


def _latest(gateways: list[_Gateway], now: float) -> dict[str, float]:
    found: dict[str, float] = {}
    for gateway in gateways:
        for holder, seconds in gateway.holdings.served_s.items():
            ago = seconds + now - gateway.told
            found[holder] = min(found.get(holder, ago), ago)
    return found
