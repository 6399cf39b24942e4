"""How a session whose replica was lost, or is silent, gets to another one.

    1 the sessions that were lost together ask for slots in the order of their lengths
    2 a lease and a link, never to the replica that was lost, nor to one that refused this session
    3 the log is sent as it stands; the replica rebuilds the session between its ticks
    4 the slot is ready: the frames that wait are sent, and the session goes on there (`Upstream`)

Steps 2 to 4 are repeated while replicas are lost on the way or refuse, within the time a session may wait for
a slot. A replica that does not know the log or the link refuses by type; the session stays where it is if it
still is anywhere. A session that is lost again and again without having gone on is ended: it may be what
kills its replicas.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from deployments.gateway.leases import RETRY_S, Leases
from deployments.gateway.slot import Slot
from deployments.gateway.suspects import ShortestFirst, Suspects
from deployments.wire.messages import LeaseRequest
from deployments.wire.orders import ENDED
from personaplex.config import REBUILD_AUDIO_S
from personaplex.errors import (
    ClientError,
    EngineFault,
    NoCapacity,
    PersonaplexError,
    RepeatedlyLost,
    SessionLost,
    TooManySessions,
)
from personaplex.sessionlog import SessionRecorder

LOST_LIMIT = 3  # replicas in a row, before the session said anything
LOST_WORDS = "the server running this session failed; please connect again"

LOST, SILENT, MOVED = "lost", "silent", "moved"  # why


@dataclass(frozen=True)
class Failovers:
    """What the sessions of one gateway share. `after_s`: a replica that owes an answer for so long is silent.
    `audio_s`: of the user's sound that is kept. `limit_s`: the longest search."""

    after_s: float = 1.5
    audio_s: float = REBUILD_AUDIO_S
    limit_s: float = 60.0
    suspects: Suspects = field(default_factory=lambda: Suspects(time.monotonic))
    order: ShortestFirst = field(default_factory=ShortestFirst)


@dataclass
class Times:
    """When each step of one failover was done, in seconds of the monotonic clock."""

    answered: float  # by the old replica, last
    noticed: float
    slot: float = 0.0  # lease and link are there
    ready: float = 0.0

    def phases(self) -> dict[str, float]:
        """Seconds of each step."""
        return {
            "detection": self.noticed - self.answered,
            "slot": self.slot - self.noticed,
            "rebuild": self.ready - self.slot,
        }


class Failover:
    """One search. `candidate` is the slot that is being rebuilt, if there is one now."""

    def __init__(
        self,
        session: str,
        cause: str,
        recorder: SessionRecorder,
        shared: Failovers,
        leases: Leases,
        make_slot: Callable[[], Slot],
        leave: Callable[[Slot], None],
        *,
        lost: Slot,
        since: float,
        losses: int,
    ) -> None:
        """`lost`: the slot of the replica that is left. `since`: its last answer. `leave` gives a slot
        back."""
        self.cause, self.losses = cause, losses
        self.times = Times(since, time.monotonic())
        self.candidate: Slot | None = None
        self.stopped = False  # the whole service is being stopped
        self._session, self._recorder, self._shared, self._leases = session, recorder, shared, leases
        self._make_slot, self._leave = make_slot, leave
        self._lost = lost
        self._refused: dict[str, PersonaplexError] = {}
        self.continued = False  # a candidate has taken over
        self.outcome = ENDED  # why not, once the search has failed
        self._outcome: asyncio.Future[PersonaplexError | None] | None = None

    async def run(self) -> None:
        """Returns once a candidate has taken over.

        Raises NoCapacity, SessionLost, or what the last replica refused the session with. Cancelling gives
        everything back.
        """
        began = time.monotonic()
        await self._shared.order.turn(len(self._recorder.tokens))
        while True:
            try:
                error = await self._try_one()
            except SessionLost:  # no slot is given any more
                self.stopped = True
                raise
            except (NoCapacity, TooManySessions) as full:  # the latter: the queue's last places are others'
                found = NoCapacity(str(full), full.retry_after_s)
                raise next(iter(self._refused.values()), found) from None
            if error is None:
                return
            if self.losses > LOST_LIMIT:
                raise RepeatedlyLost(LOST_WORDS)
            if time.monotonic() - began > self._shared.limit_s:
                raise error
            await asyncio.sleep(RETRY_S)

    def ready(self) -> None:
        """The candidate is live."""
        self.times.ready = time.monotonic()

    def taken(self) -> None:
        """The candidate is the session's slot from now on."""
        self.continued = True
        self._finish(None)

    def ended(self, error: PersonaplexError | None) -> None:
        """The candidate is of no use: refused with `error`, or gone without a word."""
        self._finish(SessionLost(LOST_WORDS) if error is None else error)

    def _finish(self, error: PersonaplexError | None) -> None:
        if self._outcome is not None and not self._outcome.done():
            self._outcome.set_result(error)

    async def _try_one(self) -> PersonaplexError | None:
        """One slot, until it has taken over or ended. The error that ended it, if another may do better."""
        claim = await self._leases.claim(self._request())
        slot, taken = self._make_slot(), False
        try:
            await slot.join(claim, lambda _: None)
            await slot.connect()
            self.times.slot = time.monotonic()
            self._outcome = asyncio.get_running_loop().create_future()
            self.candidate = slot
            await self._begin(slot)
            error = await self._outcome
            taken = error is None
            if error is not None:
                self._judge(error, slot.replica)
            return error
        except OSError:
            self._shared.suspects.add(slot.replica)
            return SessionLost(LOST_WORDS)
        finally:
            self.candidate = None
            claim.give_up()
            if not taken:
                self._leave(slot)

    def _request(self) -> LeaseRequest:
        excluded = {self._lost.replica, *self._refused}
        if self._lost.ended:  # after a while the same replica may do: perhaps only the link was cut
            excluded.discard(self._lost.replica)
        return LeaseRequest.of(self._session, self._recorder.persona, excluded)

    async def _begin(self, slot: Slot) -> None:
        if not len(self._recorder.tokens):
            slot.open(self._recorder.persona)
            return
        log = self._recorder.log()
        packed = await asyncio.to_thread(log.pack)  # some megabytes
        if not slot.ended:
            slot.rebuild(packed, log.frames)

    def _judge(self, error: PersonaplexError, replica: str) -> None:
        """What to make of a candidate that ended. Raises its error where no other replica is to be tried."""
        if isinstance(error, NoCapacity):
            return
        if isinstance(error, SessionLost | EngineFault):
            self.losses += 1
            self._shared.suspects.add(replica)
            return
        if not self._lost.ended or (isinstance(error, ClientError) and not len(self._recorder.tokens)):
            raise error
        self._refused[replica] = error
