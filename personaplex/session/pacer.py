"""When each page of agent audio leaves: one every 80 ms, whatever the engine's rhythm.

Stock players start at 80 ms of buffered audio and throw away everything over 100 ms, so pages that leave
together are heard as gaps. Laws:

1. Pages leave in order, on a grid of 80 ms. A page up to SLACK_S late leaves at once and keeps the grid, so
   that late timers do not add up; a later one starts a new grid. Two pages are never less than
   80 ms - SLACK_S apart: there is no catching up.
2. When more than HIGH_WATER pages wait, the oldest is dropped (`dropped`).
3. A stall leaves pages waiting for good, since they come in as fast as they leave. When at least one page has
   waited all through STANDING pages, the next quiet page is left out instead (`trimmed`), and after
   LONG_STANDING any page: the conversation gets its latency back, where nobody hears it if it can.
"""

from __future__ import annotations

from collections import deque

from personaplex.config import FRAME_SECONDS

SLACK_S = 0.02  # what a stock player tolerates between its start level and its limit
HIGH_WATER = 4  # pages, 320 ms
STANDING = 25  # pages, 2 s
LONG_STANDING = 125  # pages, 10 s: speech has a pause before, noise has none


class Pacer:
    """A queue of pages with a clock of its own. Times are seconds of any monotonic clock."""

    def __init__(self) -> None:
        self.dropped = 0
        self.trimmed = 0
        self.late = 0  # pages that left too late to follow their predecessor: gaps for whoever listens
        self._pages: deque[bytes] = deque()
        self._due = float("-inf")  # when the next page may leave
        self._released = 0  # pages since the shortest queue was last reset
        self._shortest = 0  # queue left behind, at least, by each of them

    @property
    def waiting(self) -> int:
        return len(self._pages)

    def push(self, page: bytes, quiet: bool = False) -> None:
        """Queues one page of 80 ms; `quiet` says that leaving it out would not be heard."""
        if self._shortest and self._released >= (STANDING if quiet else LONG_STANDING):
            self.trimmed += 1
            self._released = 0
            return
        self._pages.append(page)
        if len(self._pages) > HIGH_WATER:
            self._pages.popleft()
            self.dropped += 1

    def deadline(self) -> float | None:
        """When `release` will have a page; None while nothing waits."""
        return self._due if self._pages else None

    def release(self, now: float) -> bytes | None:
        """The page that leaves now, or None. At most one per 80 ms, so call it once per deadline."""
        if not self._pages or now < self._due:
            return None
        in_time = now - self._due <= SLACK_S
        self.late += not in_time and self._due > float("-inf")
        grid = self._due if in_time else now
        self._due = grid + FRAME_SECONDS
        page = self._pages.popleft()
        if self._released >= STANDING and not self._shortest:
            self._released = 0
        self._shortest = min(self._shortest, len(self._pages)) if self._released else len(self._pages)
        self._released += 1
        return page
