"""Sessions that nobody is connected to, each as its log, for as long as their clients may come back.

A session is detached when its client or its gateway was lost. It takes no steps and holds no slot: what is
left of it is its log. Whoever shows the right counter takes the log; it stays here until the session goes on
elsewhere (`confirm`), so that a taker which is lost on the way costs nothing. Taken again, it belongs to the
last taker. Pure but for its memory; used by one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from personaplex.errors import ResumeRefused
from personaplex.sessionlog import SessionLog


@dataclass
class Kept:
    """A detached session. `counter`: the one that is asked for. `told`: whether its client is known to have
    got that one; until then the one before is as good."""

    log: SessionLog
    counter: int
    told: bool
    expires: float
    taker: object | None = None

    def takes(self, counter: int) -> bool:
        return counter == self.counter or (not self.told and counter == self.counter - 1)


class Detached:
    """The detached sessions of one process, by name."""

    def __init__(self, grace_s: float, limit: int, clock: Callable[[], float]) -> None:
        """`grace_s`: how long each is kept. `limit`: how many; beyond it the oldest goes."""
        self._grace_s, self._limit, self._clock = grace_s, limit, clock
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def sessions(self) -> tuple[str, ...]:
        return tuple(self._kept)

    def keep(self, session: str, log: SessionLog, counter: int, *, told: bool) -> int:
        """From now on `session` is kept; how many others had to go for it."""
        self._kept[session] = Kept(log, counter, told, self._clock() + self._grace_s)
        self._kept.move_to_end(session)
        gone = max(0, len(self._kept) - self._limit)
        for _ in range(gone):
            self._kept.popitem(last=False)
        return gone

    def take(self, session: str, counter: int, taker: object) -> Kept:
        """The session, for `taker`. Raises ResumeRefused for one that is not here and for another counter."""
        kept = self._kept.get(session)
        if kept is None or not kept.takes(counter) or self._clock() >= kept.expires:
            raise ResumeRefused
        kept.taker = taker
        return kept

    def confirm(self, session: str, taker: object) -> None:
        """The session goes on at `taker`, unless somebody else took it since."""
        kept = self._kept.get(session)
        if kept is not None and kept.taker is taker:
            del self._kept[session]

    def expire(self) -> list[str]:
        """Forgets those whose time is over; their names."""
        now = self._clock()
        gone = [session for session, kept in self._kept.items() if now >= kept.expires]
        for session in gone:
            del self._kept[session]
        return gone
