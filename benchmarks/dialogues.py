"""How scores of conversations move with load: the same turns spoken to a live service alone and together.

    python -m benchmarks.dialogues --sessions 24 --output benchmarks/results/dialogues.json

The service runs the engine that only echoes, so that nothing but the way there and back can change: an echo
begins as late after the user as the service is slow. Samples are of the synthetic set (espeak-ng); the scores
are those of `personaplex.evaluate` on what the clients heard, network and codecs included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.live import service
from benchmarks.machine import machine, publish
from personaplex.evaluation.dataset import Dataset, load
from personaplex.evaluation.results import results
from personaplex.evaluation.scoring import Record, Scorer, score
from personaplex.evaluation.synth import synthesise
from personaplex.evaluation.vad import Detector

TASK = "candor_turn_taking"
SAMPLES = 4
LOCUSTFILE = Path(__file__).parent.parent / "loadtest" / "locustfile.py"
BURST_S = 2.0  # within which sessions that are to talk together begin
APART_S = 12.0  # between sessions that are to be alone, on average
TIMEOUT_S = 200.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sessions", type=int, default=24, help="that talk together")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        publish(measure(Path(folder), options.sessions), options.output)


def measure(folder: Path, sessions: int) -> dict[str, Any]:
    data = folder / "data"
    synthesise(data, SAMPLES)
    found = load(data, [TASK])
    arrivals = {
        "alone": f"{APART_S * SAMPLES:g}@{1 / APART_S:.4f}",
        "together": f"{BURST_S:g}@{sessions / BURST_S:g}",
    }
    with service("echo", {"slots": 2 * sessions, "replicas_max": 1}) as base:
        for name, profile in arrivals.items():
            _talk(base, data, folder / name, profile)
    detector = Detector()
    return {
        "benchmark": "dialogues",
        "machine": machine(),
        **{name: _figures(folder / name, found, detector) for name in arrivals},
    }


def _talk(base: str, data: Path, out: Path, profile: str) -> None:
    command = [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", base),
        *("--arrivals", profile, "--dialogues", str(data), "--tasks", TASK, "--answers", str(out)),
        *("--output", str(out.with_suffix(".load")), "--require", "lost<=0", "refused<=0"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode:
        raise SystemExit(f"the load test failed:\n{done.stderr[-2_000:]}")


def _figures(out: Path, found: Dataset, detector: Detector) -> dict[str, Any]:
    """The scores of one run, how late echoes began, and what the load test says of it."""
    records = score(out, found.samples, Scorer(detector, "text"))
    figures = results(records, found, {}, "text")
    summary = json.loads(out.with_suffix(".load.json").read_text())["summary"]
    lags = sorted(_lag(record) for record in records if record["agent"])
    return {
        "sessions": len(records),
        "not_scored": len(figures["errors"]),
        "echo_lag_s": {"median": lags[len(lags) // 2], "largest": lags[-1]} if lags else None,
        "turn_taking": figures["tasks"][TASK]["event"],
        **{name: summary[name] for name in ("answer_p50_ms", "answer_p99_ms", "audible_per_minute")},
        **{name: summary[name] for name in ("deficit_share", "sent_late_share")},
    }


def _lag(record: Record) -> float:
    lag: float = record["agent"][0][0] - record["user"][0][0]
    return round(lag, 3)


if __name__ == "__main__":
    main()
