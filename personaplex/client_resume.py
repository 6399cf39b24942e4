"""How a client gets its conversation back after its connection was lost: when, where, and how often it tries.

Everything here is arithmetic and words; the connection itself is `client.py`'s. See docs/protocols/chat.md.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from personaplex.errors import NoCapacity, PersonaplexError, ProtocolError, SessionLost, TooManySessions

LOST_CODES = frozenset({1001, 1006, 1011, 1012, 1013})  # closes after which a session may go on
LEAVE_CODE = 1012  # our own, when we come back at once
SETTLED_S = 1.0  # a connection that asks us over sooner is left with a pause: two gateways may disagree
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 4.0
TRY_TIMEOUT_S = 8.0  # for one try: what lost the connection may still swallow packets


@dataclass(frozen=True)
class Ticket:
    """What the service gave us to come back with, and for how long after a loss it is good."""

    token: str
    grace_s: float

    @classmethod
    def of(cls, details: Mapping[str, Any]) -> Ticket | None:
        """From a session's details; None where the service gives none."""
        token, grace_s = details.get("resume"), details.get("grace_s")
        if not isinstance(token, str) or not isinstance(grace_s, int | float) or grace_s <= 0:
            return None
        return cls(token, float(grace_s))


def resume_url(url: str, ticket: Ticket, heard: int, read: int) -> str:
    """The address to come back to after `heard` frames of the agent, with all text of the first `read`."""
    parts = urlsplit(url)
    old = ("resume", "heard", "read")
    query = [pair for pair in parse_qsl(parts.query, keep_blank_values=True) if pair[0] not in old]
    query += [("resume", ticket.token), ("heard", str(heard)), ("read", str(read))]
    return urlunsplit(parts._replace(query=urlencode(query)))


def pauses(spread: random.Random, *, at_once: bool = True) -> Iterator[float]:
    """Seconds to wait before each try: none at first, if `at_once`, then twice as long each time, at random
    within a half, so that the clients of a gateway that died do not all come at once."""
    if at_once:
        yield 0.0
    pause = FIRST_PAUSE_S
    while True:
        yield pause * spread.uniform(0.5, 1.0)
        pause = min(2 * pause, LONGEST_PAUSE_S)


def worth_retrying(refused: PersonaplexError) -> bool:
    """Whether an attempt to come back that failed so may succeed later. A proxy that has just begun hangs up,
    or answers with statuses of its own: all of them are ProtocolErrors."""
    return isinstance(refused, SessionLost | NoCapacity | TooManySessions | ProtocolError)
