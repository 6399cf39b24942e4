"""Sessions that nobody is connected to, each as its log, for as long as their clients may come back.

A session is detached when its client or its gateway was lost. It takes no steps and holds no slot: what is
left of it is its log. Whoever shows the right counter takes the log; it stays here until the session goes on
elsewhere (`confirm`), so that a taker which is lost on the way costs nothing. Taken again, it belongs to the
last taker, whose slot gets a higher generation than the first one's. Pure but for its memory; used by one
thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from deployments.wire.messages import Address, Held, SessionStatus
from personaplex.errors import ResumeRefused
from personaplex.sessionlog import SessionLog

TEXTS_KEPT = 128  # pieces of text of a session; more than a client can have missed


@dataclass
class Kept:
    """A detached session. `generation`: of the slot it had last, counted up by each taker. `held`: what its
    client may hold. `texts`: what the agent said of late, with its frames. `place`: of the last slot, where a
    gateway keeps it."""

    log: SessionLog
    generation: int
    held: Held
    texts: tuple[tuple[int, str], ...]
    since: float
    place: Address | None = None
    taker: object | None = None

    def takes(self, counter: int) -> bool:
        return self.held.takes(counter, self.generation)


class Detached:
    """The detached sessions of one process, by name."""

    def __init__(self, grace_s: float, limit: int, clock: Callable[[], float]) -> None:
        """`grace_s`: how long each is kept. `limit`: how many; beyond it the oldest goes."""
        self._grace_s, self._limit, self._clock = grace_s, limit, clock
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def statuses(self) -> tuple[SessionStatus, ...]:
        """Name, seconds since it was detached, and generation of each."""
        now = self._clock()
        return tuple(
            SessionStatus(session, round(now - kept.since, 1), kept.generation, kept.held)
            for session, kept in self._kept.items()
        )

    def place(self, session: str) -> tuple[Kept, Address] | None:
        """A session that is kept, and the place of its last slot, where both are known."""
        self.expire()
        kept = self._kept.get(session)
        return None if kept is None or kept.place is None else (kept, kept.place)

    def keep(
        self,
        session: str,
        log: SessionLog,
        generation: int,
        held: Held,
        texts: Iterable[tuple[int, str]] = (),
        place: Address | None = None,
    ) -> None:
        """From now on `session` is kept; see Kept."""
        self._kept[session] = Kept(log, generation, held, tuple(texts), self._clock(), place)
        self._kept.move_to_end(session)
        while len(self._kept) > self._limit:
            self._kept.popitem(last=False)

    def take(self, session: str, counter: int, taker: object) -> Kept:
        """The session as it stands, for `taker`. Raises ResumeRefused for one that is not here and for
        another counter."""
        self.expire()
        kept = self._kept.get(session)
        if kept is None or not kept.takes(counter):
            raise ResumeRefused
        given = replace(kept)
        kept.taker, kept.generation = taker, kept.generation + 1
        return given

    def confirm(self, session: str, taker: object) -> None:
        """The session goes on at `taker`, unless somebody else took it since."""
        kept = self._kept.get(session)
        if kept is not None and kept.taker is taker:
            del self._kept[session]

    def expire(self) -> None:
        """Forgets those whose time is over."""
        until = self._clock() - self._grace_s
        for session in [session for session, kept in self._kept.items() if kept.since <= until]:
            del self._kept[session]
