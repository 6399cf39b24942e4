"""The fleet deployment: who is where. One small process that every replica reports to.

Replicas hold as many calls as they have slots, so a full one could not be asked anything; this one can. It
knows what replicas last said, and tells them and the gateways when the service ends. Nothing depends on it to
start or hold a session: should it end, Serve starts it again and the next reports fill it.
"""

from __future__ import annotations

import asyncio
import time

from deployments.wire.messages import ReplicaStatus

FORGET_AFTER_S = 5.0  # without a report


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
