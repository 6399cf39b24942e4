"""When each page of agent audio leaves: one every 80 ms, whatever the engine's rhythm.

A stock player starts at 80 ms of buffered audio and throws away the oldest of everything over 100 ms. So
pages that leave together are heard as gaps, and so is one that leaves when its predecessor has been played;
and what makes one page late makes all that follow late. Laws:

1. Pages leave in order, on a grid of 80 ms. A page up to SLACK_S behind the grid leaves at once and keeps it,
   so that late timers do not add up. A later one, and the first, starts a new grid LEAD_S before itself: half
   of what a player can hold is kept full, against the next late page. Two pages are never less than
   80 ms - SLACK_S apart: there is no catching up.
2. When more than HIGH_WATER pages wait, the oldest is dropped (`dropped`).
3. What each of the last STANDING pages had to wait is delay that nobody needs any more. Of a whole page or
   more of it, the next quiet page is left out (`trimmed`), after LONG_STANDING any page. Of less, a quiet
   page leaves earlier than the grid by up to SLACK_S when one went before it: players that hold more than
   they want throw quiet away. The conversation gets its delay back, where nobody hears it if it can.
"""

from __future__ import annotations

from collections import deque

from personaplex.config import FRAME_SECONDS

SLACK_S = 0.02  # what a stock player tolerates between its start level and its limit
LEAD_S = 0.01
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
        self._after_quiet = False  # what was the last page pushed
        self._seen = 0  # pages since the period began
        self._least = float("inf")  # what each of them had to wait, less what was given back since

    @property
    def waiting(self) -> int:
        return len(self._pages)

    def push(self, page: bytes, now: float, quiet: bool = False) -> None:
        """Queues one page of 80 ms; `quiet` says that leaving it out would not be heard."""
        self._least = min(self._least, self._due + FRAME_SECONDS * len(self._pages) - now)
        self._seen += 1
        if self._seen >= STANDING and self._give_back(quiet):
            self.trimmed += 1
            return
        self._after_quiet = quiet
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
        if now - self._due > SLACK_S:
            self.late += self._due > float("-inf")
            self._due = now - LEAD_S
            self._begin_period()
        self._due += FRAME_SECONDS
        return self._pages.popleft()

    def _begin_period(self) -> None:
        self._seen, self._least = 0, float("inf")

    def _give_back(self, quiet: bool) -> bool:
        """Applies law 3 to a page that is about to be queued; True when it is to be left out."""
        if self._least <= 0:
            self._begin_period()
        elif self._least >= FRAME_SECONDS and (quiet or self._seen >= LONG_STANDING):
            self._least -= FRAME_SECONDS
            if not quiet:
                self._begin_period()
            return True
        elif quiet and self._after_quiet and not self._pages:
            early = min(SLACK_S, self._least)
            self._due -= early
            self._least -= early
        return False
