"""What a peer may spend of something: a burst at once, then a rate (a token bucket). Knows no clock."""

from __future__ import annotations


class Allowance:
    """`rate` a second on average, of which up to `burst` is saved; it opens with `start`, else with `burst`.

    Times are seconds of one monotonic clock; `now` is when the account is opened.
    """

    def __init__(self, rate: float, burst: float, *, now: float = 0.0, start: float | None = None) -> None:
        self._rate, self._burst = rate, burst
        self._left, self._at = burst if start is None else start, now

    def refill(self, now: float) -> None:
        """Adds what has been earned by `now`."""
        self._left = min(self._burst, self._left + max(0.0, now - self._at) * self._rate)
        self._at = now

    def spend(self, amount: float) -> bool:
        """Takes `amount`, whether there is as much or not; False when that overdraws the account."""
        self._left -= amount
        return self._left >= 0

    def wait(self, now: float) -> float:
        """Refills; the seconds until the account is no longer overdrawn, 0 when it is not."""
        self.refill(now)
        return max(0.0, -self._left) / self._rate
