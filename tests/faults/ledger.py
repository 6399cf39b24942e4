"""What every session of a run heard and was told, and what came of every fault.

A gap is silence that a client hears: the time between two of its pages less the 80 ms that a page lasts. The
gap of a fault in a session is the longest that began within AFTERMATH_S of it. An outage is such a
silence of a client that lost its connection and came back.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from serving import Heard

from personaplex.config import FRAME_SECONDS
from personaplex.session.moshi import Audio, Metadata

AFTERMATH_S = 15.0
PHASES = ("detection_s", "slot_s", "rebuild_s")


@dataclass
class Entry:
    """One session. Times are seconds of the monotonic clock."""

    number: int
    began: float = field(default_factory=time.monotonic)
    ended: float = 0.0
    frames_sent: int = 0
    heard: Heard = field(default_factory=Heard)
    failure: str = ""  # why it did not end by its own will
    losses: int = 0  # connections that it lost
    resumes: int = 0  # how often it went on over another one
    # When a loss was noticed, and for how long nothing was heard because of it.
    outages: list[tuple[float, float]] = field(default_factory=list)

    def pages(self) -> list[tuple[float, int]]:
        """Arrival and number of each page of audio."""
        found = [
            (at, int.from_bytes(message.data[18:22], "little") - 2)
            for at, message in self.heard.messages
            if isinstance(message, Audio)
        ]
        return [(at, number) for at, number in found if number >= 0]

    def notices(self, kind: str) -> list[tuple[float, dict[str, Any]]]:
        """Arrival and content of each notice of this type."""
        return [
            (at, dict(message.data))
            for at, message in self.heard.messages
            if isinstance(message, Metadata) and message.data.get("type") == kind
        ]

    def gap(self, at: float, until: float) -> float | None:
        """The longest gap that began between `at` and `until`; None where the session heard nothing then."""
        times = [arrival for arrival, _ in self.pages()]
        found = [
            after - before for before, after in itertools.pairwise(times) if after > at and before < until
        ]
        return max(found) - FRAME_SECONDS if found else None

    def twice(self) -> int:
        """Pages that came again or out of order, and frames of the agent that answer nothing."""
        numbers = [number for _, number in self.pages()]
        backward = sum(after <= before for before, after in itertools.pairwise(numbers))
        return backward + max(0, max(numbers, default=-1) + 1 - self.frames_sent)

    def row(self) -> dict[str, Any]:
        """For the report."""
        numbers = [number for _, number in self.pages()]
        return {
            "session": self.number,
            "seconds": round(self.ended - self.began, 1),
            "frames_sent": self.frames_sent,
            "pages": len(numbers),
            "pages_left_out": max(numbers, default=-1) + 1 - len(numbers),
            "twice": self.twice(),
            "interrupted": len(self.notices("interrupted")),
            "slots": [details["generation"] for _, details in self.notices("continued")],
            "losses": self.losses,
            "outages_s": [round(silence, 3) for _, silence in self.outages],
            "failure": self.failure,
        }


@dataclass
class Fault:
    """Something that was done to the service."""

    kind: str
    at: float
    used: int  # slots, before
    live: int  # sessions, before
    came_of_it: str = ""  # in one word, where the service says so


@dataclass
class Ledger:
    """Of one run."""

    entries: list[Entry] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    not_begun: Counter[str] = field(default_factory=Counter)  # why; while a gateway or a proxy was away

    def begin(self) -> Entry:
        entry = Entry(len(self.entries))
        self.entries.append(entry)
        return entry

    def refuse(self, entry: Entry, why: str) -> None:
        """It was no session yet."""
        self.entries.remove(entry)
        self.not_begun[why] += 1

    def figures(self) -> dict[str, Any]:
        """What the run found, by kind of fault."""
        found: dict[str, Any] = {
            "sessions": len(self.entries),
            "failures": dict(Counter(entry.failure for entry in self.entries if entry.failure)),
            "not_begun": dict(self.not_begun),
            "twice": sum(entry.twice() for entry in self.entries),
            "slots_wrong": sum(fault.used != fault.live for fault in self.faults),
            "losses": sum(entry.losses for entry in self.entries),
            "resumes": sum(entry.resumes for entry in self.entries),
        }
        for kind in sorted({fault.kind for fault in self.faults}):
            found[kind] = self._of_kind(kind)
        return found

    def _of_kind(self, kind: str) -> dict[str, Any]:
        gaps: list[float] = []
        beside: list[float] = []
        phases: list[dict[str, Any]] = []
        for fault in (one for one in self.faults if one.kind == kind):
            for entry in self.entries:
                until = self._until(fault)
                gap = entry.gap(fault.at, until)
                if gap is None:
                    continue
                told = [*entry.notices("interrupted"), *entry.notices("continued")]
                (gaps if any(fault.at <= at < until for at, _ in told) else beside).append(gap)
                phases += [details for at, details in entry.notices("continued") if fault.at <= at < until]
        moved = [details for details in phases if PHASES[0] in details]
        return {
            "faults": sum(fault.kind == kind for fault in self.faults),
            "came_of_it": dict(Counter(one.came_of_it for one in self.faults if one.kind == kind)),
            "sessions_hit": len(gaps),
            "moved": len(moved),
            "stayed": len(phases) - len(moved),
            "gap_s": quantiles(gaps),
            "gap_of_others_s": quantiles(beside),
            "outage_s": quantiles(self._outages(kind)),
            **{phase: quantiles([details[phase] for details in moved]) for phase in PHASES},
        }

    def _outages(self, kind: str) -> list[float]:
        """Of connections that were lost after a fault of this kind and before the next one."""
        ends = sorted(fault.at for fault in self.faults)
        found = []
        for fault in (one for one in self.faults if one.kind == kind):
            until = next((at for at in ends if at > fault.at), float("inf"))
            for entry in self.entries:
                found += [silence for at, silence in entry.outages if fault.at <= at < until]
        return found

    def _until(self, fault: Fault) -> float:
        later = [other.at for other in self.faults if other.at > fault.at]
        return min([fault.at + AFTERMATH_S, *later])

    def document(self) -> dict[str, Any]:
        """Every fault and every session, with their times in seconds since the first session began."""
        zero = min((entry.began for entry in self.entries), default=0.0)
        return {
            "faults": [{"kind": fault.kind, "at_s": round(fault.at - zero, 3)} for fault in self.faults],
            "ledger": [
                entry.row()
                | {
                    "began_s": round(entry.began - zero, 3),
                    "failovers": [
                        {"at_s": round(at - zero, 3), "frame": details["frame"]}
                        | {phase: details[phase] for phase in PHASES}
                        for at, details in entry.notices("continued")
                        if PHASES[0] in details
                    ],
                }
                for entry in self.entries
            ],
        }


def quantiles(values: list[float]) -> dict[str, float] | None:
    """p50, p95 and the greatest."""
    if not values:
        return None
    ordered = sorted(values)
    p95 = ordered[min(len(ordered) - 1, round(0.95 * (len(ordered) - 1)))]
    return {
        "p50": round(statistics.median(ordered), 3),
        "p95": round(p95, 3),
        "max": round(ordered[-1], 3),
    }
