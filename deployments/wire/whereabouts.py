"""What gateways tell the fleet about sessions whose clients come back, beside what replicas report.

A session leaves copies of its log behind: at its former replica, and at each gateway that lost its client.
Replicas report what they hold a moment late, and a session that has ended is in no report. So the gateway
that hears a client over its new connection says that its older tokens are used, and one that keeps a session
says that it is to be had. Pure but for its memory, with the time passed in; nothing here outlives the fleet.
"""

from __future__ import annotations

from dataclasses import dataclass

from deployments.wire.messages import NOTHING_HELD, Held


@dataclass(frozen=True)
class Whereabouts:
    """Of one session. `good_from`: tokens of earlier slots are worth nothing any more. `held`: what its
    client may hold, where a gateway keeps its log, and `generation` of its last slot."""

    good_from: int = 0
    held: Held = NOTHING_HELD
    generation: int = 0

    def used(self, counter: int) -> bool:
        """Whether the token of slot `counter` is worth nothing."""
        return counter < self.good_from

    def kept(self, counter: int) -> bool:
        """Whether a gateway has the session for the token of slot `counter`."""
        return self.held.takes(counter, self.generation)


NOTHING_KNOWN = Whereabouts()


class ResumeBook:
    """The fleet's side. Times are seconds of one monotonic clock; an entry goes when its time is over."""

    def __init__(self) -> None:
        self._good_from: dict[str, tuple[int, float]] = {}
        self._kept: dict[str, tuple[Held, int, float]] = {}

    def use(self, session: str, good_from: int, valid_s: float, now: float) -> None:
        """The session's client is heard over a new connection: tokens before `good_from` are used. `valid_s`:
        no copy of the session that takes them outlives it."""
        self._expire(now)
        known, _ = self._good_from.get(session, (0, now))
        self._good_from[session] = max(known, good_from), now + valid_s

    def keep(self, session: str, held: Held, generation: int, valid_s: float, now: float) -> None:
        """A gateway keeps the session for so long."""
        self._expire(now)
        self._kept[session] = held, generation, now + valid_s

    def look_up(self, session: str, now: float) -> Whereabouts:
        self._expire(now)
        good_from, _ = self._good_from.get(session, (0, now))
        held, generation, _ = self._kept.get(session, (NOTHING_HELD, 0, now))
        return Whereabouts(good_from, held, generation)

    def _expire(self, now: float) -> None:
        self._good_from = {name: entry for name, entry in self._good_from.items() if entry[1] > now}
        self._kept = {name: entry for name, entry in self._kept.items() if entry[2] > now}
