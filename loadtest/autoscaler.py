"""Ray Serve around our scaling policy, on simulated time: averaging, reports, delays and bounds.

The policy itself is the service's own (`deployments.policy.SessionScaling`). What Serve 2.60 does with it:
handles report their load every `push_s`; the controller averages the reported load over the look-back period,
asks the policy, keeps a wish for more (or fewer) replicas until it has lasted the upscale or downscale delay
without a break, and clips it to the bounds.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from types import SimpleNamespace

from deployments.policy import SessionScaling
from deployments.settings import Settings


@dataclass
class History:
    """A step function of time; `mean` integrates it exactly."""

    times: list[float] = field(default_factory=lambda: [0.0])
    values: list[float] = field(default_factory=lambda: [0.0])
    integrals: list[float] = field(default_factory=lambda: [0.0])  # from 0 to each time

    def set(self, now: float, value: float) -> None:
        """The value from `now` on; times never go back."""
        self.integrals.append(self.integrals[-1] + (now - self.times[-1]) * self.values[-1])
        self.times.append(now)
        self.values.append(value)

    def mean(self, begin: float, end: float) -> float:
        """Average from `begin` to `end` > begin, both at or after 0."""
        return (self._integral(end) - self._integral(begin)) / (end - begin)

    def _integral(self, at: float) -> float:
        index = bisect_right(self.times, at) - 1
        return self.integrals[index] + (at - self.times[index]) * self.values[index]


class Autoscaler:
    """Asked with the time and the sessions of the fleet so far, says how many replicas there should be."""

    def __init__(self, settings: Settings, push_s: float) -> None:
        self._settings, self._push_s = settings, push_s
        self._policy = SessionScaling(settings.slots, settings.spare_slots, settings.target_utilisation)
        self._direction = 0
        self._since = 0.0

    def decide(self, now: float, sessions: History, target: int) -> int:
        """The new target. `sessions` counts leases and those who wait for one."""
        reported = now - now % self._push_s  # the load since then is not known yet
        begin = max(0.0, reported - self._settings.autoscaling_lookback_s)
        load = sessions.mean(begin, reported) if reported > begin else 0.0
        wish, _ = self._policy(SimpleNamespace(total_num_requests=load))
        return self._clip(self._delay(now, wish, target))

    def _delay(self, now: float, wish: int, target: int) -> int:
        direction = (wish > target) - (wish < target)
        if direction != self._direction:
            self._direction, self._since = direction, now
        delays = {1: self._settings.upscale_delay_s, -1: self._settings.downscale_delay_s}
        if direction and now - self._since >= delays[direction]:
            self._direction = 0
            return wish if direction > 0 else max(1, wish)
        return target

    def _clip(self, wish: int) -> int:
        return max(self._settings.replicas_min, min(self._settings.replicas_max, wish))
