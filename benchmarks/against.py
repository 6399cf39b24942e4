"""What this version costs while nothing fails, beside another checkout of this repository.

    git worktree add --detach ../base e769636
    python -m benchmarks.against ../base [--rounds 5] [--sessions 8] [--seconds 30] [--models echo engine]

Each run starts the service of one checkout, lets `--sessions` clients talk to it and reads the CPU time of
its gateway and its replica. The checkouts alternate, run by run, and take turns in going first; both run on
this interpreter and its packages. `echo` does no maths, so what the serving path costs is seen best there.
`engine` is no service but `benchmarks.engine` of either checkout: milliseconds of CPU of its own parts.

- cpu: milliseconds of CPU per session and second, of all threads, while all sessions talk
- idle: the same process before anybody called, as a share of a core
- gap: the longest silence between two pages of any session
- delay: from sending the page that completes a user frame to receiving the page that answers it
- within_spread: the median of this checkout is not above the largest run of the other one
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.caller import Caller
from benchmarks.dialects import Stream, chat_stream, speech
from benchmarks.live import processes, service
from benchmarks.machine import machine, publish, run_seconds, stolen_seconds
from personaplex.config import FRAME_SECONDS

HERE = Path(__file__).parent.parent
PARTS = ("gateway", "replica")
SETTLE_S = 5.0  # a service that has just started is still busy with itself
IDLE_S = 5.0
WARM_UP_S = 3.0
ENGINE_ROUNDS = 5
SETTINGS = {"replica_num_cpus": 0.1, "gateway_num_cpus": 0.1, "session_limit_s": 3_600}


async def talk(url: str, count: int, stream: Stream, pids: Mapping[str, int]) -> dict[str, Any]:
    """`count` sessions at once; CPU seconds of each process, and the delays, after the warm-up."""
    pages, (headers, opening) = stream.messages, stream.opening(url)
    callers = [Caller(url, opening, headers=headers) for _ in range(count)]
    await asyncio.gather(*(caller.open() for caller in callers))
    talking = [
        asyncio.ensure_future(caller.talk(pages, random.random() * FRAME_SECONDS, FRAME_SECONDS))
        for caller in callers
    ]
    await asyncio.sleep(WARM_UP_S)
    seconds = len(pages) * FRAME_SECONDS - WARM_UP_S - FRAME_SECONDS
    used = await watch(pids, seconds)
    await asyncio.gather(*talking)
    first = round(WARM_UP_S / FRAME_SECONDS)
    delays = [
        caller.heard[number] - caller.sent[page]
        for caller in callers
        for number, page in enumerate(stream.completes)
        if number >= first and number in caller.heard
    ]
    gaps = [max(_silences(caller, first)) for caller in callers]
    answered = len(delays) / (count * (len(stream.completes) - first))
    return {
        **{f"{part}_cpu": 1e3 * cpu / (count * seconds) for part, cpu in used.items()},
        "delay_p50_ms": 1e3 * float(np.percentile(delays, 50)),
        "delay_p95_ms": 1e3 * float(np.percentile(delays, 95)),
        "answered_share": answered,
        "gap_most_ms": 1e3 * max(gaps),
    }


def _silences(caller: Caller, first: int) -> list[float]:
    """Seconds beyond a page's length between each two pages from number `first` on, in order of arrival."""
    times = sorted(at for number, at in caller.heard.items() if number >= first)
    return [after - before - FRAME_SECONDS for before, after in itertools.pairwise(times)] or [float("inf")]


async def watch(pids: Mapping[str, int], seconds: float) -> dict[str, float]:
    """CPU seconds that each process uses within `seconds`."""
    before = {part: run_seconds(pid) for part, pid in pids.items()}
    await asyncio.sleep(seconds)
    return {part: run_seconds(pid) - before[part] for part, pid in pids.items()}


def run(checkout: Path, model: str, count: int, stream: Stream) -> dict[str, float]:
    """One service of `checkout`, from its start to its end."""
    with service(model, {**SETTINGS, "slots": count}, checkout=checkout) as base:
        found = {part: pids[0] for part, pids in processes().items() if part in PARTS}
        time.sleep(SETTLE_S)
        idle = asyncio.run(watch(found, IDLE_S))
        began, stolen = time.monotonic(), stolen_seconds()
        url = f"{base.replace('http', 'ws')}/api/chat"
        figures = uvloop.run(talk(url, count, stream, found))
        figures["stolen_cores"] = (stolen_seconds() - stolen) / (time.monotonic() - began)
    return figures | {f"{part}_idle": used / IDLE_S for part, used in idle.items()}


def engine(checkout: Path) -> dict[str, float]:
    """`benchmarks.engine` as that checkout has it: the median of every part but the baseline's."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engine.json"
        command = ["-m", "benchmarks.engine", "--rounds", str(ENGINE_ROUNDS), "--output", str(path)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        subprocess.run([sys.executable, *command], cwd=checkout, env=environment, check=True)
        result = json.loads(path.read_text())
    figures = {
        f"{part}_{kind}_ms": row["median_ms"]
        for part, kinds in result.items()
        if isinstance(kinds, dict)
        for kind, row in kinds.items()
        if isinstance(row, dict) and "median_ms" in row and kind != "naive"
    }
    return figures | {"tiny_real_time_factor": result["tiny"]["real_time_factor"]}


def compare(runs: Mapping[str, Sequence[Mapping[str, float]]], costs: Iterable[str]) -> dict[str, Any]:
    """Medians and spreads of `base` and `this`, by figure, and how the `costs` of this one stand."""
    rows: dict[str, Any] = {}
    for name in runs["this"][0]:
        rows[name] = {
            which: {"median": statistics.median(values), "least": min(values), "most": max(values)}
            for which in runs
            for values in ([one[name] for one in runs[which]],)
        }
    for name in costs:
        row = rows[name]
        row["this_over_base"] = row["this"]["median"] / row["base"]["median"]
        row["within_spread"] = row["this"]["median"] <= row["base"]["most"]
    return rows


def rounded(value: Any) -> Any:
    """Every float in a nested result to four digits behind the point."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(value, 4) if isinstance(value, float) else value


def _revision(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--models", nargs="+", default=["echo", "tiny", "engine"])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the service goes with us
    checkouts = {"base": options.base.resolve(), "this": HERE}
    stream = chat_stream(speech(options.seconds))
    models: dict[str, Any] = {}
    for model in options.models:
        runs: dict[str, list[dict[str, float]]] = {which: [] for which in checkouts}
        for number in range(options.rounds):
            for which in sorted(checkouts, reverse=number % 2 == 1):
                if model == "engine":
                    runs[which].append(engine(checkouts[which]))
                else:
                    runs[which].append(run(checkouts[which], model, options.sessions, stream))
                print(model, which, rounded(runs[which][-1]), flush=True)
        costs = list(runs["this"][0]) if model == "engine" else [f"{part}_cpu" for part in PARTS]
        models[model] = rounded({"compared": compare(runs, costs), "runs": runs})
    result = {
        "benchmark": "against",
        "machine": machine("ray", "uvloop", "numpy"),
        "base": _revision(options.base),
        "this": _revision(HERE),
        "sessions": options.sessions,
        "seconds": options.seconds,
        "rounds": options.rounds,
        "models": models,
    }
    publish(result, options.output)


if __name__ == "__main__":
    main()
