"""The right to one slot: how a gateway gets it from a replica.

A lease is one long-lived streaming call to the replica deployment. Its first item is a Grant (or a Refusal);
it ends when the slot is free again. So Serve's count of ongoing calls is the count of sessions, for admission
and for autoscaling alike. `Leases.claim` tells at once whether a session gets a slot, a place in the queue of
this gateway or neither; the Claim waits its turn, reports its place, and bounds the wait. The calls that wait
lie in the gateway's own router, where Serve's autoscaling counts them; turns.py has their order. Replicas
that this gateway suspects are left out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.serve.handle import DeploymentHandle

from deployments.gateway.lease import Attempt, HeldSlot, Lease
from deployments.gateway.suspects import Suspects
from deployments.gateway.turns import QueuedRequest, Turns
from deployments.policy import GRACE_S
from deployments.wire.messages import LeaseRequest
from personaplex.errors import NoCapacity, SessionLost, TooManySessions

RETRY_S = 0.2  # between two tries after a replica refused or died
QUEUE_RETRY_S = 10.0  # Retry-After for a key that has as many callers in the queue as it may

Who = Callable[[str], tuple[str, int] | None]  # a session -> whom it counts for, and its priority


@dataclass(eq=False)
class Waiter:
    """A session without a slot yet."""

    request: QueuedRequest
    placed: asyncio.Future[None]  # done once it is queued
    on_position: Callable[[int], None] | None = None
    queued: bool = False
    position: int = 0  # as last announced

    def announce(self, position: int) -> None:
        if self.position != position:
            self.position = position
            if self.on_position is not None:
                self.on_position(position)


class Claim:
    """What `Leases.claim` gave: a slot, or a place in the queue that leads to one. `began` is when it was
    asked for, by the monotonic clock."""

    def __init__(self, waiter: Waiter, turn: asyncio.Future[Lease], began: float) -> None:
        self.began = began
        self._waiter, self._turn = waiter, turn
        self._taken = False

    async def lease(self, on_position: Callable[[int], None]) -> Lease:
        """Waits for the slot. `on_position(n)` is called with the place in the queue, if the session is
        queued, and whenever it moves up; 1 is next.

        Raises NoCapacity when the wait is too long. Cancelling gives everything back.
        """
        self._waiter.on_position = on_position
        if self._waiter.position:
            on_position(self._waiter.position)
        try:
            lease = await self._turn
        except BaseException:
            self.give_up()
            raise
        self._taken = True
        return lease

    def give_up(self) -> None:
        """Gives back whatever `lease` has not handed out. Idempotent."""
        if self._taken:
            return
        self._taken = True
        if not self._turn.done():
            self._turn.cancel()
        elif not self._turn.cancelled() and self._turn.exception() is None:
            self._turn.result().release()


class Leases:
    """The sessions of one gateway that wait for a slot, in the order of `turns`.

    `who` says whom a session counts for; `shared` whether it must leave places of the queue to others;
    `granted` is called when it has its slot, `freed` when a slot was given back, with the seconds that it was
    held. `changes` grows whenever places in the queue may have changed.
    """

    def __init__(
        self,
        replicas: DeploymentHandle[Any],
        *,
        queue_limit: int,
        queue_timeout_s: float,
        suspects: Suspects | None = None,
        turns: Turns | None = None,
        who: Who = lambda session: None,
        shared: Callable[[str], bool] = lambda session: False,
        granted: Callable[[str], None] = lambda session: None,
        freed: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.suspects = suspects or Suspects(time.monotonic)
        self._call = replicas.options(method_name="lease", stream=True)
        self._queue_limit, self._queue_timeout_s = queue_limit, queue_timeout_s
        self._turns, self._who, self._shared = turns or Turns(time.monotonic), who, shared
        self._granted, self._freed = granted, freed
        self._held: dict[Lease, HeldSlot] = {}
        self.changes = 0
        self._waiting: list[Waiter] = []
        self._closed = asyncio.get_running_loop().create_future()

    @property
    def queued(self) -> int:
        return sum(waiter.queued for waiter in self._waiting)

    @property
    def queue_full(self) -> bool:
        return self.queued >= self._queue_limit

    def waiting(self) -> list[QueuedRequest]:
        """Those in the queue, in the order in which they will get their slots."""
        queued = [waiter.request for waiter in self._waiting if waiter.queued]
        return self._turns.order(queued) if queued else []

    def held(self) -> list[HeldSlot]:
        """The slots that this gateway's sessions hold."""
        return list(self._held.values())

    async def claim(self, request: LeaseRequest) -> Claim:
        """Returns as soon as the session has a slot or a place in the queue.

        Raises NoCapacity when it gets neither, TooManySessions when others' places are left but none of its
        own, SessionLost when the service is being stopped. Cancelling gives everything back.
        """
        began = time.monotonic()
        holder, priority = self._who(request.session) or ("", 0)
        mine = QueuedRequest(
            request.session, request.voice, request.excluded, holder, priority, began, self._turns
        )
        waiter = Waiter(mine, asyncio.get_running_loop().create_future())
        turn = asyncio.ensure_future(self._wait_turn(waiter))
        claim = Claim(waiter, turn, began)
        try:
            known: set[asyncio.Future[Any]] = {turn, waiter.placed}
            await asyncio.wait(known, return_when=asyncio.FIRST_COMPLETED)
            if turn.done():
                turn.result()  # raises what it ended with
        except BaseException:
            claim.give_up()
            raise
        return claim

    async def _wait_turn(self, waiter: Waiter) -> Lease:
        self._waiting.append(waiter)
        try:
            lease = await self._acquire(waiter.request, waiter)
            self._turns.granted(waiter.request)
            self._hold(waiter.request.session, lease)
            self._granted(waiter.request.session)
            return lease
        finally:
            self._turns.gone(waiter.request)
            self._waiting.remove(waiter)
            self._announce()

    def _hold(self, session: str, lease: Lease) -> None:
        held = self._held[lease] = HeldSlot(session, lease.grant.replica, time.monotonic())

        def end(well: bool) -> None:
            del self._held[lease]
            if well:
                self._freed(time.monotonic() - held.since)

        lease.on_end(end)

    def close(self) -> None:
        """Graceful shutdown: claims that wait, and later ones, raise SessionLost. Idempotent."""
        if not self._closed.done():
            self._closed.set_result(None)

    async def _acquire(self, request: LeaseRequest, waiter: Waiter) -> Lease:
        began = time.monotonic()
        warned = False
        while True:
            if self._closed.done():
                raise SessionLost("the server is being stopped; please connect again")
            suspected = self.suspects.names()
            attempt = Attempt(self._call.remote(request.without(suspected)), self._closed)
            try:
                if not await attempt.wait(GRACE_S if not waiter.queued else 0):
                    self._queue(waiter)
                    left, again = began + self._queue_timeout_s - time.monotonic(), self.suspects.again_in_s()
                    if not await attempt.wait(min(left, again)):
                        if left <= again:
                            raise NoCapacity("no slot became free in time", self._queue_timeout_s)
                        attempt.cancel()  # a replica that was left out may be asked again
                        continue
                grant = attempt.result(warn=not warned)
            except BaseException:
                attempt.cancel()
                raise
            if grant is not None:
                return Lease(grant, attempt.response)
            warned = True
            self._queue(waiter)
            if time.monotonic() - began > self._queue_timeout_s:
                raise NoCapacity("no slot became free in time", self._queue_timeout_s)
            await asyncio.sleep(RETRY_S)

    def _queue(self, waiter: Waiter) -> None:
        if waiter.queued:
            return
        if self.queue_full:
            raise NoCapacity("every slot is taken and the queue is full")
        request, others = waiter.request, [one.request for one in self._waiting if one.queued]
        if self._shared(request.session) and self._turns.full_for(request.holder, others, self._queue_limit):
            words = "this key has as many callers in the queue as it may"
            raise TooManySessions(words, QUEUE_RETRY_S, "queue")
        waiter.queued = True
        self._announce()
        waiter.placed.set_result(None)

    def _announce(self) -> None:
        self.changes += 1
        waiters = {id(waiter.request): waiter for waiter in self._waiting}
        for position, request in enumerate(self.waiting(), start=1):
            waiters[id(request)].announce(position)
