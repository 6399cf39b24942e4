"""Which slot a session has, and the search for another where its replica is lost, silent or about to go.

A current slot that is lost can answer no more, so a candidate takes its place as soon as it is ready. One
that is only silent is valid until then: if it has caught up before, the search is given up. A session that is
moved leaves its old replica as soon as the new one has said as much.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from deployments import metrics
from deployments.gateway.failover import LOST, LOST_LIMIT, LOST_WORDS, MOVED, SILENT, Failover
from deployments.gateway.progress import Progress
from deployments.gateway.services import Services
from deployments.gateway.silence import SilenceWatch
from deployments.gateway.slot import Slot, UserFrame
from deployments.gateway.stats import SessionStats
from deployments.wire.orders import BUSY, ENDED
from personaplex.errors import (
    EngineFault,
    LogRefused,
    NoCapacity,
    PersonaplexError,
    RepeatedlyLost,
    SessionLost,
    SessionTaken,
    UnknownVersion,
)
from personaplex.session.events import Event, Failed, SessionNotice

logger = logging.getLogger(__name__)

CAUGHT_UP = 2  # frames without an answer, of a replica that keeps up
SETTLED_FRAMES = 25  # answered: whatever lost the replica before, the session is not to blame
# What clients are told that asked for status.
INTERRUPTED, CONTINUED, RECONNECT = "interrupted", "continued", "reconnect"
LEAVE_TIMEOUT_S = 2.0  # for a replica to say that a slot is free


class Handover:
    """One session's. `current` is its slot once it has been asked for; `live` from its handshake on."""

    def __init__(
        self,
        session: str,
        services: Services,
        stats: SessionStats,
        progress: Progress,
        emit: Callable[[Event], None],
        make_slot: Callable[[], Slot],
        ticket: Callable[[int], dict[str, Any]],
    ) -> None:
        """`ticket`: what the client of a slot with this generation is sent to come back with."""
        self.current: Slot | None = None
        self.live = self.stopped = False
        self._session, self._services, self._stats, self._progress = session, services, stats, progress
        self._emit, self._make_slot, self._ticket = emit, make_slot, ticket
        self._metrics = services.metrics
        self._failover: Failover | None = None
        self._search: asyncio.Future[None] | None = None
        self._measured: Failover | None = None  # took over, but has not caught up yet
        self._losses = 0  # since the session last said anything
        self._settled = 0  # from this number on
        self._interrupted = self._asked_over = False
        self._announced: Slot | None = None  # whose token the client was sent
        self._watch = SilenceWatch(services.failovers.after_s, self._owed, self._on_silent)

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The current slot and the candidate, as far as there are any."""
        if self._failover is None:
            return () if self.current is None else (self.current,)
        return tuple(slot for slot in (self.current, self._failover.candidate) if slot is not None)

    @property
    def replica(self) -> str:
        """Where the session goes on, "" before it does and once it has ended."""
        return self.current.replica if self.live and not self.stopped and self.current is not None else ""

    @property
    def frames(self) -> int:
        """Answered so far."""
        return self._progress.frames

    @property
    def session(self) -> str:
        """Its name."""
        return self._session

    async def move(self) -> str:
        """Brings the session to another replica while it goes on at its own; MOVED, or why it stayed."""
        if not self.replica:
            return ENDED
        if self._failover is not None:
            return BUSY
        failover = self._begin(MOVED)
        assert self._search is not None
        await asyncio.wait({self._search})
        return MOVED if failover.continued else failover.outcome

    def ask_over(self) -> bool:
        """Asks the client to come back by another gateway; False for one that cannot, or was asked before, or
        whose session is at no replica now: only this gateway has its log."""
        somewhere = bool(self.replica) and self.current is not None and not self.current.ended
        if self._asked_over or not somewhere or not self._ticket(0):
            return False
        self._asked_over = True
        self._emit(SessionNotice(RECONNECT))
        return True

    def stop(self) -> None:
        """No slot takes over any more."""
        self.stopped = True
        self._watch.stop()
        if self._search is not None:
            self._search.cancel()

    async def wait_stopped(self) -> None:
        """Returns once a search that was stopped has given back what it had."""
        if self._search is not None:
            await asyncio.wait({self._search})

    # What happens to the slots

    def asked(self) -> None:
        """A frame was sent to the slots that are ready."""
        if len(self._progress.unanswered) == 1:
            self._watch.asked()

    def ready(self, slot: Slot) -> None:
        """One of the slots is live now."""
        if self._failover is not None:
            self._failover.ready()
        if not self.live:
            self.live, self._announced = True, slot

    def fed(self, slot: Slot, owes: bool) -> None:
        """A slot that is ready has got what waited for it; `owes` if there was anything to answer."""
        candidate = self._failover is not None and slot is self._failover.candidate
        assert self.current is not None
        if candidate and (self.current.ended or not owes):
            self.take_over(slot)
        self._watch.restart()

    def late(self, slot: Slot, frame: int) -> None:
        """A slot has answered a frame that another one answered before."""
        moving = self._failover is not None and self._failover.cause == MOVED
        if moving and slot is not self.current and frame == self._progress.frames - 1:
            self.take_over(slot)

    def heard(self) -> None:
        """The answer was in order."""
        self._watch.heard()

    def progressed(self, number: int, frame: UserFrame | None) -> None:
        """The answer with this number, to `frame`, has been dealt with."""
        if self._losses and number >= self._settled:
            self._losses = 0
        if self._interrupted and len(self._progress.unanswered) <= CAUGHT_UP:
            self._withdraw()
        elif self._measured is not None:
            self._measure(self._measured, frame)

    def ended(self, slot: Slot, error: PersonaplexError | None) -> None:
        """One of the slots is of no use any more: closed with `error`, or gone without a word."""
        if self.stopped:
            return
        if isinstance(error, SessionTaken):
            self._emit(Failed(error))
        elif self._failover is not None and slot is self._failover.candidate:
            self._failover.ended(error)
        elif slot is self.current:
            if error is not None and not isinstance(error, SessionLost | EngineFault | UnknownVersion):
                self._emit(Failed(error))
                return
            self._services.failovers.suspects.add(slot.replica)
            self._lose(error)

    # The search

    def _owed(self) -> bool:
        current = self.current
        return bool(self._progress.unanswered) and current is not None and current.ready and not current.ended

    def _on_silent(self) -> None:
        if self._failover is None and not self.stopped:
            assert self.current is not None
            self._services.failovers.suspects.add(self.current.replica)
            self._begin(SILENT)

    def _lose(self, error: PersonaplexError | None) -> None:
        """The current slot is gone."""
        self._losses += 1
        if self._losses > LOST_LIMIT:
            self._emit(Failed(RepeatedlyLost(str(error) if error else LOST_WORDS)))
        elif self._failover is None:
            self._begin(LOST)
        elif self._failover.candidate is not None and self._failover.candidate.ready:
            self.take_over(self._failover.candidate)

    def _begin(self, cause: str) -> Failover:
        assert self._progress.recorder is not None
        assert self.current is not None
        self._failover = Failover(
            self._session,
            cause,
            self._progress.recorder,
            self._services.failovers,
            self._services.leases,
            self._make_slot,
            self._leave,
            lost=self.current,
            since=self._watch.since if self._progress.unanswered else time.monotonic(),
            losses=self._losses,
        )
        self._search = asyncio.ensure_future(self._run(self._failover))
        if self.live and not self._interrupted and cause != MOVED:
            self._interrupted = True
            self._emit(SessionNotice(INTERRUPTED))
        return self._failover

    async def _run(self, failover: Failover) -> None:
        try:
            await failover.run()
        except PersonaplexError as error:
            self._fail(failover, error)
        except Exception:  # a task root: the client is told, the log has the reason
            logger.exception("session %s: its failover failed", self._session)
            self._fail(failover, SessionLost(LOST_WORDS))

    def _fail(self, failover: Failover, error: PersonaplexError) -> None:
        """No other replica can be had: the end, unless the old one may still answer."""
        assert self.current is not None
        self._failover = None
        failover.outcome = _outcome(error)
        if not failover.stopped:
            self._count(failover, failover.outcome)
        if self.current.ended:
            self._emit(Failed(error))
        else:
            self._watch.restart()

    def take_over(self, slot: Slot) -> None:
        """`slot`, the candidate, is the session's from now on."""
        assert self._failover is not None
        assert self.current is not None
        failover, old = self._failover, self.current
        self.current, self._failover = slot, None
        self._measured = None if failover.cause == MOVED else failover
        self._losses, self._settled = failover.losses, self._progress.frames + SETTLED_FRAMES
        failover.taken()
        self._leave(old)
        self._count(failover, "continued")
        phases = {f"{name}_s": round(seconds, 4) for name, seconds in failover.times.phases().items()}
        self._stats.note(replica=slot.replica, generation=slot.generation)
        fields = {"session": self._session, "cause": failover.cause, "from": old.replica, **phases}
        fields |= {"to": slot.replica, "generation": slot.generation, "frame": self._progress.frames}
        logger.info("session %s goes on at another replica", self._session, extra={"fields": fields})
        self._continue(slot, **phases)

    def _count(self, failover: Failover, outcome: str) -> None:
        self._metrics.add(metrics.MOVES if failover.cause == MOVED else metrics.FAILOVERS, outcome=outcome)

    def _continue(self, slot: Slot, **details: Any) -> None:
        if self._interrupted or slot is not self._announced:
            self._interrupted, self._announced = False, slot
            told = {"generation": slot.generation, "frame": self._progress.frames, **details}
            self._emit(SessionNotice(CONTINUED, {**told, **self._ticket(slot.generation)}))

    def _withdraw(self) -> None:
        """The silent replica answers again and has caught up."""
        assert self.current is not None
        if self._failover is not None and self._search is not None:
            self._failover = None
            self._search.cancel()
            self._metrics.add(metrics.FAILOVERS, outcome="recovered")
        self._services.failovers.suspects.clear(self.current.replica)
        self._continue(self.current)

    def _measure(self, failover: Failover, frame: UserFrame | None) -> None:
        now, times = time.monotonic(), failover.times
        if self._progress.frames == self._settled - SETTLED_FRAMES + 1:
            phases = {**times.phases(), "answer": now - times.ready, "gap": now - times.answered}
            for phase, seconds in phases.items():
                self._metrics.observe(metrics.FAILOVER_SECONDS, seconds, phase=phase)
        if frame is None or frame.arrived >= times.ready or not self._progress.unanswered:
            self._measured = None
            self._metrics.observe(metrics.FAILOVER_SECONDS, now - times.ready, phase="catch_up")

    def _leave(self, slot: Slot) -> None:
        """Gives a slot back without keeping the session waiting."""
        slot.close()
        leaving = asyncio.ensure_future(slot.release(LEAVE_TIMEOUT_S))
        self._services.ending.add(leaving)
        leaving.add_done_callback(self._services.ending.discard)


def _outcome(error: PersonaplexError) -> str:
    """Of a failover that found no replica."""
    if isinstance(error, NoCapacity):
        return "no_capacity"
    return "refused" if isinstance(error, LogRefused) else "failed"
