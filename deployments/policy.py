"""Where a new session goes and how many replicas there should be: pure functions, and a class Serve calls.

Knows neither Ray nor this package (Serve copies this module into its controller by value), so that a capacity
planner can run the very same policy.

Placement, in this order:

1. A replica that drains, is unhealthy or is full takes no new session.
2. Replicas that hold the session's voice in their cache come before others: their prompts are shorter.
3. pack: the fullest first, so that others empty and can be taken away. spread: the emptiest first.

Scaling: enough replicas that the sessions, those waiting included, fill at most `target_utilisation` of the
slots, and that `spare_slots` of them are free. A replica that is removed keeps the sessions that
find no slot at others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

KEPT_LEAST = 16  # sessions without a client whose logs a replica keeps, whatever its slots
GRACE_S = 0.3  # without a slot for this long a session counts as queued


def kept_sessions(slots: int) -> int:
    """Logs that a replica with so many slots keeps of sessions without a client; about 2 MB each."""
    return max(KEPT_LEAST, 2 * slots)


@dataclass(frozen=True)
class Candidate:
    """What is known of one replica when a session is placed."""

    key: Any
    sessions: int
    slots: int
    accepting: bool = True  # healthy and not draining
    voices: frozenset[str] = frozenset()  # in its cache


def rank(candidates: Iterable[Candidate], voice: str, placement: str) -> list[Candidate]:
    """The replicas that may take a session with `voice`, best first. `placement`: pack or spread."""
    sign = -1 if placement == "pack" else 1
    usable = [one for one in candidates if one.accepting and one.sessions < one.slots]
    return sorted(usable, key=lambda one: (voice not in one.voices, sign * one.sessions, str(one.key)))


def replicas_for(sessions: float, slots: int, spare_slots: int, target_utilisation: float) -> int:
    """Replicas that `sessions` concurrent sessions need; at least 1 when there are any, or any spare."""
    by_share = sessions / (slots * target_utilisation)
    by_spare = (sessions + spare_slots) / slots
    return math.ceil(max(by_share, by_spare) - 1e-9)


class SessionScaling:
    """Serve's autoscaling policy for replicas; Serve adds bounds and delays around it."""

    def __init__(self, slots: int, spare_slots: int, target_utilisation: float) -> None:
        self._slots, self._spare_slots, self._target_utilisation = slots, spare_slots, target_utilisation

    def __call__(self, context: Any) -> tuple[int, Mapping[str, Any]]:
        """`context.total_num_requests`: open leases plus sessions waiting for one."""
        sessions = float(context.total_num_requests)
        return replicas_for(sessions, self._slots, self._spare_slots, self._target_utilisation), {}
