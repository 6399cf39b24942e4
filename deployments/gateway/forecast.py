"""When slots will become free, by playing the queue forward from what is known now, RUNS times.

What is known: for how long slots were held that were given back, and for how long those have been held that
still are. The second counts as much as the first: of a service that has run for ten minutes only short
sessions have ended. So lengths are drawn from their product-limit estimate (Kaplan and Meier 1958), in which
a session counts at the ages at which it was watched, whether it ended or still runs; what is longer than
anything seen ends by half at twice that length, by two thirds at three times. A run draws for each slot when
its session ends, given its age, then session after session behind it; the n-th end over all slots is when
place n has its slot, since nobody who waits leaves a slot empty. Pure: the noise is passed in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RUNS = 100
TABLE = 1_000  # lengths of equal probability

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Watched:
    """A session that held a slot for `seconds`, until now or until it `ended`, and was `since` seconds old
    when it began to be watched."""

    since: float
    seconds: float
    ended: bool


@dataclass(frozen=True)
class Survival:
    """The product-limit estimate. `times` [n], rising; `ended` [n]: the share of sessions that are no longer
    than that, below 1.0 at the last one where a session runs that is older than all that ended."""

    times: Floats
    ended: Floats
    oldest: float
    limit_s: float

    @classmethod
    def of(cls, watched: Sequence[Watched], limit_s: float) -> Survival:
        """At least one has ended; none is longer than `limit_s`."""
        times, counts = np.unique([one.seconds for one in watched if one.ended], return_counts=True)
        left = np.sort([one.seconds for one in watched])
        came = np.sort([one.since for one in watched])
        at_risk = np.searchsorted(came, times) - np.searchsorted(left, times)  # watched at that age
        running = np.cumprod(1.0 - counts / np.maximum(at_risk, counts))
        return cls(times, 1.0 - running, float(left[-1]), limit_s)

    def draw(self, uniform: Floats, ages: Floats | float = 0.0) -> Floats:
        """Lengths of sessions that are older than `ages`, from `uniform` noise in [0, 1)."""
        known = np.concatenate([[0.0], self.ended])[np.searchsorted(self.times, ages, side="right")]
        share = known + uniform * (1.0 - known)
        index = np.searchsorted(self.ended, share, side="right")
        last = self.ended[-1]
        tail = np.maximum(ages, self.oldest) / ((1.0 - share) / (1.0 - last) if last < 1 else 1.0 - uniform)
        found = np.where(index < len(self.times), self.times[np.minimum(index, len(self.times) - 1)], tail)
        lengths: Floats = np.minimum(found, np.maximum(self.limit_s, ages))
        return lengths


def play(survival: Survival, ages: Sequence[float], places: int, random: np.random.Generator) -> Floats:
    """Seconds until each place has a slot, [RUNS, places]; `ages` [slots] of the sessions that run, at least
    one."""
    now = np.asarray(ages, float)
    table = survival.draw((np.arange(TABLE) + 0.5) / TABLE)
    deep = min(places, 2 + 2 * places // len(now))  # sessions drawn of each slot
    ends = (survival.draw(random.random((RUNS, len(now))), now) - now)[:, None]  # [RUNS, drawn, slots]
    while True:
        further = table[random.integers(0, TABLE, (RUNS, deep - ends.shape[1], len(now)))]
        ends = np.concatenate([ends, ends[:, -1:] + np.cumsum(further, axis=1)], axis=1)
        first = np.partition(ends.reshape(RUNS, -1), places - 1, axis=1)[:, :places]
        first.sort(axis=1)
        # An end is missing where a slot's last session ends too early; of one place in a hundred, no matter.
        if deep >= places or (ends[:, -1] < first[:, -1:]).sum() <= RUNS * places / 100:
            return first
        deep = min(places, 2 * deep)
