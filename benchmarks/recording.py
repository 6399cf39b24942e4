"""What a recorded session costs beside one that is not, in one run.

    python -m benchmarks.recording [--sessions 8] [--seconds 15] [--rounds 5] [--output FILE]

The engine does no maths (`echo`). One service lets its clients choose; rounds of recorded and unrecorded
sessions take turns. `delay` and `CPU` are those of `benchmarks.serving`. The ratio is that of the medians.
The spread is that of the rounds of one kind, from least to greatest over their median; a ratio within it says
nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bursts import processes
from benchmarks.dialects import chat_stream, speech
from benchmarks.live import service
from benchmarks.machine import machine, publish
from benchmarks.serving import measure
from personaplex.record.folder import find_records, read_record

KINDS = {"unrecorded": "", "recorded": "?record=1"}
FIGURES = ("delay_p50_ms", "delay_p99_ms", "cpu_ms_per_session_second")
SETTLE_S = 1.0  # between two rounds, for the sessions of the last to be wound up


def summary(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, spreads and ratios of FIGURES over all rounds."""
    result: dict[str, Any] = {}
    for figure in FIGURES:
        values = {kind: [run[figure] for run in rounds] for kind, rounds in runs.items()}
        medians = {kind: statistics.median(some) for kind, some in values.items()}
        result[figure] = {
            **{kind: round(median, 2) for kind, median in medians.items()},
            "ratio": round(medians["recorded"] / medians["unrecorded"], 3),
            "spread": {
                kind: round((max(some) - min(some)) / medians[kind], 3) for kind, some in values.items()
            },
        }
    return result


def kept(folder: Path) -> dict[str, int]:
    """What the recorded rounds left: without records the figures would say nothing."""
    records = [read_record(path) for path in find_records([folder])]
    return {"records": len(records), "frames": sum(len(record) for record in records)}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recording", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/recording.json"))
    options = parser.parse_args()
    stream = chat_stream(speech(options.seconds))
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    began = time.time()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "records"
        settings = {
            "record": "allowed",
            "record_dir": folder,
            "slots": options.sessions + 2,  # the last round's may still hold theirs for a moment
            "replica_num_cpus": 0.1,
            "gateway_num_cpus": 0.1,
            "sessions_per_address": 0,
        }
        with service("echo", settings) as base:
            url = base.replace("http", "ws", 1) + "/api/chat"
            pids = [process.pid for some in processes(began).values() for process in some]
            measure(url, options.sessions, stream, pids)  # to warm up
            for _ in range(options.rounds):
                for kind, query in KINDS.items():
                    time.sleep(SETTLE_S)
                    runs[kind].append(run := measure(url + query, options.sessions, stream, pids))
                    print(f"{kind:10s} {json.dumps(run)}", flush=True)
        found = kept(folder)
    result = {
        "benchmark": "recording",
        "machine": machine("ray", "uvloop", "websockets"),
        "sessions": options.sessions,
        "seconds": options.seconds,
        "kept": found,
        "figures": summary(runs),
        "runs": runs,
    }
    publish(result, options.output)


if __name__ == "__main__":
    main()
