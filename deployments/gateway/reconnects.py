"""Clients that come back after their idle limit again and again, such as agents in an empty room.

Each such session prefills a prompt and holds a slot for nobody. The first ones are let in at once, since
people come back from a break; from the LIMIT-th idle end in a row on a caller waits, each time twice as long.
Any other end of a session clears its caller. Pure but for its memory; time comes from outside.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from personaplex.errors import PersonaplexError, SessionIdle, TooManySessions

LIMIT = 3  # idle ends in a row
FIRST_WAIT_S = 15.0
LONGEST_WAIT_S = 300.0
REMEMBERED = 4_096  # callers; the one whose session ended longest ago is forgotten first


@dataclass
class _Record:
    idle_ends: int = 0
    ended_at: float = 0.0


class Reconnects:
    """What one gateway remembers of its callers' idle sessions."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def check(self, caller: str, now: float) -> None:
        """Raises TooManySessions while `caller` has to wait; `retry_after_s` is the rest of it."""
        record = self._records.get(caller)
        if record is None or record.idle_ends < LIMIT:
            return
        wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(record.idle_ends - LIMIT, 16))
        rest = record.ended_at + wait_s - now
        if rest > 0:
            words = f"the last {record.idle_ends} sessions of this caller ended for want of audio"
            raise TooManySessions(words, rest, "audio")

    def ended(self, caller: str, error: PersonaplexError | None, now: float) -> None:
        """A session of `caller` has ended; `error` is why our side ended it, None when the client left."""
        if not isinstance(error, SessionIdle):
            self._records.pop(caller, None)
            return
        record = self._records.setdefault(caller, _Record())
        record.idle_ends += 1
        record.ended_at = now
        self._records.move_to_end(caller)
        while len(self._records) > REMEMBERED:
            self._records.popitem(last=False)
