"""Connections that have not shown what they are for: each has a time to do so, and only so many may wait."""

from __future__ import annotations

import asyncio

from deployments.wire.link import Link
from personaplex.errors import PersonaplexError, SessionLost

SPARE = 16  # connections beyond two per slot


class Unauthenticated:
    """One replica's; runs on its event loop."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._timers: dict[Link, asyncio.TimerHandle] = {}  # oldest first

    def add(self, link: Link, slots: int) -> None:
        """A connection came in, of a replica that has so many slots."""
        loop = asyncio.get_running_loop()
        self._timers[link] = loop.call_later(
            self._limit_s, self.reject, link, SessionLost("nothing was said in time")
        )
        # A gateway claims as soon as it is connected, so the oldest is the likeliest never to.
        if len(self._timers) > 2 * slots + SPARE:
            self.reject(next(iter(self._timers)), SessionLost("too many connections without a lease"))

    def remove(self, link: Link) -> None:
        """It has shown what it is for, or is gone. Idempotent."""
        timer = self._timers.pop(link, None)
        if timer is not None:
            timer.cancel()

    def reject(self, link: Link, error: PersonaplexError) -> None:
        self.remove(link)
        link.close(error)
