"""Which slots take part in the next tick, and when to look again: pure functions of state and time.

Laws:

1. A tick takes at most one frame of each lane, the oldest.
2. A tick waits at most `gather_s` after the arrival of the oldest frame that may run, and not at all once
   every live lane has a frame that may run: one tick over many slots costs little more than over one.
3. A lane behind real time catches up by running faster than real time, but not for ever: it may run `limit`
   frames at once, as many as may wait, and over time CATCH_UP_RATE times real time. What a client sends
   beyond that is dropped from its inbox, oldest first, and costs the other sessions nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from personaplex.config import CATCH_UP_RATE, FRAME_SECONDS


@dataclass(frozen=True, slots=True)
class Waiting:
    """One user frame, float32 [1920], when it came, and a number its sender knows it by."""

    pcm: npt.NDArray[np.float32]
    arrived: float
    mark: int = 0


@dataclass(slots=True)
class Lane:
    """Frames of one session on their way to its slot. Times are seconds of one monotonic clock."""

    session: int
    limit: int  # frames of the longest burst
    live: bool = False  # its prompt is done
    frames: deque[Waiting] = field(default_factory=deque)
    due: float = 0.0  # when the lane's next frame is due at CATCH_UP_RATE

    def put(self, frame: Waiting) -> bool:
        """Adds a frame; True when the oldest had to go for it."""
        self.frames.append(frame)
        if len(self.frames) <= self.limit:
            return False
        self.frames.popleft()
        return True

    def may_run_at(self) -> float:
        """The earliest time law 3 lets the next frame run; it may lie in the past."""
        return self.due - self.limit * FRAME_SECONDS

    def take(self, now: float) -> Waiting:
        """Removes the oldest frame, for a tick at `now`."""
        self.due = max(self.due, now) + FRAME_SECONDS / CATCH_UP_RATE
        return self.frames.popleft()


@dataclass(frozen=True)
class Plan:
    """Either lanes to step now, or the time to plan again (None: when something new arrives)."""

    step: tuple[Lane, ...] = ()
    again_at: float | None = None


def plan(lanes: Iterable[Lane], now: float, gather_s: float) -> Plan:
    """Applies the laws above to `lanes` at `now`; changes nothing."""
    live = waiting = 0
    ready: list[Lane] = []
    oldest = later = float("inf")
    for lane in lanes:
        live += lane.live
        if not (lane.live and lane.frames):
            continue
        waiting += 1
        allowed = lane.may_run_at()
        if allowed <= now:
            ready.append(lane)
            oldest = min(oldest, max(lane.frames[0].arrived, allowed))
        else:
            later = min(later, allowed)
    if ready and (len(ready) == live or oldest + gather_s <= now):
        return Plan(step=tuple(ready))
    if ready:
        return Plan(again_at=oldest + gather_s)
    return Plan(again_at=later if waiting else None)
