"""That calls go on as before whatever becomes of the transcriber: gaps, and CPU of gateway and replica.

    python -m benchmarks.unhurt [--rounds 3] [--sessions 4] [--seconds 30] [--model echo] [--output FILE]

Each round talks to three services on this machine, in turn, with the same speech:

- off: `transcription=off`, for what listening itself costs a gateway
- on: a transcriber that works; then one that stands still (SIGSTOP) all the while; then one that is killed
  every few seconds, whenever Serve has started it anew
- absent: a transcriber whose model cannot be loaded

`cpu` is the CPU time of gateway and replica alone, in milliseconds per session and second. The exit status is
1 when the median of a broken transcriber's runs is above the dearest run, or its longest gap GAP_MORE_S above
the longest gap, of the one that works.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import against
from benchmarks.against import PARTS, SETTINGS, SETTLE_S, rounded
from benchmarks.dialects import Stream, chat_stream, speech
from benchmarks.live import processes, service
from benchmarks.machine import machine, publish

KILL_EVERY_S = 4.0
GAP_MORE_S = 0.1
ON = {"transcription": "on", "transcriber_num_cpus": 0.1, "sessions_per_address": 0, "static": "none"}
BROKEN = ("slow", "killed", "absent")
FIGURES = ("gateway_cpu", "replica_cpu", "gap_most_ms", "answered_share")


def transcribers() -> list[int]:
    return processes().get("transcriber", [])


@contextlib.contextmanager
def standing_still() -> Iterator[None]:
    """The transcribers that are there now do nothing meanwhile."""
    stopped = transcribers()
    if not stopped:
        raise SystemExit("there is no transcriber")
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def killed() -> Iterator[None]:
    """Whatever transcriber there is dies, at once and every KILL_EVERY_S."""
    done, deaths = threading.Event(), 0

    def work() -> None:
        nonlocal deaths
        while not done.wait(KILL_EVERY_S if deaths else 0.0):
            for pid in transcribers():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    deaths += 1

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if not deaths:
        raise SystemExit("there was no transcriber to kill")


Trouble = Callable[[], contextlib.AbstractContextManager[None]]


def talk(base: str, trouble: Trouble, stream: Stream, sessions: int) -> dict[str, float]:
    """One run, in trouble from before its first session on."""
    pids = {part: found[0] for part, found in processes().items() if part in PARTS}
    with trouble():
        return uvloop.run(
            against.talk(f"{base.replace('http', 'ws')}/api/chat?status=1", sessions, stream, pids)
        )


def round_of(
    model: str, stream: Stream, sessions: int, broken: Path
) -> Iterator[tuple[str, dict[str, float]]]:
    """Each condition once. `broken`: a directory that only looks like a transcriber's model."""
    common = {**SETTINGS, "slots": sessions}
    missing = {**ON, "transcription_model": str(broken)}
    services: list[tuple[Mapping[str, Any], Sequence[tuple[str, Trouble]]]] = [
        ({}, [("off", contextlib.nullcontext)]),
        (ON, [("on", contextlib.nullcontext), ("slow", standing_still), ("killed", killed)]),
        (missing, [("absent", contextlib.nullcontext)]),
    ]
    for settings, conditions in services:
        with service(model, {**common, **settings}) as base:
            time.sleep(SETTLE_S)
            for name, trouble in conditions:
                yield name, talk(base, trouble, stream, sessions)


def compare(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Each figure's median and its most, by condition, and what does not hold."""
    found: dict[str, Any] = {
        name: {
            figure: {
                "median": statistics.median(one[figure] for one in each),
                "most": max(one[figure] for one in each),
            }
            for figure in FIGURES
        }
        for name, each in runs.items()
    }
    wrong = [
        f"{name}.{part}_cpu"
        for name in BROKEN
        for part in PARTS
        if found[name][f"{part}_cpu"]["median"] > found["on"][f"{part}_cpu"]["most"]
    ]
    longest = found["on"]["gap_most_ms"]["most"] + 1e3 * GAP_MORE_S
    wrong += [f"{name}.gap" for name in BROKEN if found[name]["gap_most_ms"]["most"] > longest]
    return {"conditions": found, "broken": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--model", default="echo")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the service goes with us
    stream = chat_stream(speech(options.seconds))
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder)
        (broken / "model.bin").write_bytes(bytes(64))  # or the service would refuse to start
        for _ in range(options.rounds):
            for name, found in round_of(options.model, stream, options.sessions, broken):
                runs.setdefault(name, []).append(found)
                print(name, rounded(found), flush=True)
    compared = compare(runs)
    result = {
        "benchmark": "unhurt",
        "machine": machine("ray", "faster-whisper", "onnxruntime"),
        "model": options.model,
        "sessions": options.sessions,
        "seconds": options.seconds,
        "rounds": options.rounds,
        **rounded(compared),
        "runs": rounded(runs),
    }
    publish(result, options.output)
    return 1 if compared["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
