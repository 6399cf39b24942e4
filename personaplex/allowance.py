"""What a peer may spend of something: a burst at once, then a rate (a token bucket). Knows no clock."""

from __future__ import annotations


class Allowance:
    """`rate` a second on average, of which up to `burst` is saved; it opens with `start`, else with `burst`.

    Times are seconds of one monotonic clock; `now` is when the account is opened.
    """

    def __init__(self, rate: float, burst: float, *, now: float = 0.0, start: float | None = None) -> None:
        self._rate, self._burst = rate, burst
        self._left, self._at = burst if start is None else start, now

    def spend(self, amount: float, now: float | None = None) -> bool:
        """Takes `amount`, whether there is as much or not, from what has been earned by `now`, if given, or
        by the last call that said when; False when that overdraws the account."""
        if now is not None:
            self._earn(now)
        self._left -= amount
        return self._left >= 0

    def wait(self, now: float) -> float:
        """The seconds from `now` until the account is no longer overdrawn, 0 when it is not."""
        self._earn(now)
        return -self._left / self._rate if self._left < 0 else 0.0

    def _earn(self, now: float) -> None:
        if now > self._at:
            left = self._left + (now - self._at) * self._rate
            self._left = left if left < self._burst else self._burst
        self._at = now
