"""What each key holds and uses: sessions at once and minutes a day, over all gateways, and seconds of talk.

The fleet judges a session of a key with a limit before it begins (wire/holdings.py). While the fleet is away
a gateway judges by its own sessions and, for REMEMBER_S, by what it last heard of the others: so it never
refuses for want of an answer, and at worst a limit holds for each gateway by itself. Every TICK_S the fleet
is told what is held here, less often while nothing is and more often while callers wait, since gateways take
turns by it; used seconds are counted, and sessions of keys whose minutes are used up, or that were revoked,
are ended. A label is the operator's; no key is in a log or a metric.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Protocol

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from deployments import metrics
from deployments.gateway.keys import Key, KeyTable
from deployments.gateway.turns import QueuedRequest, Turns
from deployments.metrics import Metrics
from deployments.wire.holdings import Elsewhere, Holdings, Judgement
from personaplex.errors import PersonaplexError, SessionExpired, TooManySessions, Unauthorized

logger = logging.getLogger(__name__)
usage = logging.getLogger("deployments.gateway.usage")

TICK_S = 1.0
QUEUE_TICK_S = 0.25  # while callers wait here
QUIET_REPORT_S = (
    2.9  # between two reports of a gateway where no key holds anything; the fleet forgets after 5
)
JUDGE_TIMEOUT_S = 2.0  # for the fleet's answer to a session that waits for it
REPORT_TIMEOUT_S = 2.0
FRESH_S = 0.05  # age of word about other queues that is good enough to take a turn by
FRESH_TIMEOUT_S = 0.2  # waited for it while a slot is free
REMEMBER_S = 60.0  # what was last heard of other gateways
SESSIONS_RETRY_S = 10.0
DAY_S = 86_400


class Talk(Protocol):
    """A conversation, as far as it is counted."""

    @property
    def talked_s(self) -> float:
        """Seconds since the handshake; 0 before it. The last value once it has ended."""

    def end(self, error: PersonaplexError) -> None:
        """Ends it with what its client is told."""


@dataclass
class _Held:
    """A session of one key."""

    key: Key
    began: float  # by the wall clock
    entered: float
    talk: Talk | None = None
    counted_s: float = 0.0


class Accounts:
    """One gateway's. `fleet` is a handle with `enter_session`, `leave_session` and `report_holdings`."""

    def __init__(
        self,
        fleet: Any,
        gateway: str,
        published: Metrics,
        turns: Turns,
        *,
        table: Callable[[], KeyTable],
        sessions_per_key: int,
        revoke_ends_sessions: bool,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`table` gives the keys of this moment."""
        self._fleet, self._gateway, self._metrics, self._turns = fleet, gateway, published, turns
        self._table, self._sessions_per_key, self._revoke = table, sessions_per_key, revoke_ends_sessions
        self._clock, self._wall = clock, wall
        self._held: dict[str, _Held] = {}
        self._day, self._seconds = self._today(), defaultdict[str, float](float)
        self._elsewhere, self._heard = Elsewhere(), float("-inf")
        self._was_busy = True  # at the last tick: that it no longer is has to be told
        self._leaving: set[asyncio.Future[None]] = set()
        self._queued: Callable[[], Iterable[QueuedRequest]] = tuple
        self._asking, self._asked = asyncio.Lock(), float("-inf")
        turns.ask = self._ask

    # One session

    @contextlib.asynccontextmanager
    async def enter(self, session: str, key: Key | None) -> Any:
        """Counts the session while it lasts. Raises TooManySessions for a key at one of its limits."""
        if key is None:
            yield
            return
        held = self._held[session] = _Held(key, self._wall(), self._clock())
        try:
            self._refuse(key, await self._judge(session, key))
            yield
        finally:
            self._leave(session, held)

    def attach(self, session: str, talk: Talk) -> None:
        """The conversation of a session that was let in; without effect where nothing is counted."""
        if session in self._held:
            self._held[session].talk = talk

    def close(self, session: str, cause: str) -> None:
        """The conversation has ended: one line of log says what it used."""
        held = self._held.get(session)
        if held is None or held.talk is None:
            return
        self._count(held)
        began = datetime.fromtimestamp(held.began, timezone.utc).isoformat(timespec="milliseconds")
        talked = held.talk.talked_s
        line = {
            "session": session,
            "label": held.key.shown,
            "began": began,
            "waited_s": round(max(0.0, self._clock() - held.entered - talked), 3),
            "talked_s": round(talked, 3),
            "cause": cause,
        }
        usage.info("%s", json.dumps(line))

    def holder_of(self, session: str) -> tuple[str, int] | None:
        """Whom a session counts for and its priority; None where nothing is counted."""
        held = self._held.get(session)
        return None if held is None else (held.key.holder, held.key.priority)

    def talks(self, session: str) -> bool:
        """Whether a session is past its handshake: it looks for another slot."""
        held = self._held.get(session)
        return held is not None and held.talk is not None and held.talk.talked_s > 0

    def check(self, key: Key | None) -> None:
        """Raises what `enter` would by what is known here, without asking anybody and counting anything."""
        if key is not None:
            self._refuse(key, self._judge_here(key, held=self._here(key)))

    def describe(self, key: Key) -> dict[str, Any]:
        """What `/api/key` answers, but for own voices."""
        limits = key.limits(self._sessions_per_key)
        return {
            "label": key.label,
            "sessions": {"held": self._here(key) + self._there(key.holder), "limit": limits.sessions},
            "minutes": {
                "used": round(self._used(key.holder) / 60, 2),
                "limit": key.minutes,
                "renews_s": round(self._renews_s()),
            },
            "priority": key.priority,
        }

    def _leave(self, session: str, held: _Held) -> None:
        self._count(held)
        if self._held.get(session) is not held:  # its client has come back, by another socket
            return
        del self._held[session]
        if held.key.limits(self._sessions_per_key).sessions:  # the next one need not wait for a report
            leaving = asyncio.ensure_future(self._tell_left(session))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)

    async def _tell_left(self, session: str) -> None:
        with contextlib.suppress(RayError, RayServeException):  # then the next report says so
            await _answer(self._fleet.leave_session.remote(self._gateway, session))

    # Limits

    async def _judge(self, session: str, key: Key) -> Judgement:
        limits = key.limits(self._sessions_per_key)
        if not limits.sessions and not limits.seconds_a_day:
            return "enter"
        here = self._judge_here(key, held=self._here(key) - 1, alone=True)
        if here != "enter":
            return here
        call = (self._gateway, session, key.holder, limits, self._today())
        try:
            asked = _answer(self._fleet.enter_session.remote(*call))
            verdict: Judgement = await asyncio.wait_for(asked, JUDGE_TIMEOUT_S)
        except (RayError, RayServeException, asyncio.TimeoutError) as error:
            logger.info("the fleet is away, a session was judged without it: %s", type(error).__name__)
            verdict = "unsure"
        return self._judge_here(key, held=self._here(key) - 1) if verdict == "unsure" else verdict

    def _judge_here(self, key: Key, *, held: int, alone: bool = False) -> Judgement:
        """By what is known here; `alone`, by this gateway's own sessions and seconds only."""
        limits = key.limits(self._sessions_per_key)
        if not alone:
            held += self._there(key.holder)
        used = self._seconds[key.holder] if alone else self._used(key.holder)
        if limits.sessions and held >= limits.sessions:
            return "sessions"
        return "minutes" if limits.seconds_a_day and used >= limits.seconds_a_day else "enter"

    def _refuse(self, key: Key, verdict: Judgement) -> None:
        if verdict == "sessions":
            count = key.limits(self._sessions_per_key).sessions
            raise TooManySessions(
                f"this key holds {count} session{'s' * (count != 1)}, as many as it may",
                SESSIONS_RETRY_S,
                "sessions",
            )
        if verdict == "minutes":
            raise TooManySessions(_minutes_used(key), self._renews_s(), "minutes")

    def _here(self, key: Key) -> int:
        return sum(one.key.holder == key.holder for one in self._held.values())

    def _there(self, holder: str) -> int:
        fresh = self._clock() - self._heard < REMEMBER_S
        return self._elsewhere.sessions.get(holder, 0) if fresh else 0

    def _used(self, holder: str) -> float:
        return self._seconds[holder] + self._elsewhere.seconds.get(holder, 0.0)

    # Time

    async def run(self, queued: Callable[[], Iterable[QueuedRequest]]) -> None:
        """Counts, reports and ends sessions, for ever; `queued` gives those that wait for a slot."""
        self._queued, due = queued, float("-inf")
        while True:
            waiting = list(queued())
            if waiting or self._clock() >= due:
                due = self._clock() + TICK_S
                self.tick()
                busy = bool(self._held or waiting)
                # A call to the fleet costs as much as 30 frames: who holds nothing makes fewer, and where
                # there are no keys nobody holds anything.
                quiet = self._clock() - self._heard
                if busy or self._was_busy or (self._table() and quiet >= QUIET_REPORT_S):
                    await self._report(waiting)
                self._was_busy = busy
            await asyncio.sleep(QUEUE_TICK_S)

    def tick(self) -> None:
        """Counts what was used since the last one, and ends what may not go on."""
        if self._today() != self._day:
            self._day, self._seconds = self._today(), defaultdict(float)
            self._elsewhere = Elsewhere(self._elsewhere.sessions)
        for held in list(self._held.values()):
            self._count(held)
        for held, error in list(self._overdue()):
            assert held.talk is not None
            held.talk.end(error)

    def _count(self, held: _Held) -> None:
        talked = 0.0 if held.talk is None else held.talk.talked_s
        more, held.counted_s = talked - held.counted_s, talked
        if more > 0:
            self._seconds[held.key.holder] += more
            self._metrics.add(metrics.KEY_SECONDS, more, label=held.key.shown)

    def _overdue(self) -> Iterator[tuple[_Held, PersonaplexError]]:
        table = self._table()
        for held in self._held.values():
            if held.talk is None:
                continue
            if self._revoke and not table.holds(held.key):
                yield held, Unauthorized("the API key of this session was revoked")
            elif held.key.minutes and self._used(held.key.holder) >= 60 * held.key.minutes:
                yield held, SessionExpired(_minutes_used(held.key))

    async def _ask(self) -> None:
        """Word of the others that is FRESH_S old at most, where the fleet has it in time."""
        async with self._asking:
            if self._clock() - self._asked >= FRESH_S:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._report(self._queued()), FRESH_TIMEOUT_S)
                self._asked = self._clock()

    async def _report(self, queued: Iterable[QueuedRequest]) -> None:
        holdings = Holdings(
            day=self._day,
            sessions={name: one.key.holder for name, one in self._held.items()},
            seconds=dict(self._seconds),
            waiting=self._turns.waiting(queued),
            served_s=self._turns.served_s(DAY_S),
        )
        try:
            asked = _answer(self._fleet.report_holdings.remote(self._gateway, holdings))
            self._elsewhere = await asyncio.wait_for(asked, REPORT_TIMEOUT_S)
        except (RayError, RayServeException, asyncio.TimeoutError) as error:
            logger.debug("the fleet could not be told what keys hold: %s", type(error).__name__)
            return
        self._heard = self._clock()
        self._turns.heard(self._elsewhere)

    def _today(self) -> int:
        return int(self._wall() // DAY_S)

    def _renews_s(self) -> float:
        return DAY_S - self._wall() % DAY_S


def _minutes_used(key: Key) -> str:
    return f"this key has used its {key.minutes:g} minutes of today (UTC)"


async def _answer(response: Any) -> Any:
    return await response
