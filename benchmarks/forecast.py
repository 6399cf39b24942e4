"""The planner's forecast beside what a live service did with the very same sessions.

    python -m benchmarks.forecast [--output benchmarks/results/forecast]

One service on this machine with the simulated engine, one replica that may become two; Locust sends it a
load that outgrows the first and, for a while, the second: a queue, refusals, one scale-out. The planner is
given the same settings and sessions, and a start-up time seen in a rehearsal, never one of this run. Writes
OUTPUT.json, and the load test's own report as OUTPUT-load.json and .html.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from benchmarks.live import info, service
from benchmarks.machine import machine, publish
from loadtest import plan
from loadtest.planner import Plan

ROOT = Path(__file__).parent.parent
STEPS = ROOT / "benchmarks" / "results" / "steps-example.json"
ARRIVALS = "60@0.5,70@3.2,50@0.8"
LENGTHS = "exponential:35"
LONGEST_S = 75.0
SETTINGS = {
    "slots": 32,
    "replicas_max": 2,
    "queue_limit": 12,
    "queue_timeout_s": 12,
    "upscale_delay_s": 1,
    "replica_num_cpus": 0.1,
    "gateway_num_cpus": 0.1,
}
REHEARSAL = "20@3"  # enough to want a second replica
PUSH_S = 2.0  # Serve's reports of load; 10 s unless its environment says otherwise
COMPARED = ("refused_share", "ready_mean_s", "ready_p95_s", "queued")


def running() -> AbstractContextManager[str]:
    """The service that is measured."""
    reports = {
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": str(PUSH_S),
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": str(PUSH_S),
    }
    return service("simulated", {**SETTINGS, "step_times": STEPS}, reports)


class Watch:
    """Notes when the first session held a slot and when the second replica was there."""

    def __init__(self, base: str) -> None:
        self.first_at: float | None = None
        self.second_at: float | None = None
        self._base = base
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.25):
            seen = info(self._base)
            if seen is None:
                continue
            if self.first_at is None and seen["used"]:
                self.first_at = time.monotonic()
            if seen["replicas"] > 1:
                self.second_at = time.monotonic()
                return


def load(base: str, arrivals: str, stem: Path) -> tuple[dict[str, Any], float]:
    """Runs Locust; its report, and when the second replica was there: seconds after the first session."""
    watch = Watch(base)
    command = [
        *(sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--headless"),
        *("--host", base, "--arrivals", arrivals, "--lengths", LENGTHS, "--longest", str(LONGEST_S)),
        *("--output", str(stem)),
    ]
    run = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    watch.stop()
    if not stem.with_suffix(".json").exists():
        raise SystemExit(run.stderr)
    if watch.first_at is None or watch.second_at is None:
        raise SystemExit("no second replica came up")
    return json.loads(stem.with_suffix(".json").read_text()), watch.second_at - watch.first_at


def planned(arrivals: str, startup_s: float) -> Plan:
    """The planner's forecast, for a fleet of at most two."""
    values = {"replicas_min": 1, "replicas_initial": 1, **SETTINGS}
    options = plan.parse(
        [
            *("--arrivals", arrivals, "--lengths", LENGTHS, "--longest", str(LONGEST_S)),
            *("--steps", str(STEPS), "--gpus", "2", "--startup", str(startup_s), "--push", str(PUSH_S)),
            *("--set", *(f"{name}={value}" for name, value in values.items())),
        ]
    )
    return plan.run(options)


def rehearse() -> float:
    """Seconds from the decision for a second replica, as simulated, until a live one took sessions."""
    with tempfile.TemporaryDirectory() as folder, running() as base:
        report, second_at = load(base, REHEARSAL, Path(folder) / "rehearsal")
    simulated = planned(REHEARSAL, 0.0).forecast
    first_at = min(session["at_s"] for session in report["sessions"])
    return max(0.0, first_at + second_at - simulated.asked[0])


def compare(measured: dict[str, Any], forecast: dict[str, Any]) -> dict[str, Any]:
    """Both figures and forecast / measured, by name."""
    pairs = {name: (measured[name], forecast[name]) for name in COMPARED}
    return {
        name: {
            "measured": seen,
            "forecast": said,
            "forecast_over_measured": round(said / seen, 3) if seen and said is not None else None,
        }
        for name, (seen, said) in pairs.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--startup", type=float, help="seconds; skips the rehearsal")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "forecast")
    options = parser.parse_args()
    startup_s = options.startup or rehearse()
    print(f"start-up time from the rehearsal: {startup_s:.1f} s", flush=True)
    forecast = planned(ARRIVALS, startup_s).data()
    with running() as base:
        report, second_at = load(base, ARRIVALS, options.output.with_name(options.output.name + "-load"))
    result = {
        "benchmark": "forecast",
        "machine": machine("ray", "locust"),
        "arrivals": ARRIVALS,
        "lengths": LENGTHS,
        "startup_s": round(startup_s, 2),
        "second_replica_after_s": round(second_at, 1),
        "compared": compare(report["summary"], forecast["forecast"]),
        "load_passed": report["passed"],
        "plan": forecast,
    }
    publish(result, options.output.with_suffix(".json"))


if __name__ == "__main__":
    main()
