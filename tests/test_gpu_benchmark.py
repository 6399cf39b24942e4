"""The GPU benchmark goes through all its parts on tiny, on a machine that has only what it claims to need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from personaplex.engine.steptimes import StepTimes

pytest.importorskip("triton")

ROOT = Path(__file__).parent.parent
ABSENT = """aiohttp cryptography huggingface_hub httpx locust matplotlib opuslib prometheus_client pydantic
pyloudnorm ray scipy soundfile soxr sphn starlette tqdm websockets"""
RUN = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT.split()!r}))  # importing one of them is an ImportError now
import torch
torch.set_num_threads(1)
from benchmarks import gpu
sys.exit(gpu.main(sys.argv[1:]))
"""
PARTS = [
    *("ceilings", "kernel_checks", "against_cpu", "graphs_against_pieces", "products", "int8_cost"),
    *(
        f"{part}_{kv}"
        for kv in ("int8", "bf16")
        for part in ("ticks", "prefill", "steps", "starts", "joins", "paced")
    ),
]


def test_dry_run(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-c", RUN, "--dry-run", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert not report["errors"]
    assert not report["skipped"]
    assert "mean nothing" in report["dry_run"]
    for part in PARTS:
        assert report[part], part
    worst = {name: value for name, value in report["kernel_checks"].items() if name != "draws_that_differ"}
    assert max(worst.values()) < 1e-3
    assert report["kernel_checks"]["draws_that_differ"] == 0
    assert report["against_cpu"]["frames_equal"] == report["against_cpu"]["frames"]
    assert report["graphs_against_pieces"]["equal"]
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
