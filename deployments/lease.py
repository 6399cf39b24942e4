"""The right to one slot: what a replica grants and how a gateway gets it.

A lease is one long-lived streaming call to the replica deployment. Its first item is a Grant (or a Refusal);
it ends when the slot is free again. So Serve's count of ongoing calls is the count of sessions, for admission
and for autoscaling alike. `Leases.acquire` waits its turn among the sessions of this gateway, reports the
place in the queue, and bounds queue and wait. Between gateways the order is as good as chance: the calls that
wait lie in each gateway's own router, where Serve's autoscaling counts them, and none knows of the others'.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from personaplex.errors import NoCapacity, PersonaplexError, SessionLost

logger = logging.getLogger(__name__)

GRACE_S = 0.3  # without a slot for this long a session counts as queued
RETRY_S = 0.2  # between two tries after a replica refused or died


@dataclass(frozen=True)
class LeaseRequest:
    """All a replica needs to know before the session connects to it. Nothing in it was written by a client:
    `voice` is a name the gateway found in its own list, or empty."""

    session: str
    voice: str


@dataclass(frozen=True)
class Grant:
    """A slot is held until `token` is shown at host:port, or for the lease timeout."""

    host: str
    port: int
    token: bytes = field(repr=False)
    replica: str
    slots: int


@dataclass(frozen=True)
class Refusal:
    """The replica cannot take the session after all: it drains, or its engine has ended."""


class Lease:
    """A granted slot. Ends when the replica says so; `release` gives back one that was never used."""

    def __init__(self, grant: Grant, response: Any) -> None:
        self.grant = grant
        self._response = response
        self._end = asyncio.ensure_future(self._watch())

    async def wait_freed(self, timeout_s: float) -> bool:
        """Waits until the slot is free; False when that took longer than `timeout_s`."""
        done, _ = await asyncio.wait({self._end}, timeout=timeout_s)
        return bool(done)

    def release(self) -> None:
        """Gives the slot back whatever its state. Idempotent."""
        if not self._end.done():
            cancel(self._response)
            self._end.cancel()

    async def _watch(self) -> None:
        # A replica that dies ends the media link too, and that is where the session learns of it.
        with contextlib.suppress(RayError, RayServeException, StopAsyncIteration):
            while True:
                await self._response.__anext__()


@dataclass(eq=False)
class _Waiter:
    tell: Callable[[int], None]
    queued: bool = False
    told: int = 0


class Leases:
    """The sessions of one gateway that wait for a slot, first come first served."""

    def __init__(self, replicas: DeploymentHandle[Any], *, queue_limit: int, queue_timeout_s: float) -> None:
        self._call = replicas.options(method_name="lease", stream=True)
        self._queue_limit, self._queue_timeout_s = queue_limit, queue_timeout_s
        self._waiting: list[_Waiter] = []
        self._closed = asyncio.get_running_loop().create_future()

    @property
    def queued(self) -> int:
        return sum(waiter.queued for waiter in self._waiting)

    async def acquire(self, request: LeaseRequest, tell: Callable[[int], None]) -> Lease:
        """A slot. `tell(position)` is called when the session is queued and when it moves up, 1 being next.

        Raises NoCapacity when the queue is full or the wait too long, SessionLost when the service is being
        stopped. Cancelling gives everything back.
        """
        waiter = _Waiter(tell)
        self._waiting.append(waiter)
        try:
            return await self._acquire(request, waiter)
        finally:
            self._waiting.remove(waiter)
            self._announce()

    def close(self) -> None:
        """The service is being stopped: whoever waits, now or later, is told so. Idempotent."""
        if not self._closed.done():
            self._closed.set_result(None)

    async def _acquire(self, request: LeaseRequest, waiter: _Waiter) -> Lease:
        began = time.monotonic()
        warned = False
        while True:
            if self._closed.done():
                raise SessionLost("the server is being stopped; please connect again")
            attempt = _Attempt(self._call.remote(request), self._closed)
            try:
                if not await attempt.wait(GRACE_S if not waiter.queued else 0):
                    self._queue(waiter)
                    if not await attempt.wait(began + self._queue_timeout_s - time.monotonic()):
                        raise NoCapacity("no slot became free in time", self._queue_timeout_s)
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

    def _queue(self, waiter: _Waiter) -> None:
        if waiter.queued:
            return
        if self.queued >= self._queue_limit:
            raise NoCapacity("every slot is taken and the queue is full")
        waiter.queued = True
        self._announce()

    def _announce(self) -> None:
        queued = (waiter for waiter in list(self._waiting) if waiter.queued)
        for position, waiter in enumerate(queued, start=1):
            if waiter.told != position:
                waiter.told = position
                waiter.tell(position)


class _Attempt:
    """One call for a lease, up to its first item."""

    def __init__(self, response: Any, closed: asyncio.Future[None]) -> None:
        self.response = response
        self._first: asyncio.Future[Any] = asyncio.ensure_future(response.__anext__())
        self._closed = closed

    async def wait(self, timeout_s: float) -> bool:
        """Whether the first item came in time. Raises SessionLost when `closed` came before it."""
        await asyncio.wait(
            {self._first, self._closed}, timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED
        )
        if self._closed.done() and not self._first.done():
            raise SessionLost("the server is being stopped; please connect again")
        return self._first.done()

    def result(self, *, warn: bool) -> Grant | None:
        """The grant, or None when another try may do better; then one line of log if `warn`."""
        try:
            first = self._first.result()
        except (RayError, RayServeException, StopAsyncIteration) as error:
            if warn:
                logger.warning("a lease could not be had, trying again: %s", type(error).__name__)
            return None
        return first if isinstance(first, Grant) else None

    def cancel(self) -> None:
        self._first.cancel()
        cancel(self.response)


def cancel(response: Any) -> None:
    """Cancels a streaming call; one that failed before raises its old error here, and nobody needs it."""
    with contextlib.suppress(RayError, RayServeException, asyncio.CancelledError, PersonaplexError):
        response.cancel()
