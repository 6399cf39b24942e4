"""Replicas that die under their sessions: when that happens, and how long each session is silent then.

A session's gap is the time until its gateway asks for another slot, plus the rebuilds before it on the new
replica and its own, shortest first. Rebuilds take a constant and a share of the talk, up to the windows that
are run: fit both to measured failovers (`fit`).
"""

from __future__ import annotations

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
    noticed_s: float = 0.05  # from the last answer to the request for another slot
    rebuild_s: float = 0.15  # of any session: lease, link, log, first answer
    rebuild_per_s: float = 0.004  # of each second of talk
    windows: int = 4  # of a talk that are run

    def rebuild(self, talk_s: float) -> float:
        """Seconds it takes to rebuild a session that has talked for so long."""
        return self.rebuild_s + self.rebuild_per_s * min(talk_s, self.windows * WINDOW / FRAME_RATE)


def fit(talks_s: Sequence[float], gaps_s: Sequence[float], noticed_s: float) -> tuple[float, float]:
    """`rebuild_s` and `rebuild_per_s` from the gaps of sessions that were rebuilt each alone, by least
    squares; neither is negative."""
    if len(talks_s) < 2:
        raise ValueError("two failovers at least")
    slope, constant = np.polyfit(np.asarray(talks_s), np.asarray(gaps_s) - noticed_s, 1)
    if slope < 0 or constant < 0:
        slope, constant = max(0.0, slope), max(0.0, float(np.mean(gaps_s)) - noticed_s)
    return float(constant), float(slope)
