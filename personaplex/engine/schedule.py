"""Which slots take part in the next tick, and when to look again: pure functions of state and time.

Laws:

1. A tick takes at most one frame of each queue, the oldest.
2. A tick waits at most `gather_s` after the arrival of the oldest frame that may run, and not at all once
   every live queue has a frame that may run: one tick over many slots costs little more than over one.
3. A queue behind real time catches up by running faster than real time, but not for ever: it may run `limit`
   frames at once, as many as may wait, and over time CATCH_UP_RATE times real time. What a client sends
   beyond that is dropped from its inbox, oldest first, and costs the other sessions nothing.
4. While a session waits for its rebuild nobody catches up: of the queues that have more than one frame each
   runs once in a frame's time, and all of them in the same tick. A silence ends sooner by that than a delay
   does, and afterwards all delays are caught up with in the same ticks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from personaplex.config import CATCH_UP_RATE, FRAME_SECONDS

_EPSILON = 1e-6  # periods: a tick that runs when its period begins is not to count for the one before


@dataclass(frozen=True, slots=True)
class PendingFrame:
    """One user frame, float32 [1920], its arrival time, and the sender's timestamp."""

    pcm: npt.NDArray[np.float32]
    arrived: float
    timestamp: int = 0


@dataclass(slots=True)
class FrameQueue:
    """Frames of one session on their way to its slot. Times are seconds of one monotonic clock."""

    session: int
    limit: int  # frames of the longest burst
    live: bool = False  # its prompt is done
    frames: deque[PendingFrame] = field(default_factory=deque)
    due: float = 0.0  # when the queue's next frame is due at CATCH_UP_RATE
    period: int = -1  # of FRAME_SECONDS, in which its last frame ran

    def put(self, frame: PendingFrame) -> bool:
        """Adds a frame; True when the oldest was dropped for it."""
        self.frames.append(frame)
        if len(self.frames) <= self.limit:
            return False
        self.frames.popleft()
        return True

    def may_run_at(self, rebuilding: bool = False) -> float:
        """The earliest time laws 3 and 4 let the next frame run; it may lie in the past."""
        allowed = self.due - self.limit * FRAME_SECONDS
        if rebuilding and len(self.frames) > 1:
            return max(allowed, (self.period + 1) * FRAME_SECONDS)
        return allowed

    def take(self, now: float) -> PendingFrame:
        """Removes the oldest frame, for a tick at `now`."""
        self.due = max(self.due, now) + FRAME_SECONDS / CATCH_UP_RATE
        self.period = int(now / FRAME_SECONDS + _EPSILON)
        return self.frames.popleft()


@dataclass(frozen=True)
class TickPlan:
    """Either queues to step now, or the time to plan again (None: when something new arrives)."""

    step: tuple[FrameQueue, ...] = ()
    again_at: float | None = None


def plan(queues: Iterable[FrameQueue], now: float, gather_s: float, rebuilding: bool = False) -> TickPlan:
    """Applies the laws above to `queues` at `now`; changes nothing. `rebuilding`: a session waits for it."""
    live = waiting = 0
    ready: list[FrameQueue] = []
    oldest = later = float("inf")
    for queue in queues:
        live += queue.live
        if not (queue.live and queue.frames):
            continue
        waiting += 1
        allowed = queue.may_run_at(rebuilding)
        if allowed <= now:
            ready.append(queue)
            oldest = min(oldest, max(queue.frames[0].arrived, allowed))
        else:
            later = min(later, allowed)
    if ready and (len(ready) == live or oldest + gather_s <= now):
        return TickPlan(step=tuple(ready))
    if ready:
        return TickPlan(again_at=oldest + gather_s)
    return TickPlan(again_at=later if waiting else None)
