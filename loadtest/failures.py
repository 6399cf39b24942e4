"""Replicas that die under their sessions: when that happens, and how long each session is silent then.

A session's gap is the time until the first rebuild can begin, plus the rebuilds before it on the new replica
and its own, shortest first. Rebuilds take a constant and a share of the talk, up to the windows that
are run: fit both to measured failovers (`fit`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from personaplex.config import FRAME_RATE
from personaplex.engine.simulated import WINDOW


@dataclass(frozen=True)
class Failures:
    """`mtbf_s`: mean time of a replica until it dies, exponential; infinite: it does not. `at`: moments at
    which one of those that serve dies, whichever. Seconds; the defaults of the gaps were seen on one
    machine, with the tiny model."""

    mtbf_s: float = math.inf
    at: tuple[float, ...] = ()
    seed: int = 1
    noticed_s: float = 0.05  # from the last answer until the first rebuild can begin
    rebuild_s: float = 0.15  # of any session: lease, link, log, first answer
    rebuild_per_s: float = 0.004  # of each second of talk
    windows: int = 4  # of a talk that are run

    def rebuild(self, talk_s: float) -> float:
        """Seconds it takes to rebuild a session that has talked for so long."""
        return self.rebuild_s + self.rebuild_per_s * min(talk_s, self.windows * WINDOW / FRAME_RATE)


@dataclass(frozen=True)
class Measured:
    """One session whose replica died, and that went on at another: after how much talk, and the gap."""

    talk_s: float
    gap_s: float


def fit(deaths: Sequence[Sequence[Measured]]) -> tuple[float, float, float]:
    """`noticed_s`, `rebuild_s` and `rebuild_per_s` from the sessions that were hit together, death by death:
    those with the least squared error of which none is negative. Raises ValueError without any session."""
    rows, gaps = [], []
    for hit in deaths:
        talked = 0.0
        for place, one in enumerate(sorted(hit, key=lambda one: one.talk_s), start=1):
            talked += one.talk_s
            rows.append((1.0, float(place), talked))
            gaps.append(one.gap_s)
    if not rows:
        raise ValueError("no session went on at another replica")
    design, seen = np.array(rows), np.array(gaps)
    best, least = np.zeros(3), math.inf
    for size in (1, 2, 3):
        for chosen in itertools.combinations(range(3), size):
            found = np.zeros(3)
            found[list(chosen)] = np.linalg.lstsq(design[:, chosen], seen, rcond=None)[0]
            error = float(((design @ found - seen) ** 2).sum())
            if found.min() >= 0 and error < least * (1 - 1e-9):
                best, least = found, error
    return float(best[0]), float(best[1]), float(best[2])
