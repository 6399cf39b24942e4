"""What must hold under attack, and what is kept of the figures; see tests/hostile.py."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deployments.connections import REQUEST_TIMEOUT_S

LIMITS = {  # figure: the most it may be
    "memory_mb": 400.0,  # of any process, above idle
    "gap_s": 0.5,  # of a neighbour; or three times its quiet gap
    "queue_cpu": 1.3,  # of gateway and replica, over nobody waiting
    "slots_back_s": 5.0,  # after a flood, and after the proxy was killed
    "kept_s": REQUEST_TIMEOUT_S + 3.0,  # a connection that asks for nothing
    "log_lines": 8.0,  # "Failed to route", while somebody waited
    "ports_open": 0.0,  # on other interfaces than loopback
    "left_s": 20.0,  # after the raylet was killed
}

Figures = dict[str, float]


def broken(figures: Figures) -> list[str]:
    """Which of LIMITS do not hold."""
    found = []
    for name, value in figures.items():
        attack, _, kind = name.rpartition(".")
        most = LIMITS.get(kind, float("inf"))
        if kind == "gap_s":
            most = max(most, 3 * figures[f"{attack}.quiet_gap_s"])
        if value > most or (kind == "told_1012" and value < 1):
            found.append(f"{name} is {value:.3g}, over {most:.3g}")
    return found


def summary(rounds: Sequence[Figures]) -> dict[str, Any]:
    """What is kept of one part."""
    median = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    rounded = [{name: round(value, 4) for name, value in one.items()} for one in (median, *rounds)]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip(),
        "broken": broken(median),
        "median": rounded[0],
        "rounds": rounded[1:],
    }
