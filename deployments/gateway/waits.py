"""How long a caller in the queue will wait until it can talk, said only where that can be known.

The queue is played forward many times from what is known (forecast.py). A caller is told the middle of the
runs, and only if nine tenths of them, LOW to HIGH, are within a factor of FACTOR of it, or within SLACK_S:
where lengths vary much nobody knows when the next slot will be free, but when the twentieth will. What the
runs cannot know is whether they hold here: callers to come that go first, callers that leave, a scale-up. So
all that callers were told, or would have been, is compared with what they waited, from that moment to the
handshake; the runs are stretched by what the last JUDGED callers show beyond chance, and nothing is said
unless HONEST of it was good. Pure: times are passed in, in seconds of one clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from deployments.gateway.forecast import RUNS, Survival, Watched, play

HOUR_S = 3_600.0
LENGTHS = 200  # the latest of the last hour
LEAST_LENGTHS = 10
STARTS = 20  # the latest, of the time from the slot to the handshake
LOW, HIGH = 0.05, 0.95
FACTOR = 2.0
SLACK_S = 2.0  # what a person does not notice
JUDGED, LEAST_JUDGED = 20, 5  # callers
HONEST = 0.85
STRETCH = (1 / 3, 3.0)  # smallest and largest
SURE = 1.645  # standard deviations: of a median, 90 % are within


@dataclass(frozen=True)
class Expected:
    """Seconds until a caller can talk; `known` to a factor of two, as far as the runs tell."""

    seconds: float
    known: bool


@dataclass
class _Caller:
    """One that waits. `told`: when, how many seconds, and how many the runs gave."""

    told: list[tuple[float, float, float]] = field(default_factory=list)
    wrong_at: float = float("inf")  # when something that it was told is outlasted
    has_slot: float | None = None  # since


class Waits:
    """One gateway's. No session is longer than `limit_s`, no wait for a slot than `timeout_s`."""

    def __init__(self, limit_s: float, timeout_s: float) -> None:
        self._limit_s, self._timeout_s = limit_s, timeout_s
        self._lengths: deque[tuple[float, float]] = deque()  # when a session ended, how long it held its slot
        self._since: float | None = None  # all that ended later are known; None: since the first one began
        self._starts: deque[float] = deque(maxlen=STARTS)
        self._good: deque[float] = deque(maxlen=JUDGED)  # of each caller: the share that was good
        self._ratios: deque[float] = deque(maxlen=JUDGED)  # seconds waited over what the runs gave
        self._callers: dict[str, _Caller] = {}
        self._honest = False
        self._random = np.random.default_rng(0)

    def ended(self, seconds: float, now: float) -> None:
        """A slot of this gateway's is free again, after `seconds`."""
        self._lengths.append((now, seconds))

    def forecast(
        self, own: Sequence[float], elsewhere: Sequence[float], places: int, now: float
    ) -> list[Expected]:
        """What callers at places 1 to `places` may expect; [] when too little is known. `own` are the seconds
        for which this gateway's sessions hold their slots, `elsewhere` all others'; no slot is free."""
        self._honest = self._judge(now)
        while self._lengths and (now - self._lengths[0][0] > HOUR_S or len(self._lengths) > LENGTHS):
            self._since = self._lengths.popleft()[0]
        if len(self._lengths) < LEAST_LENGTHS or not (own or elsewhere) or places < 1:
            return []
        waits = play(self._survival(own, now), [*own, *elsewhere], places, self._random)
        # In each run sessions are as long as those of another sample of the same size might have been.
        lengths = np.array([seconds for _, seconds in self._lengths])
        again = self._random.choice(lengths, (RUNS, len(lengths))).mean(axis=1, keepdims=True)
        waits *= again / lengths.mean()
        if self._starts:
            waits += self._random.choice(list(self._starts), (RUNS, 1))
        low, high = np.quantile(waits * self._stretch(), (LOW, HIGH), axis=0)
        return [self._expected(*one) for one in zip(low.tolist(), high.tolist(), strict=True)]

    def sayable(self, expected: Expected) -> float | None:
        """The seconds, if they may be said."""
        return expected.seconds if expected.known and self._honest else None

    def told(self, session: str, expected: Expected, now: float) -> float | None:
        """`sayable`, for a session that waits: what it may be told is judged, said or not."""
        if expected.known:
            caller, seconds = self._callers.setdefault(session, _Caller()), expected.seconds
            caller.told.append((now, seconds, seconds / self._stretch()))
            caller.wrong_at = min(caller.wrong_at, now + max(FACTOR * seconds, seconds + SLACK_S))
        return self.sayable(expected)

    def served(self, session: str, now: float) -> None:
        """A session has its slot."""
        self._callers.setdefault(session, _Caller()).has_slot = now

    def live(self, session: str, now: float) -> None:
        """A session can talk."""
        caller = self._callers.pop(session, None)
        if caller is None or caller.has_slot is None:
            return
        self._starts.append(now - caller.has_slot)
        if caller.told:
            good = [close(seconds, now - at) for at, seconds, _ in caller.told]
            self._good.append(sum(good) / len(good))
            at, _, gave = caller.told[0]
            self._ratios.append((now - at) / max(gave, 1e-3))

    def left(self, session: str, now: float) -> None:
        """A session is gone; if it still waited, what it has outlasted was wrong."""
        caller = self._callers.pop(session, None)
        if caller is not None and caller.wrong_at < now:
            self._good.append(0.0)

    def _judge(self, now: float) -> bool:
        """Whether what callers are told is good enough to be said. Those that still wait count where they
        have outlasted what they were told."""
        if len(self._good) < LEAST_JUDGED:
            return False
        wrong = sum(caller.wrong_at < now for caller in self._callers.values())
        judged = list(self._good)[max(0, len(self._good) + wrong - JUDGED) :]
        return sum(judged) >= HONEST * (len(judged) + wrong)

    def _survival(self, own: Sequence[float], now: float) -> Survival:
        since = self._since
        if since is None:
            since = min(ended - seconds for ended, seconds in self._lengths)
        spans = [(seconds, ended, True) for ended, seconds in self._lengths]
        spans += [(seconds, now, False) for seconds in own]
        watched = [
            Watched(max(0.0, since - until + seconds), seconds, done) for seconds, until, done in spans
        ]
        return Survival.of(watched, self._limit_s)

    def _expected(self, low: float, high: float) -> Expected:
        middle = (low + high) / 2 if high - low <= 2 * SLACK_S else (low * high) ** 0.5
        known = close(middle, low) and close(middle, high) and middle <= self._timeout_s
        return Expected(middle, known)

    def _stretch(self) -> float:
        """The factor closest to 1 that may be the median of all ratios, by the sign test."""
        ratios = sorted(self._ratios)
        if len(ratios) < LEAST_JUDGED:
            return 1.0
        outside = max(0, int((len(ratios) - SURE * len(ratios) ** 0.5) / 2))  # on either side
        stretch = min(max(1.0, ratios[outside]), ratios[-1 - outside])
        return min(max(stretch, STRETCH[0]), STRETCH[1])


def close(estimate: float, actual: float) -> bool:
    """Within a factor of FACTOR, or too near for anybody to notice."""
    return abs(estimate - actual) <= SLACK_S or actual / FACTOR <= estimate <= actual * FACTOR
