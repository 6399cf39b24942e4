"""How long a caller in the queue will wait, said only while that is known to be good.

With S slots whose sessions last M seconds on average, a slot becomes free every M / S seconds, so place n
waits about n M / S. M is the mean of the sessions that ended here within the last hour. A slot is also held
before and after its conversation, which weighs where conversations are short: so the formula is corrected by
the median of what the last JUDGED callers waited over what it gave. Whether that holds now (a burst of
arrivals, a scale-up, a few long calls) no formula knows: so every caller's estimate is compared with what it
really waited, and nothing is said unless HONEST of the last JUDGED estimates were within a factor of FACTOR,
or within SLACK_S. Pure: times are passed in, in seconds of one clock.
"""

from __future__ import annotations

import statistics
from collections import deque

HOUR_S = 3_600.0
LENGTHS = 1_000  # remembered
LEAST_LENGTHS = 10
JUDGED, LEAST_JUDGED = 20, 5
HONEST = 0.8
FACTOR = 2.0
SLACK_S = 2.0  # what a person does not notice
CORRECTIONS = (1 / 3, 3.0)  # smallest and largest


class Waits:
    """One gateway's."""

    def __init__(self) -> None:
        self._lengths: deque[tuple[float, float]] = deque(maxlen=LENGTHS)  # when it ended, how long it was
        self._good: deque[bool] = deque(maxlen=JUDGED)
        self._ratios: deque[float] = deque(maxlen=JUDGED)  # seconds waited over what the formula gave
        # Of those that wait: when it was made, the estimate, what the formula gave.
        self._estimates: dict[str, tuple[float, float, float]] = {}

    def ended(self, seconds: float, now: float) -> None:
        """A session gave its slot back after `seconds`."""
        self._lengths.append((now, seconds))

    def estimate(self, place: int, slots: int, now: float) -> float | None:
        """Seconds until `place` has a slot, whether it may be said or not; None when too little is known."""
        formula = self._formula(place, slots, now)
        return None if formula is None else formula * self._correction

    def _formula(self, place: int, slots: int, now: float) -> float | None:
        while self._lengths and now - self._lengths[0][0] > HOUR_S:
            self._lengths.popleft()
        if len(self._lengths) < LEAST_LENGTHS or slots < 1:
            return None
        mean = sum(length for _, length in self._lengths) / len(self._lengths)
        return place * mean / slots

    def queued(self, session: str, place: int, slots: int, now: float) -> float | None:
        """A session is at `place`: what it may be told. Its first estimate is the one that is judged."""
        formula = self._formula(place, slots, now)
        if formula is None:
            return None
        seconds = formula * self._correction
        self._estimates.setdefault(session, (now, seconds, formula))
        return seconds if self.honest else None

    def served(self, session: str, now: float) -> None:
        """A session that waited has its slot."""
        made = self._estimates.pop(session, None)
        if made is not None:
            since, estimate, formula = made
            self._good.append(close(estimate, now - since))
            if formula > 0:
                self._ratios.append((now - since) / formula)

    def left(self, session: str, now: float) -> None:
        """A session that waited is gone; an estimate that it has outlasted was wrong."""
        made = self._estimates.pop(session, None)
        if made is not None and now - made[0] > made[1] and not close(made[1], now - made[0]):
            self._good.append(False)

    @property
    def _correction(self) -> float:
        if len(self._ratios) < LEAST_JUDGED:
            return 1.0
        return min(max(statistics.median(self._ratios), CORRECTIONS[0]), CORRECTIONS[1])

    @property
    def honest(self) -> bool:
        """Whether estimates are good enough to be said."""
        return len(self._good) >= LEAST_JUDGED and sum(self._good) >= HONEST * len(self._good)


def close(estimate: float, actual: float) -> bool:
    """Within a factor of FACTOR, or too near for anybody to notice."""
    return abs(estimate - actual) <= SLACK_S or actual / FACTOR <= estimate <= actual * FACTOR
