"""What the benchmarks make of what they measured."""

from __future__ import annotations

import os
import time

from benchmarks.against import compare
from benchmarks.machine import run_seconds


def _runs(*cpu: float) -> list[dict[str, float]]:
    return [{"gateway_cpu": one, "replica_cpu": 2 * one} for one in cpu]


def test_a_version_that_costs_no_more_than_the_dearest_run_of_the_other_is_within_its_spread() -> None:
    rows = compare({"base": _runs(10.0, 11.0, 12.0), "this": _runs(11.9, 12.0, 15.0)})
    assert rows["gateway_cpu"]["within_spread"] is True
    assert rows["gateway_cpu"]["base"] == {"median": 11.0, "least": 10.0, "most": 12.0}
    assert abs(rows["replica_cpu"]["this_over_base"] - 12 / 11) < 1e-9


def test_a_version_that_costs_more_is_not() -> None:
    rows = compare({"base": _runs(10.0, 11.0, 12.0), "this": _runs(11.0, 12.1, 15.0)})
    assert rows["gateway_cpu"]["within_spread"] is False


def test_cpu_time_counts_less_than_a_tick() -> None:
    before, own = run_seconds(os.getpid()), time.process_time()
    while time.process_time() - own < 0.003:
        pass
    spent = run_seconds(os.getpid()) - before
    assert 0.001 < spent < 1.0
