"""What the benchmarks make of what they measured."""

from __future__ import annotations

import os
import time

from benchmarks import unhurt, uploads
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


def _calls(cpu: float, gap_ms: float) -> dict[str, float]:
    return {"gateway_cpu": cpu, "replica_cpu": cpu, "gap_most_ms": gap_ms, "answered_share": 1.0}


def test_calls_are_unhurt_within_the_spread_of_a_transcriber_that_works() -> None:
    runs = {name: [_calls(10.0, 50.0)] for name in ("off", "slow", "killed", "absent")}
    found = unhurt.compare({**runs, "on": [_calls(11.0, 40.0)]})
    assert found["broken"] == []
    worse = unhurt.compare({**runs, "on": [_calls(11.0, 40.0)], "killed": [_calls(11.1, 141.0)]})
    assert worse["broken"] == ["killed.gateway_cpu", "killed.replica_cpu", "killed.gap"]


def test_what_an_upload_met_is_judged_by_its_body() -> None:
    answers = {"zip": {"422": 3, "500": 1}, "endless": {"413": 1, "BrokenPipeError": 2}, "1 Hz": {"200": 1}}
    assert uploads.untyped(answers) == {"zip: 500": 1, "1 Hz: 200": 1}
