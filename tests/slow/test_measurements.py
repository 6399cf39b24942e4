"""What the benchmarks make of what they measured."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import pytest
from faults.ledger import Entry, Fault, Ledger

from benchmarks import outages, unhurt, uploads
from benchmarks.against import compare
from benchmarks.machine import run_seconds
from loadtest.failures import Measured
from personaplex.config import FRAME_SECONDS
from personaplex.session.moshi import Metadata

COSTS = ("gateway_cpu", "replica_cpu")


def _runs(*cpu: float) -> list[dict[str, float]]:
    return [{"gateway_cpu": one, "replica_cpu": 2 * one} for one in cpu]


def test_a_version_that_costs_no_more_than_the_dearest_run_of_the_other_is_within_its_spread() -> None:
    rows = compare({"base": _runs(10.0, 11.0, 12.0), "this": _runs(11.9, 12.0, 15.0)}, COSTS)
    assert rows["gateway_cpu"]["within_spread"] is True
    assert rows["gateway_cpu"]["base"] == {"median": 11.0, "least": 10.0, "most": 12.0}
    assert abs(rows["replica_cpu"]["this_over_base"] - 12 / 11) < 1e-9


def test_a_version_that_costs_more_is_not() -> None:
    rows = compare({"base": _runs(10.0, 11.0, 12.0), "this": _runs(11.0, 12.1, 15.0)}, COSTS)
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


def _faults(slower: float = 1.0) -> dict[str, Any]:
    """Eight sessions on two replicas, one of which dies twenty times; every second gap is `slower`."""
    ledger: list[dict[str, Any]] = [
        {"began_s": 0.1 * number, "frames_sent": 9_000, "failure": "", "failovers": []} for number in range(8)
    ]
    faults = [{"kind": "kill", "at_s": 30.0 * number} for number in range(1, 21)]
    for number, fault in enumerate(faults):
        talk_s = fault["at_s"]
        for place, row in enumerate(ledger[: 8 if number else 4], start=1):
            rebuild_s = 0.1 * place + 0.0001 * talk_s * place
            details = {"detection_s": 0.1, "slot_s": 0.1, "rebuild_s": rebuild_s * slower ** (number % 2)}
            row["failovers"].append({"at_s": talk_s + 2, "frame": round(talk_s / FRAME_SECONDS), **details})
    settings = {"replicas_min": 2, "replicas_max": 2, "placement": "spread"}
    return {"settings": settings, "faults": faults, "ledger": ledger}


def test_the_planner_meets_a_run_that_behaves_as_it_thinks() -> None:
    found = outages.compare(_faults())
    assert (found["kills"], found["lost"]) == (20, {"planned": 0.0, "measured": 0.0})
    fitted = (found["noticed_s"], found["rebuild_s"], found["rebuild_per_s"])
    assert fitted == pytest.approx((0.2, 0.1, 0.0001), abs=1e-3)
    assert [name for name in found["off_by_more_than_a_fifth"] if name.startswith("gap")] == []


def test_a_run_that_is_slower_than_what_was_fitted_is_said_so() -> None:
    found = outages.compare(_faults(slower=2.0))
    assert {"gap_mean_s", "gap_p95_s"} <= set(found["off_by_more_than_a_fifth"])


def test_a_run_without_kills_is_no_proof() -> None:
    with pytest.raises(SystemExit, match="no kills"):
        outages.compare({"faults": [{"kind": "cut", "at_s": 3.0}], "ledger": []})


def test_the_fault_harness_keeps_what_the_planner_is_judged_by() -> None:
    details = {
        "type": "continued",
        "generation": 1,
        "frame": 50,
        "detection_s": 0.1,
        "slot_s": 0.2,
        "rebuild_s": 0.3,
    }
    entry = Entry(0, began=100.0, ended=160.0, frames_sent=750)
    entry.heard.messages = [(111.0, Metadata(details)), (131.0, Metadata({**details, "frame": 300}))]
    faults = [Fault("kill", 110.0, 1, 1), Fault("kill", 130.0, 1, 1)]
    run = {
        "settings": {"replicas_min": "2", "replicas_max": "2", "placement": "spread"},  # as they are kept
        **Ledger([entry], faults).document(),
    }
    assert [at for at, _ in outages.kills(run)] == [10.0, 30.0]
    assert outages.kills(run)[1][1] == [Measured(24.0, pytest.approx(0.6))]
    found = outages.compare(json.loads(json.dumps(run)))
    assert found["startup_s"] == 18.0
