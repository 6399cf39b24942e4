"""How many sessions a card holds, as the operator's tool says it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from k8s import __main__ as tool
from k8s import sizing

SLOTS = ["slots", "--memory-gib", "140"]


def test_slots_are_computed_and_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for kv in sizing.KINDS:
        assert tool.main([*SLOTS, "--bandwidth-gbs", "4800", "--kv", kv]) == 0
        said = capsys.readouterr()
        assert "not measured" in said.err
        found[kv] = int(said.out)
    assert found["auto"] == sizing.slots(sizing.Card(140 * 2**30, 4_800e9))
    assert found["int8"] > 1.7 * found["auto"]
    small = sizing.Card(24 * 2**30, 1_000e9)
    assert sizing.slots(small) == 0 < sizing.slots(small, "int8", "int8")


def test_slots_follow_a_measurement_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A step of 7.5 + n ms: 52 sessions fill three quarters of a frame, far fewer than memory holds."""
    axes = {"contexts": [3_000], "batches": [1, 128], "prefill_positions": [1], "prefill_ms": [4.0]}
    steps = {"table": "steps", "source": "measured", "tick_ms": [[8.5, 135.5]], **axes}
    report = {"machine": {"gpu": "NVIDIA H200"}, "steps_int8": steps}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(report))
    assert tool.main([*SLOTS, "--measured", str(path), "--kv", "int8"]) == 0
    said = capsys.readouterr()
    assert said.out == "52\n"
    assert "measured on NVIDIA H200" in said.err
    for wrong in ({}, {"dry_run": "tiny"}, {"steps_int8": {**steps, "source": "derived"}}):
        path.write_text(json.dumps({**report, **wrong}))
        assert tool.main([*SLOTS, "--measured", str(path), "--kv", "int8" if wrong else "auto"]) == 1
        assert capsys.readouterr().err.startswith("error: ")
