"""The GPU benchmark goes through all its parts on tiny, on a machine that has only what it claims to need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.report import Report, run_group
from personaplex.engine.steptimes import StepTimes

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
ABSENT = """aiohttp cryptography huggingface_hub httpx locust matplotlib opuslib prometheus_client pydantic
pyloudnorm ray scipy soundfile soxr sphn starlette tqdm websockets"""
# What Python runs at its start, in the command and in the processes it starts.
START = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT.split()!r}))  # importing one of them is an ImportError now
"""
PARTS = [
    *("ceilings", "kernel_checks", "against_cpu", "captured_against_eager", "matmuls", "int8_cost"),
    *(
        f"{part}_{kv}"
        for kv in ("int8", "bf16")
        for part in ("ticks", "prefill", "steps", "starts", "joins", "paced")
    ),
]


def test_dry_run(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    (tmp_path / "sitecustomize.py").write_text(START)
    (tmp_path / "numba.py").write_text("raise ImportError('Numba needs another NumPy')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert not report["errors"]
    assert not report["skipped"]
    assert list(report["seconds"])[-1] == "group tuning"
    assert "mean nothing" in report["dry_run"]
    for part in PARTS:
        assert report[part], part
    assert max(report["kernel_checks"].values()) < 1e-3
    assert report["against_cpu"]["frames_equal"] == report["against_cpu"]["frames"]
    assert report["captured_against_eager"]["equal"]
    assert {(row["sessions"], row["context"]) for row in report["ticks_int8"]} == {(1, 20), (3, 20)}
    for kv in ("int8", "bf16"):
        steps = StepTimes.from_json(kv, report[f"steps_{kv}"])  # what planners and the simulated model read
        assert (steps.source, steps.largest_batch) == ("measured", 3)
    assert 0 < report["int8_cost"]["kv"]["logit_error"] < report["int8_cost"]["weights"]["logit_error"] < 0.05
    assert output.with_suffix(".svg").read_text().startswith("<svg")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert "no GPU" in capsys.readouterr().err


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    """What was found before, and what comes after, is in the file; so is the reason."""
    output = tmp_path / "gpu.json"
    report = Report(100.0, output)

    def fail() -> None:
        raise torch.OutOfMemoryError("no room")

    assert report.part("first", 1, lambda: 1) == 1
    assert report.part("second", 1, fail) is None
    assert report.part("third", 1_000, lambda: 3) is None
    assert report.part("fourth", 1, lambda: 4) == 4
    written = json.loads(output.read_text())
    assert (written["first"], written["fourth"]) == (1, 4)
    assert written["errors"] == {"second": "OutOfMemoryError: no room"}
    assert written["skipped"] == ["third"]


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="ends the group by asking for a GPU where there is none"
)
def test_a_group_whose_process_dies_is_an_error_and_no_more(tmp_path: Path) -> None:
    report = Report(100.0, tmp_path / "gpu.json")
    report.part("before", 1, lambda: 1)
    run_group(report, "checks", 30.0, [])
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["before"] == 1
    assert written["errors"] == {"group checks": "its process ended with 2"}
    assert written["seconds"]["group checks"] > 0
