"""Who holds the slots of one replica: leases that nobody claimed yet, sessions on their way, the engine's.

A slot is held by the lease while nobody connected yet (`lease_timeout_s` at most), then by the session.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from deployments.replica.running import RunningLog
from deployments.wire import messages
from deployments.wire.link import Link
from deployments.wire.messages import NOTHING_HELD, Held, LeaseRequest, Opening, SessionStatus
from deployments.wire.transfer import LogReceiver
from personaplex.errors import SessionLost


@dataclass(eq=False)
class Holder:
    """Whoever holds a lease: a gateway that has not connected yet (no `link`), one whose session is not with
    the engine yet (`number` is None), or a session of the engine."""

    request: LeaseRequest
    began: float = field(default_factory=time.monotonic)
    link: Link | None = None
    generation: int = 0
    log: LogReceiver | None = None  # while it comes in
    number: int | None = None
    held: Held = NOTHING_HELD
    running: RunningLog | None = None  # of a session whose client may come back
    freed: asyncio.Event = field(default_factory=asyncio.Event)


class Holders:
    """One replica's; runs on its event loop."""

    def __init__(self, lease_timeout_s: float, changed: Callable[[], None]) -> None:
        """`changed` is called when a slot is taken or freed."""
        self._lease_timeout_s, self._changed = lease_timeout_s, changed
        self._unclaimed: dict[bytes, Holder] = {}  # by one-time token
        self._coming: set[Holder] = set()  # linked, but not with the engine yet
        self.open: dict[int, Holder] = {}  # by the engine loop's number; not to be written to

    @property
    def used(self) -> int:
        """Slots that are held."""
        return len(self._unclaimed) + len(self._coming) + len(self.open)

    def hold(self, request: LeaseRequest) -> tuple[bytes, Holder]:
        """Holds a slot for whoever shows the token; within `lease_timeout_s`, or it is dropped."""
        token, holder = secrets.token_bytes(messages.TOKEN_BYTES), Holder(request)
        self._unclaimed[token] = holder
        asyncio.get_running_loop().call_later(self._lease_timeout_s, self.drop, token)
        self._changed()
        return token, holder

    def drop(self, token: bytes) -> None:
        """Ends a lease nobody claimed. Without effect on one that was."""
        holder = self._unclaimed.pop(token, None)
        if holder is not None:
            self.free(holder)

    def statuses(self) -> tuple[SessionStatus, ...]:
        """Every session that holds a slot."""
        now = time.monotonic()
        holders = [*self._unclaimed.values(), *self._coming, *self.open.values()]
        return tuple(
            SessionStatus(
                holder.request.session,
                round(now - holder.began, 1),
                holder.generation,
                holder.held if holder.running is None else holder.running.held,
            )
            for holder in holders
        )

    def check(self, token: bytes) -> None:
        """Raises SessionLost for a token that holds nothing, or does no longer."""
        if token not in self._unclaimed:
            raise SessionLost("the lease ran out; please connect again")

    def claim(self, link: Link, opening: Opening) -> Holder:
        """Whoever has the token, which was checked, is from now on at the other end of `link`."""
        holder = self._unclaimed.pop(opening.token)
        holder.link, holder.generation, holder.held = link, opening.generation, opening.held
        self._coming.add(holder)
        return holder

    def opened(self, holder: Holder, number: int) -> None:
        """The engine has the session, under this number."""
        holder.number = number
        self._coming.discard(holder)
        self.open[number] = holder
        self._changed()  # with the generation

    def pop(self, number: int) -> Holder:
        """The session of this number, which is with the engine no longer; it is still to be freed."""
        return self.open.pop(number)

    def pop_all(self) -> list[Holder]:
        """`pop` for every session that is linked, with the engine or on its way there."""
        holders = [*self.open.values(), *self._coming]
        self.open.clear()
        return holders

    def free(self, holder: Holder) -> None:
        """The slot of a holder that is not with the engine is free again."""
        holder.log = None
        self._coming.discard(holder)
        holder.freed.set()
        self._changed()
