"""When each page of agent audio leaves: one every 80 ms, whatever the engine's rhythm.

A stock player starts at 80 ms of buffered audio and throws away the oldest of everything over 100 ms. So
pages that leave together are heard as gaps, and so is one that leaves when its predecessor has been played;
and what makes one page late makes all that follow late. Laws:

1. Pages leave in order, on a grid of 80 ms. A page up to SLACK_S behind the grid leaves at once and keeps it,
   so that late timers do not add up. A later one, and the first, starts a new grid LEAD_S before itself: half
   of what a player can hold is kept full, against the next late page. Two pages are never less than
   80 ms - SLACK_S apart: there is no catching up.
2. When more pages wait than the longest burst has, and as much again up to ROOM_S, the oldest is dropped
   (`dropped`). The room is for what is left of a burst whose pages started late, when the next one comes.
3. What each page of the last STANDING_S had to wait is delay that nobody needs any more. Of a whole page or
   more of it, the next quiet page is left out (`trimmed`), after LONG_STANDING_S any page. Of less, a quiet
   page leaves earlier than the grid by up to SLACK_S when one went before it: players that hold more than
   they want throw quiet away. The conversation gets its delay back, where nobody hears it if it can.
4. Who speaks in bursts needs the delay of a burst, and only its first page tells what is beyond that. So no
   period of law 3 ends before it is twice as long as the longest gap in it and in the one before, counted up
   to a burst: it holds the beginning of one, if the engine runs at twice real time or faster.
5. Text comes before its page, and leaves right after it. That of a page which is left out, here or before it
   came here, follows the next one that is not, in one message with the text of that: whoever has heard a page
   and no text yet knows that nothing from its last page on has been read.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from personaplex.config import BURST_S, FRAME_SECONDS

SLACK_S = 0.02  # what a stock player tolerates between its start level and its limit
LEAD_S = 0.01
ROOM_S = 1.0
STANDING_S = 2.0
LONG_STANDING_S = 10.0  # speech has a pause before, noise has none
_EPSILON_S = 1e-6  # arrivals are sums of frames


@dataclass
class _QueuedPage:
    page: bytes
    texts: list[str]  # that leave right after it


class Pacer:
    """A queue of pages with a clock of its own. Times are seconds of any monotonic clock."""

    def __init__(self, burst_s: float = BURST_S) -> None:
        """`burst_s`: audio that may come at once."""
        self.dropped = 0
        self.trimmed = 0
        self.late = 0  # pages that left too late to follow their predecessor: gaps for whoever listens
        self._burst_s = burst_s
        self._longest_s = burst_s + min(burst_s, ROOM_S) + FRAME_SECONDS + _EPSILON_S  # that waits
        self._pages: deque[_QueuedPage] = deque()
        self._texts: list[str] = []  # of pages that were dropped; leave with the next
        self._following: list[str] = []  # of the page that is pushed next, and of those left out before it
        self._due = float("-inf")  # when the next page may leave
        self._after_quiet = False  # what was the last page pushed
        self._began = float("-inf")  # the period of law 3
        self._last = float("-inf")  # push
        self._gap = self._gap_before = 0.0  # the longest in this period and in the one before
        self._least = float("inf")  # what each page of it had to wait, less what was given back since

    @property
    def waiting(self) -> int:
        return len(self._pages)

    def push(self, page: bytes, now: float, quiet: bool = False) -> None:
        """Queues one page of 80 ms; `quiet` says that leaving it out would not be heard."""
        self._least = min(self._least, self._due + FRAME_SECONDS * len(self._pages) - now)
        if self._last == float("-inf"):
            self._began = self._last = now
        self._gap = max(self._gap, min(now - self._last, self._burst_s))
        self._last = now
        if self._has_lasted(STANDING_S, now) and self._give_back(quiet, now):
            self.trimmed += 1
            return
        self._after_quiet = quiet
        self._pages.append(_QueuedPage(page, self._following))
        self._following = []
        if len(self._pages) * FRAME_SECONDS > self._longest_s:
            self._texts += self._pages.popleft().texts
            self.dropped += 1

    def add_text(self, text: str) -> None:
        """The text of the page that is pushed next."""
        self._following.append(text)

    def deadline(self) -> float | None:
        """When `release` will have a page; None while nothing waits."""
        return self._due if self._pages else None

    def release(self, now: float) -> tuple[bytes, str] | None:
        """The page that leaves now and the text that follows it, or None. At most one page per 80 ms, so call
        it once per deadline."""
        if not self._pages or now < self._due:
            return None
        if now - self._due > SLACK_S:
            self.late += self._due > float("-inf")
            self._due = now - LEAD_S
            self._begin_period(now)
        self._due += FRAME_SECONDS
        left = self._pages.popleft()
        texts, self._texts = [*self._texts, *left.texts], []
        return left.page, "".join(texts)

    def _begin_period(self, now: float) -> None:
        self._began, self._least = now, float("inf")
        self._gap_before, self._gap = self._gap, 0.0

    def _has_lasted(self, period_s: float, now: float) -> bool:
        return now - self._began >= max(period_s, 2 * max(self._gap, self._gap_before)) - _EPSILON_S

    def _give_back(self, quiet: bool, now: float) -> bool:
        """Applies law 3 to a page that is about to be queued; True when it is to be left out."""
        if self._least <= 0:
            self._begin_period(now)
        elif self._least >= FRAME_SECONDS and (quiet or self._has_lasted(LONG_STANDING_S, now)):
            self._least -= FRAME_SECONDS
            if not quiet:
                self._begin_period(now)
            return True
        elif self._pages and self._least < FRAME_SECONDS:
            self._begin_period(now)  # it began inside a burst; by now more may be standing
        elif quiet and self._after_quiet and not self._pages:
            early = min(SLACK_S, self._least)
            self._due -= early
            self._least -= early
        return False
