"""What one client hears of the service's rhythm, from the moments its pages arrive. Pure: time is passed in.

A player starts when its first page is there and then plays without a pause for as long as pages arrive in
time. When the next page is late there is silence: an underrun, after which playing starts again with that
page. Intervals between pages are kept as a histogram of whole milliseconds, so that any number of sessions
adds up to exact percentiles within 1 ms.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from personaplex.config import FRAME_SECONDS
from personaplex.session.pacer import SLACK_S

AUDIBLE_S = 0.1  # an underrun longer than this is a gap that people notice


@dataclass
class Listener:
    """Fed with arrivals; everything else is to be read."""

    pages: int = 0
    underruns: int = 0
    audible: int = 0  # underruns longer than AUDIBLE_S
    silence_s: float = 0.0
    first_s: float | None = None  # when the first page came
    intervals: Counter[int] = field(default_factory=Counter)  # milliseconds between pages -> times
    _last: float = 0.0
    _played_until: float = 0.0
    _paused: bool = False

    def hear(self, now: float) -> None:
        """One page of 80 ms arrived at `now` seconds."""
        self.pages += 1
        if self.first_s is None or self._paused:
            self.first_s = now if self.first_s is None else self.first_s
            self._paused = False
            self._played_until = now + SLACK_S + FRAME_SECONDS
        else:
            self.intervals[round(1e3 * (now - self._last))] += 1
            late = now - self._played_until
            if late > 0:
                self.underruns += 1
                self.audible += late > AUDIBLE_S
                self.silence_s += late
                self._played_until = now + SLACK_S
            self._played_until += FRAME_SECONDS
        self._last = now

    def pause(self) -> None:
        """The agent has said that it is done for now: silence until the next page is nobody's fault."""
        self._paused = True


def percentile(histogram: Counter[int], share: float) -> int | None:
    """The smallest value that at least `share` of the entries do not exceed; None of an empty histogram."""
    total = histogram.total()
    seen = 0
    for value in sorted(histogram):
        seen += histogram[value]
        if seen >= share * total:
            return value
    return None
