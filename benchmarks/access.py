"""What keys, uploads and the queue cost those who are not meant, on a live service with two gateways.

    python -m benchmarks.access [--only uploads swaps flood queue] [--seconds 60] [--output FILE]

Starts one service on this machine: echo engine, two gateways behind HAProxy, a keys file. One neighbour talks
with a key of its own all the time; its gap is the longest silence between two of its pages.

- uploads: up to 10,000 hostile recordings to /api/voices within `--seconds`, from a process of lower
  priority with 300 keys, so that thousands of them get past the limit of each key
- swaps: the keys file is swapped 50 times, as a mounted Secret is, and then loses a key that talks
- flood: one key keeps 100 callers waiting over both gateways; callers of another key come one by one. Their
  longest wait, in turns of a slot, is what is judged; `overtaken_by` counts who was let in before them
- queue: callers of many lengths; everything they were told of their wait, beside how long it was from then
  until the handshake; `first` is the first thing that each of them was told
- memory: the most that any process of the service grew above idle, children included

The exit status is 1 when something does not hold: `LIMITS`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import websockets

from benchmarks import uploads
from benchmarks.keyed import Call, Keys, Memory, Pages, Place, gap, processes_of_service
from benchmarks.live import service
from benchmarks.machine import machine, publish
from deployments.gateway.waits import close

SLOTS = 5  # one of them the neighbour's
UPLOADERS, THREADS = 300, 16
UPLOADS = 10_000
SWAPS, SWAP_EVERY_S = 50, 0.2
REVOKED_S = 5.0
CROWD, TURN_S, PROBES = 100, 5.0, 16  # TURN_S: the longest time a caller of the crowd holds its slot
QUEUE_CALLERS, QUEUE_LENGTHS_S = 14, (2.0, 8.0)
QUIET_S = 5.0
SETTINGS = {
    "slots": SLOTS,
    "gateways_min": 2,
    "gateways_max": 2,
    "gateway_num_cpus": 0.1,
    "replica_num_cpus": 0.1,
    "queue_limit": 256,
    "queue_timeout_s": 300,
    "sessions_per_address": 0,
    "session_limit_s": 3_600,
    "static": "none",
}
LIMITS = {
    "uploads.gap_s": 0.5,  # a client's player and this machine's own stalls; `quiet_gap_s` is beside it
    "uploads.untyped": 0,
    "swaps.gap_s": 0.5,
    "swaps.revoked_refused_s": REVOKED_S,
    "flood.turns_waited": 1,
    "memory.grown_mb": 200.0,
}


async def beside(
    place: Place, stream: Pages, work: Callable[[], Awaitable[dict[str, Any]]]
) -> dict[str, Any]:
    """What `work` found, and how the neighbour fared before it and meanwhile."""
    call = Call()
    talking = asyncio.ensure_future(place.call("neighbour", 3_600, stream, call))
    await call.settled.wait()
    await asyncio.sleep(QUIET_S + 1.0)
    began = time.monotonic()
    quiet = gap(call, began - QUIET_S, began)
    found = await work()
    ended = time.monotonic()
    lost = talking.done()
    talking.cancel()
    await asyncio.wait({talking})
    return {**found, "quiet_gap_s": quiet, "gap_s": float("inf") if lost else gap(call, began, ended)}


def lines(*, leaving: bool = True) -> list[str]:
    """Of the keys file."""
    names = ["neighbour", "crowd", "one", *(["leaving"] if leaving else ())]
    return [
        *(f"{name} label={name}" for name in names),
        *(f"up{number} label=up{number} own_voices=yes" for number in range(UPLOADERS)),
        *(f"q{number} label=q{number}" for number in range(QUEUE_CALLERS)),
    ]


# What is tried


async def hostile_uploads(place: Place, stream: Pages, options: argparse.Namespace) -> dict[str, Any]:
    where = urlsplit(place.base)
    here, there = multiprocessing.get_context("spawn").Pipe()
    names = [f"up{number}" for number in range(UPLOADERS)]
    arguments = (there, where.hostname, where.port, names, THREADS)
    process = multiprocessing.get_context("spawn").Process(target=uploads.process, args=arguments)
    process.start()

    async def work() -> dict[str, Any]:
        here.send((UPLOADS, options.seconds))
        return dict(await asyncio.to_thread(here.recv))

    try:
        found = await beside(place, stream, work)
    finally:
        here.send(None)
        await asyncio.to_thread(process.join)
    return found | {"untyped": uploads.untyped(found["answers"])}


async def key_swaps(place: Place, stream: Pages, options: argparse.Namespace) -> dict[str, Any]:
    async def work() -> dict[str, Any]:
        for number in range(SWAPS):
            place.keys.swap([*lines(), f"other{number} label=other"])
            await asyncio.sleep(SWAP_EVERY_S)
        leaving = Call()
        going_on = asyncio.ensure_future(place.call("leaving", REVOKED_S + 3.0, stream, leaving))
        await leaving.settled.wait()
        revoked = time.monotonic()
        place.keys.swap(lines(leaving=False))
        let_in = revoked  # last
        while time.monotonic() - revoked < REVOKED_S + 1.0:
            asked = time.monotonic()
            with contextlib.suppress(websockets.InvalidStatus):
                await place.call("leaving", 0.0)
                let_in = asked
            await asyncio.sleep(0.1)
        await going_on  # its session was not ended
        place.keys.swap(lines())
        return {"swaps": SWAPS, "revoked_refused_s": let_in - revoked}

    return await beside(place, stream, work)


async def flood(place: Place, stream: Pages, options: argparse.Namespace) -> dict[str, Any]:
    granted: list[float] = []  # when the crowd got slots
    crowd: list[asyncio.Future[None]] = []
    refused = 0

    async def one_of_the_crowd() -> None:
        nonlocal refused
        dice = random.Random(len(crowd))
        await asyncio.sleep(dice.random() * 2.0)
        while True:
            try:
                call = await place.call("crowd", dice.uniform(0.8, 1.0) * TURN_S)
                granted.append(call.live)
            except (websockets.WebSocketException, OSError):
                refused += 1
                await asyncio.sleep(1.0)

    async def work() -> dict[str, Any]:
        crowd.extend(asyncio.ensure_future(one_of_the_crowd()) for _ in range(CROWD))
        await asyncio.sleep(2.0 + 2 * TURN_S)
        waits, calls = [], []
        for _ in range(PROBES):
            calls.append(await place.call("one", 0.2))
            waits.append(calls[-1].live - calls[-1].began)
        await asyncio.sleep(2 * TURN_S)  # those that had slots meanwhile say so when they leave
        # With a handshake on its way to the crowd when one of these was queued, that one counts too.
        overtaken = [sum((call.queued or call.live) < at < call.live for at in granted) for call in calls]
        between = np.diff(sorted(granted))
        return {
            "crowd": CROWD,
            "crowd_refused": refused,
            "turn_s": TURN_S,
            "between_grants_s": {"mean": float(between.mean()), "most": float(between.max())},
            "wait_s": {"median": statistics.median(waits), "most": max(waits)},
            "turns_waited": max(waits) / TURN_S,
            "overtaken_by": overtaken,
        }

    try:
        return await beside(place, stream, work)
    finally:
        for one in crowd:
            one.cancel()
        await asyncio.gather(*crowd, return_exceptions=True)


async def queue(place: Place, stream: Pages, options: argparse.Namespace) -> dict[str, Any]:
    calls: list[Call] = []

    async def caller(number: int, until: float) -> None:
        dice = random.Random(number)
        while time.monotonic() < until:
            with contextlib.suppress(websockets.WebSocketException, OSError):
                calls.append(await place.call(f"q{number}", dice.uniform(*QUEUE_LENGTHS_S)))
            await asyncio.sleep(dice.random())

    until = time.monotonic() + max(30.0, options.seconds)
    await asyncio.gather(*(caller(number, until) for number in range(QUEUE_CALLERS)))
    said = [(wait, call.live - at) for call in calls for at, wait in call.foretold]
    first = [(wait, call.live - at) for call in calls for at, wait in call.foretold[:1]]
    return {
        "calls": len(calls),
        "callers_told": len(first),
        "foretold": len(said),
        "within_a_factor_of_two": good_share(said),
        "first_within_a_factor_of_two": good_share(first),
        "foretold_over_actual_median": statistics.median(w / max(a, 0.1) for w, a in said) if said else None,
        "waits_s": {"median": statistics.median(c.live - c.began for c in calls)} if calls else None,
    }


def good_share(said: list[tuple[float, float]]) -> float | None:
    """Of waits that were told, each with what it was; None of none."""
    return sum(close(wait, actual) for wait, actual in said) / len(said) if said else None


Part = Callable[[Place, Pages, argparse.Namespace], Coroutine[Any, Any, dict[str, Any]]]
PARTS: dict[str, Part] = {
    "uploads": hostile_uploads,
    "swaps": key_swaps,
    "flood": flood,
    "queue": queue,
}


@contextlib.contextmanager
def running() -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as folder:
        keys = Keys(Path(folder), lines())
        with service("echo", {**SETTINGS, "api_keys_file": keys.path}) as base:
            time.sleep(5.0)
            yield Place(base, keys)


def broken(parts: dict[str, dict[str, Any]]) -> list[str]:
    """What does not hold, in words."""
    wrong = []
    for name, limit in LIMITS.items():
        part, _, figure = name.partition(".")
        value = parts.get(part, {}).get(figure, 0)
        amount = sum(value.values()) if isinstance(value, dict) else value
        if amount > limit:
            wrong.append(f"{name}: {amount}, at most {limit}")
    share = parts.get("queue", {}).get("within_a_factor_of_two")
    if share is not None and share < 0.8:
        wrong.append(f"queue.within_a_factor_of_two: {share}, at least 0.8")
    return wrong


def earlier(output: Path | None) -> dict[str, dict[str, Any]]:
    """The parts of an earlier run, of which those that are run now take the place."""
    if output is None or not output.exists():
        return {}
    parts: dict[str, dict[str, Any]] = json.loads(output.read_text())["parts"]
    return parts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--seconds", type=float, default=60.0, help="of uploads, and of the queue")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the service goes with us
    stream, here = Pages.make(20.0), machine("ray", "uvicorn")
    parts = earlier(options.output)
    with running() as place, Memory(processes_of_service()) as memory:
        for name in options.only:
            parts[name] = asyncio.run(PARTS[name](place, stream, options)) | {"machine": here}
            print(name, json.dumps(parts[name]), flush=True)
    grown = {name: round(amount, 1) for name, amount in sorted(memory.grown.items()) if amount > 5}
    if len(options.only) == len(PARTS) or "memory" not in parts:
        most = max(memory.grown.values())
        parts["memory"] = {"grown_mb": most, "by_process_mb": grown, "machine": here}
    wrong = broken(parts)
    result = {"benchmark": "access", "limits": LIMITS}
    publish(result | {"load_average": os.getloadavg()[0], "parts": parts, "broken": wrong}, options.output)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
