"""The fleet deployment: who is where. One small process that every replica reports to.

Replicas hold as many calls as they have slots, so a full one could not be asked anything; this one can. It
knows what replicas last said, and tells them when the service ends. Nothing depends on it to start or hold a
session: should it end, Serve starts it again and the next reports fill it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

logger = logging.getLogger(__name__)

REPORT_EVERY_S = 1.0
FORGET_AFTER_S = 5.0  # without a report
SETTLE_S = 0.02  # changes that come together make one report
ASK_TIMEOUT_S = 2.0
ASK_EVERY_S = 0.5


@dataclass(frozen=True)
class SessionStatus:
    """One session that holds a slot: its name and age."""

    session: str
    seconds: float


@dataclass(frozen=True)
class ReplicaStatus:
    """What one replica says of itself. No personal content."""

    replica: str
    node: str
    pid: int
    model: str
    voices: tuple[str, ...]
    slots: int
    accepting: bool
    sessions: tuple[SessionStatus, ...]

    @property
    def used(self) -> int:
        return len(self.sessions)


class Fleet:
    """Made by Serve, once per application."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[ReplicaStatus, float]] = {}
        self._closing = False
        self._end = asyncio.Event()
        self._gateways: set[str] = set()

    async def report(self, status: ReplicaStatus) -> bool:
        """Takes a replica's word; the answer is whether it shall let go of its sessions."""
        self._known[status.replica] = (status, time.monotonic())
        return self._closing

    async def leave(self, replica: str) -> None:
        """The replica ends."""
        self._known.pop(replica, None)

    async def describe(self) -> list[ReplicaStatus]:
        """Every replica heard of lately, in the order of their names."""
        since = time.monotonic() - FORGET_AFTER_S
        self._known = {name: entry for name, entry in self._known.items() if entry[1] >= since}
        return [self._known[name][0] for name in sorted(self._known)]

    async def close(self) -> None:
        """The service ends: every replica lets go of its sessions, within about REPORT_EVERY_S, and every
        gateway of those that wait for a slot."""
        self._closing = True
        self._end.set()

    async def wait_close(self, gateway: str) -> None:
        """Returns when the service ends. The gateway then tells whoever waits, and calls `closed`."""
        self._gateways.add(gateway)
        await self._end.wait()

    async def closed(self, gateway: str) -> None:
        """Nobody waits in this gateway any more."""
        self._gateways.discard(gateway)

    async def held(self) -> int:
        """Slots in use and gateways that have not told those who wait; 0 once `close` is done."""
        return len(self._gateways) + sum(replica.used for replica in await self.describe())


class Reporter:
    """A replica's side: reports at every change and every REPORT_EVERY_S; `on_leave` when told to let go."""

    def __init__(
        self,
        fleet: DeploymentHandle[Any],
        status: Callable[[], ReplicaStatus],
        on_leave: Callable[[], None],
    ) -> None:
        self._fleet, self._status, self._on_leave = fleet, status, on_leave
        self._changed = asyncio.Event()
        self._task = asyncio.ensure_future(self._report())

    def changed(self) -> None:
        """The status is another one now."""
        self._changed.set()

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(RayError, RayServeException, asyncio.TimeoutError):
            await asyncio.wait_for(_answer(self._fleet.leave.remote(self._status().replica)), ASK_TIMEOUT_S)

    async def _report(self) -> None:
        while True:
            self._changed.clear()
            try:
                if await _answer(self._fleet.report.remote(self._status())):
                    self._on_leave()
            except (RayError, RayServeException) as error:
                logger.warning("the fleet could not be told: %s", type(error).__name__)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), REPORT_EVERY_S)
            await asyncio.sleep(SETTLE_S)


class Observer:
    """A gateway's side: the fleet as of at most ASK_EVERY_S ago."""

    def __init__(self, fleet: DeploymentHandle[Any]) -> None:
        self._fleet = fleet
        self._asking = asyncio.Lock()
        self._known: list[ReplicaStatus] = []
        self._asked = float("-inf")

    async def wait_close(self, gateway: str, close: Callable[[], Awaitable[None]]) -> None:
        """Awaits `close()` once the service ends. To be run as a task for as long as the gateway lives."""
        while True:
            try:
                await _answer(self._fleet.wait_close.remote(gateway))
                await close()
                await _answer(self._fleet.closed.remote(gateway))
                return
            except (RayError, RayServeException) as error:  # the fleet has ended and will be there again
                logger.info("the fleet is away: %s", type(error).__name__)
                await asyncio.sleep(REPORT_EVERY_S)

    async def describe(self) -> list[ReplicaStatus]:
        """[] while no replica is there, and when the fleet does not answer."""
        async with self._asking:
            if time.monotonic() - self._asked >= ASK_EVERY_S:
                try:
                    self._known = await asyncio.wait_for(
                        _answer(self._fleet.describe.remote()), ASK_TIMEOUT_S
                    )
                except (RayError, RayServeException, asyncio.TimeoutError):
                    self._known = []
                self._asked = time.monotonic()
            return self._known


async def _answer(response: Any) -> Any:
    return await response
