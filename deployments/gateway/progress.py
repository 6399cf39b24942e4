"""How far a session has come: its log, and the frames of its user that no replica has answered yet."""

from __future__ import annotations

import time
from collections import deque

from deployments.gateway.slot import UserFrame
from personaplex.config import FRAME_SECONDS, Pcm
from personaplex.sessionlog import SessionRecorder
from personaplex.tokenlog import TokenLog

STALE_S = 2 * FRAME_SECONDS  # a frame that waited longer for its slot is late through no fault of its sender


class Progress:
    """One session's; `recorder` is there once the session has been asked for."""

    def __init__(self) -> None:
        self.recorder: SessionRecorder | None = None
        self.unanswered: deque[UserFrame] = deque()
        self._timestamp = 0

    @property
    def log(self) -> TokenLog:
        """The session's tokens so far."""
        return TokenLog() if self.recorder is None else self.recorder.tokens

    @property
    def frames(self) -> int:
        """Answered so far."""
        return 0 if self.recorder is None else len(self.recorder.tokens)

    def add(self, pcm: Pcm) -> UserFrame:
        """A frame of the user that is to be answered."""
        self._timestamp = max(_micros(), self._timestamp + 1)
        frame = UserFrame(self._timestamp % 2**32, time.monotonic(), pcm)
        self.unanswered.append(frame)
        return frame

    def trim(self, limit: int) -> int:
        """Drops the oldest frames beyond `limit`; how many."""
        dropped = max(0, len(self.unanswered) - limit)
        for _ in range(dropped):
            self.unanswered.popleft()
        return dropped

    def take_answered(self, timestamp: int) -> UserFrame | None:
        """The frame that a reply answers; those before it were dropped on their way, and counted there."""
        for place, frame in enumerate(self.unanswered):
            if frame.timestamp == timestamp:
                for _ in range(place + 1):
                    self.unanswered.popleft()
                return frame
        return None

    def late(self) -> int:
        """Unanswered frames that waited for a slot longer than STALE_S."""
        now = time.monotonic()
        return sum(now - frame.arrived > STALE_S for frame in self.unanswered)


def seconds_since(timestamp: int) -> float:
    """Since the frame with this timestamp came."""
    return ((_micros() - timestamp) % 2**32) / 1e6


def _micros() -> int:
    return time.monotonic_ns() // 1_000
