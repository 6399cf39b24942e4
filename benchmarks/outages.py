"""What the capacity planner says of replicas that die, beside a run of `tests.faults` in which they did.

    python -m tests.faults --minutes 12 --kills 50 --output faults.json
    python -m benchmarks.outages faults.json [--run -1] [--output FILE]

Every second kill is for fitting: how long a gap lasts (`loadtest.failures.fit`). Then the planner simulates
the run: the same sessions at the same times, the same kills, a replica that comes back as late as they did,
SEEDS times with other replicas chosen. Its figures are compared with those of the other kills. The exit
status is 1 when one of them is off by more than a fifth; for how many sessions a kill hits, which chance
decides, by more than two standard errors too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import publish
from deployments.settings import Settings
from loadtest.arrivals import Arrival
from loadtest.failures import Failures, Measured, fit
from loadtest.forecast import Timing
from loadtest.simulation import Simulation
from personaplex.config import FRAME_SECONDS
from personaplex.engine.steptimes import StepTimes
from personaplex.persona import PROMPTS

STEPS = Path(__file__).parent / "results" / "steps-example.json"
SEEDS = 20
WITHIN = 0.2
PAUSE_S = 2.0  # of tests.faults, on average, from the moment all is back until the next fault
SLOTS = 8  # of a replica of tests.faults
COMPARED = ("sessions_hit_per_death", "gap_mean_s", "gap_p50_s", "gap_p95_s")
PHASES = ("detection_s", "slot_s", "rebuild_s")


def kills(run: Mapping[str, Any]) -> list[tuple[float, list[Measured]]]:
    """When each kill was, seconds after the run began, and the sessions that it hit. Raises SystemExit for a
    run without kills, or by an older harness."""
    times = [fault["at_s"] for fault in run.get("faults", ()) if fault["kind"] == "kill"]
    if not times:
        raise SystemExit("this run has no kills, or was made before their times were kept")
    others = sorted(fault["at_s"] for fault in run["faults"])
    found = []
    for at in times:
        until = next((later for later in others if later > at), float("inf"))
        moved = [
            Measured(one["frame"] * FRAME_SECONDS, sum(one[phase] for phase in PHASES))
            for row in run["ledger"]
            for one in row["failovers"]
            if at <= one["at_s"] < until
        ]
        found.append((at, moved))
    return found


def arrivals(run: Mapping[str, Any]) -> list[Arrival]:
    """The run's sessions, as the planner takes them."""
    rows = sorted(run["ledger"], key=lambda row: row["began_s"])
    prompt = next(iter(PROMPTS))
    return [
        Arrival(
            number,
            max(0.0, row["began_s"]),
            max(1.0, row["frames_sent"] * FRAME_SECONDS),
            "NATF2",
            prompt,
            number,
        )
        for number, row in enumerate(rows)
    ]


def figures(gaps: Sequence[float], deaths: int, lost: int) -> dict[str, float]:
    """Of sessions whose replica died."""
    row = np.asarray(gaps, float)
    return {
        "sessions_hit_per_death": (len(row) + lost) / deaths,
        "gap_mean_s": float(row.mean()),
        "gap_p50_s": float(np.percentile(row, 50)),
        "gap_p95_s": float(np.percentile(row, 95)),
        "lost": float(lost),
    }


def predict(run: Mapping[str, Any], failures: Failures, startup_s: float) -> dict[str, float]:
    """What the planner says, as the mean of SEEDS runs."""
    chosen = run["settings"]
    settings = Settings.load(
        {
            "slots": SLOTS,
            "replicas_min": chosen["replicas_min"],
            "replicas_max": chosen["replicas_max"],
            "placement": chosen["placement"],
            "session_limit_s": 3_600,
        }
    )
    steps, sessions = StepTimes.load(STEPS), arrivals(run)
    gaps: list[float] = []
    deaths = lost = 0
    for seed in range(SEEDS):
        one = Failures(
            at=failures.at,
            seed=seed,
            noticed_s=failures.noticed_s,
            rebuild_s=failures.rebuild_s,
            rebuild_per_s=failures.rebuild_per_s,
        )
        seen = Simulation(sessions, settings, steps, Timing(startup_s=startup_s), failures=one).run()
        gaps += seen.gaps
        deaths, lost = deaths + seen.deaths, lost + seen.lost
    return figures(gaps, deaths, lost)


def compare(run: Mapping[str, Any]) -> dict[str, Any]:
    """Fits on every second kill and judges by the others."""
    found = kills(run)
    fitted, judged = found[::2], found[1::2]
    hit = [one for _, moved in judged for one in moved]
    if not hit:
        raise SystemExit("two kills at least, that hit sessions")
    noticed_s, rebuild_s, per_s = fit([moved for _, moved in fitted])
    startup_s = max(1.0, statistics.median(np.diff([at for at, _ in found])) - PAUSE_S)
    failures = Failures(
        at=tuple(at for at, _ in found), noticed_s=noticed_s, rebuild_s=rebuild_s, rebuild_per_s=per_s
    )
    failed = sum(bool(row["failure"]) for row in run["ledger"])
    measured = figures([one.gap_s for one in hit], len(judged), 0)
    each = [len(moved) for _, moved in found]  # chance decides it: all kills count
    measured["sessions_hit_per_death"] = (sum(each) + failed) / len(each)
    chance = 2 * statistics.pstdev(each) / len(each) ** 0.5
    planned = predict(run, failures, startup_s)
    rows = {
        name: {
            "planned": round(planned[name], 4),
            "measured": round(measured[name], 4),
            "planned_over_measured": round(planned[name] / measured[name], 3),
        }
        for name in COMPARED
    }
    off = [name for name, row in rows.items() if abs(row["planned_over_measured"] - 1) > WITHIN]
    if abs(planned["sessions_hit_per_death"] - measured["sessions_hit_per_death"]) <= chance:
        off = [name for name in off if name != "sessions_hit_per_death"]
    return {
        "kills": len(found),
        "fitted_to": sum(len(moved) for _, moved in fitted),
        "judged_by": len(hit),
        "startup_s": round(startup_s, 2),
        "noticed_s": round(noticed_s, 4),
        "rebuild_s": round(rebuild_s, 4),
        "rebuild_per_s": round(per_s, 6),
        "compared": rows,
        "two_standard_errors_of_sessions_hit": round(chance, 4),
        "lost": {"planned": planned["lost"] / SEEDS, "measured": failed},
        "off_by_more_than_a_fifth": off,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("faults", type=Path, help="what tests.faults wrote with --output")
    parser.add_argument("--run", type=int, default=-1, help="which of its runs; the last one")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    run = json.loads(options.faults.read_text())[options.run]
    found = compare(run)
    about = {"benchmark": "outages", "of": run["command"], "date": run["date"], "machine": run["machine"]}
    publish({**about, **found}, options.output)
    return 1 if found["off_by_more_than_a_fifth"] else 0


if __name__ == "__main__":
    sys.exit(main())
