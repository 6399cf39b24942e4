"""Sessions leave replicas that are about to go: on a downscale, a rollout, the drain of a node, or an
operator's word.

A replica goes when Serve routes nothing to it any more, which every gateway's router is told at once. Its
sessions are brought to others, a few at a time and the shortest first: each is rebuilt there while it goes on
here, and switched between two frames. Where there is no room a session stays, and is tried again; what
becomes of it at the end of the drain is Serve's affair (`drain_timeout_s`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Protocol

from deployments.wire.orders import ENDED, MOVED, MovedSession

logger = logging.getLogger(__name__)

AT_ONCE = 4  # sessions that are moved at the same time, by one gateway
ASK_OVER_EVERY_S = 0.1  # one client after another: each is rebuilt where it comes to
RETRY_S = 1.0  # after a round in which nobody could be moved


class Movable(Protocol):
    """A session, as far as this is concerned."""

    @property
    def replica(self) -> str:
        """Where it has its slot, "" while it has none."""

    @property
    def frames(self) -> int:
        """Its length."""

    @property
    def session(self) -> str:
        """Its name."""

    def ask_over(self) -> bool:
        """Asks its client to come back by another gateway; False for one that cannot, or was asked before."""

    async def move(self) -> str:
        """Brings it to another replica; MOVED, or why it stayed (see `orders.MovedSession`)."""


class Moves:
    """The sessions of one gateway."""

    def __init__(self) -> None:
        self._sessions: set[Movable] = set()
        self._running: frozenset[str] = frozenset()
        self._task: asyncio.Future[None] | None = None

    def add(self, session: Movable) -> None:
        """It has a slot."""
        self._sessions.add(session)
        self._look()

    def remove(self, session: Movable) -> None:
        """It has ended. Idempotent."""
        self._sessions.discard(session)

    def running(self, replicas: Collection[str]) -> None:
        """The replicas that stay, by name. None at all is the end of the service, or a controller that has
        just begun: nobody is moved then."""
        self._running = frozenset(replicas)
        self._look()

    async def order(self, session: str, replica: str) -> list[MovedSession]:
        """Brings the session of this name, or all at this replica, to others; what came of each."""
        meant = [one for one in self._sessions if one.replica and session in ("", one.session)]
        meant = [one for one in meant if replica in ("", one.replica)]
        limit = asyncio.Semaphore(AT_ONCE)

        async def bring(one: Movable) -> MovedSession:
            async with limit:
                source = one.replica
                outcome = await one.move() if source and replica in ("", source) else ENDED
            return MovedSession(one.session, outcome, source, one.replica)

        return list(await asyncio.gather(*map(bring, sorted(meant, key=lambda one: one.frames))))

    async def ask_over(self) -> None:
        """Asks the clients of all sessions to come back by another gateway, one after another."""
        for one in list(self._sessions):
            if one in self._sessions and one.ask_over():
                await asyncio.sleep(ASK_OVER_EVERY_S)

    def _look(self) -> None:
        if self._leaving() and (self._task is None or self._task.done()):
            self._task = asyncio.ensure_future(self._run())

    def _leaving(self) -> list[Movable]:
        if not self._running:
            return []
        leaving = [one for one in self._sessions if one.replica and one.replica not in self._running]
        return sorted(leaving, key=lambda one: one.frames)

    async def _run(self) -> None:
        while leaving := self._leaving():
            moved = await asyncio.gather(*(one.move() for one in leaving[:AT_ONCE]), return_exceptions=True)
            for result in moved:
                if isinstance(result, BaseException):
                    logger.error("a session could not be moved", exc_info=result)
            if MOVED not in moved:
                await asyncio.sleep(RETRY_S)
