"""What became of one session of a load test, as plain numbers, and of all of them together.

Every session that was meant to start is counted in `offered`, refused ones too: a service that turns people
away is not good because those inside are happy. Times are seconds unless a name says otherwise; None stands
for what never happened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from loadtest.listener import percentile

DEFICIT_FRAMES = 2  # frames a perfect service keeps: the two codecs' look-ahead
DEFICIT_SHARE = 0.01  # of the frames sent, which a good session may miss


@dataclass
class Outcome:
    """One session. `cause` is the class of the error that ended it, "" when it ended as it wished."""

    number: int
    at_s: float  # wished start, from the start of the test
    late_s: float = 0.0  # how long after that the load test itself started it
    length_s: float = 0.0  # wished
    voice: str = ""
    cause: str = ""
    code: int | None = None  # of the close, if the service closed
    live: bool = False
    queued: int | None = None  # first place in the queue it was told
    connect_s: float | None = None  # until the WebSocket was open
    ready_s: float | None = None  # from there until its slot and prompt were ready
    handshake_s: float | None = None  # from there until the handshake
    first_audio_s: float | None = None  # from our first page
    talked_s: float = 0.0
    sent: int = 0  # frames
    heard: int = 0
    underruns: int = 0
    audible: int = 0
    silence_s: float = 0.0
    continuous: bool = True  # its protocol answers every frame
    sent_late: int = 0  # pages that left more than 20 ms late: the fault of the load test
    intervals: dict[int, int] = field(default_factory=dict)  # ms between pages heard -> times
    answers: dict[int, int] = field(default_factory=dict)  # ms from a page sent to the page that answers it

    @property
    def refused(self) -> bool:
        return bool(self.cause) and not self.live

    @property
    def lost(self) -> bool:
        return bool(self.cause) and self.live

    @property
    def deficit(self) -> int:
        """Frames that were sent and never answered; 0 where the protocol answers only some."""
        if not self.continuous:
            return 0
        return max(0, self.sent - DEFICIT_FRAMES - self.heard)

    @property
    def good(self) -> bool:
        """It got in, ended as it wished, nothing it said was left out and no pause was heard."""
        return self.live and not self.cause and not self.audible and self.deficit <= DEFICIT_SHARE * self.sent

    def packed(self) -> dict[str, Any]:
        """For a message to another process; `unpacked` reads it."""
        return asdict(self)

    @classmethod
    def unpacked(cls, data: Mapping[str, Any]) -> Outcome:
        histograms = {name: {int(ms): n for ms, n in data[name].items()} for name in ("intervals", "answers")}
        return cls(**{**data, **histograms})


def summary(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """The figures of a run, by the names thresholds use."""
    offered = len(outcomes)
    live = [one for one in outcomes if one.live]
    refused, lost = sum(one.refused for one in outcomes), sum(one.lost for one in outcomes)
    sent, talked = sum(one.sent for one in live), sum(one.talked_s for one in live)
    intervals, answers = merged(one.intervals for one in live), merged(one.answers for one in live)
    minutes = talked / 60
    return {
        "offered": offered,
        "live": len(live),
        "refused": refused,
        "lost": lost,
        "queued": sum(one.queued is not None for one in outcomes),
        "refused_share": _ratio(refused, offered),
        "lost_share": _ratio(lost, offered),
        "good_share": _ratio(sum(one.good for one in outcomes), offered),
        "session_hours": talked / 3_600,
        "frames_sent": sent,
        "deficit_share": _ratio(sum(one.deficit for one in live), sent),
        "underruns_per_minute": _ratio(sum(one.underruns for one in live), minutes),
        "audible_per_minute": _ratio(sum(one.audible for one in live), minutes),
        "silence_share": _ratio(sum(one.silence_s for one in live), talked),
        "interval_p50_ms": percentile(intervals, 0.50),
        "interval_p99_ms": percentile(intervals, 0.99),
        "interval_max_ms": max(intervals, default=None),
        "answer_p50_ms": percentile(answers, 0.50),
        "answer_p95_ms": percentile(answers, 0.95),
        "answer_p99_ms": percentile(answers, 0.99),
        **_times("connect", [one.connect_s for one in outcomes]),
        **_times("ready", [one.ready_s for one in outcomes]),
        **_times("handshake", [one.handshake_s for one in outcomes]),
        **_times("first_audio", [one.first_audio_s for one in outcomes]),
        "start_late_p99_s": quantile([one.late_s for one in outcomes], 0.99),
        "sent_late_share": _ratio(sum(one.sent_late for one in live), sent),
    }


def causes(outcomes: Iterable[Outcome]) -> dict[str, dict[str, int]]:
    """How often each error ended a session, before it was live (`refused`) and after (`lost`)."""
    counted: dict[str, Counter[str]] = {"refused": Counter(), "lost": Counter()}
    for one in outcomes:
        if one.cause:
            counted["lost" if one.live else "refused"][one.cause] += 1
    return {kind: dict(counter) for kind, counter in counted.items()}


def quantile(values: Iterable[float | None], share: float) -> float | None:
    """The smallest value that at least `share` of those there do not exceed."""
    known = sorted(value for value in values if value is not None)
    return known[min(len(known) - 1, int(share * len(known)))] if known else None


def _times(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    mean = sum(known) / len(known) if known else None
    levels = {f"{name}_p{round(100 * share)}_s": quantile(known, share) for share in (0.5, 0.95, 0.99)}
    return {f"{name}_mean_s": mean, **levels}


def merged(histograms: Iterable[Mapping[int, int]]) -> Counter[int]:
    """One histogram of all."""
    total: Counter[int] = Counter()
    for histogram in histograms:
        total.update(histogram)
    return total


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
