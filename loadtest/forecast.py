"""What goes into a simulation beside settings, and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from loadtest.arrivals import Arrival
from loadtest.fleet import SimulatedReplica
from personaplex.config import FRAME_SECONDS


@dataclass(frozen=True)
class Timing:
    """What settings do not say. Seconds; the defaults were seen on one machine, measure your own."""

    startup_s: float = 60.0  # from the decision until a new replica takes sessions: node, image, weights
    handover_s: float = 0.1  # half of the longest pause between two looks for a free slot
    grant_s: float = 0.02  # from the slot to the start of the prompt: lease, media link
    close_s: float = 0.3  # the last answers and the end of the link
    push_s: float = 10.0  # Serve's reports of load to its controller
    control_s: float = 1.0  # between two looks of the controller


@dataclass
class Session:
    """One arrival on its way. Times are of the simulation; None for what did not happen."""

    arrival: Arrival
    ready_s: float | None = None  # from its arrival until slot and prompt were ready
    waited: bool = False
    refused: bool = False
    placed: bool = False
    replica: SimulatedReplica | None = None  # that holds its slot
    began: float | None = None  # when its conversation did
    silent_since: float = 0.0  # of one whose replica died
    over: bool = False


@dataclass
class Forecast:
    """What the simulation saw; series are sampled at `times`."""

    sessions: list[Session]
    seconds: float = 0.0
    replica_seconds: float = 0.0
    live_seconds: float = 0.0
    asked: list[float] = field(default_factory=list)  # when each further replica was asked for
    times: list[float] = field(default_factory=list)
    held: list[int] = field(default_factory=list)  # slots
    waiting: list[int] = field(default_factory=list)
    replicas: list[int] = field(default_factory=list)  # that take sessions
    ticks: list[float] = field(default_factory=list)  # seconds, of busy replicas at the samples
    deaths: int = 0
    gaps: list[float] = field(default_factory=list)  # of sessions whose replica died and that went on
    lost: int = 0  # that did not

    def figures(self) -> dict[str, float | None]:
        """By the names a load test's report uses, where it has them too."""
        ready = np.array([one.ready_s for one in self.sessions if one.ready_s is not None])
        offered, ticks = len(self.sessions), np.array(self.ticks)
        refused = sum(one.refused for one in self.sessions)
        levels = {"p50": 0.50, "p95": 0.95, "p99": 0.99}
        return {
            "offered": offered,
            "refused": refused,
            "refused_share": refused / offered if offered else None,
            "queued": sum(one.waited for one in self.sessions),
            "ready_mean_s": float(ready.mean()) if len(ready) else None,
            **{f"ready_{name}_s": _quantile(ready, share) for name, share in levels.items()},
            **{f"tick_{name}_ms": _scaled(_quantile(ticks, share), 1e3) for name, share in levels.items()},
            "ticks_late_share": float((ticks > FRAME_SECONDS).mean()) if len(ticks) else None,
            "peak_held": max(self.held, default=0),
            "peak_replicas": max(self.replicas, default=0),
            "replica_hours": self.replica_seconds / 3_600,
            "session_hours": self.live_seconds / 3_600,
            "scale_outs": len(self.asked),
            "deaths": self.deaths,
            "failovers": len(self.gaps),
            "failover_gap_p50_s": _quantile(np.array(self.gaps), 0.5),
            "failover_gap_p95_s": _quantile(np.array(self.gaps), 0.95),
            "lost": self.lost,
        }


def _quantile(values: np.ndarray, share: float) -> float | None:
    return float(np.quantile(values, share, method="higher")) if len(values) else None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
