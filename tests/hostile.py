"""Hostile clients against a real service, and what its neighbours notice: `python -m tests.hostile`.

    python -m tests.hostile --rounds 3 --output benchmarks/results/hostile.json   # the median of three
    python -m tests.hostile --only mixed crowds --haproxy       # these parts alone, through HAProxy
    python -m tests.hostile --only mixed --without-limits       # Serve's own proxies: this must fail

Each round starts `python -m personaplex.server` with the echo model on a free loopback port. Attackers are
processes of their own at the lowest priority, from 127.0.0.2; the neighbour talks from 127.0.0.1.
`verdict.LIMITS` says what must hold; the exit status is 1 when a median does not. The output keeps the parts
that this run leaves out. tests/service/test_hostile.py and test_serve_admission.py run one round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from requests import RequestException
from websockets import ConnectionClosed

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it

from attackers import CROWDS, CUTS, FLOODS, Attack, attackers
from hosted import (
    GATEWAY,
    PROXY,
    REPLICA,
    SLOTS,
    Hosted,
    Memory,
    cpu,
    healthy,
    hosted,
    open_to_the_network,
    until,
)
from rawsocket import Target
from serving import Client, Heard, connect, speech
from verdict import LIMITS, Figures, summary

from benchmarks.machine import machine, publish
from deployments.connections import REQUEST_TIMEOUT_S
from personaplex.config import FRAME_SECONDS, FRAME_SIZE
from personaplex.session.moshi import Audio

CONNECTIONS = 8
FLOOD_S = 2.0
CPU_S = 3.0
STALL_S = 4.0
CROWD_S = REQUEST_TIMEOUT_S + 2.0  # long enough for every deadline to pass


# The neighbour


async def talk(client: Client, seconds: float) -> list[float]:
    """Speaks for so long; the times at which answers came."""
    pcm = speech(8.0)
    began = time.monotonic()
    number = 0
    while time.monotonic() - began < seconds:
        await asyncio.sleep(began + number * FRAME_SECONDS - time.monotonic())
        await client.send(client.transcoder.send(pcm[number * FRAME_SIZE % len(pcm) :][:FRAME_SIZE]))
        number += 1
    return [at for at, message in client.heard.messages if isinstance(message, Audio) and at >= began]


async def begin(client: Client) -> Heard:
    """Up to the handshake."""
    await client.headers()
    return await client.until(lambda heard: heard.live)


def gap(times: Sequence[float]) -> float:
    """The longest silence, in seconds, between two answers."""
    return float(np.max(np.diff(times))) if len(times) > 1 else float("inf")


# What is tried


def flood(
    host: Hosted, attacks: Sequence[Attack], connections: int = CONNECTIONS, seconds: float = FLOOD_S
) -> Figures:
    """The most a process grew and the neighbour's longest gap: quiet, and under `attacks`, all at once, each
    by so many connections."""

    async def run() -> tuple[list[float], list[float]]:
        async with connect(host.service) as client:
            await begin(client)
            quiet, hostile = await talk(client, seconds), list[float]()
            start()
            with contextlib.suppress(ConnectionClosed):  # one gap without an end
                hostile = await talk(client, seconds + 1.0)
            return quiet, hostile

    target = Target("127.0.0.1", host.port)
    with attackers(attacks, target, connections, seconds) as (start, report), Memory(host) as memory:
        quiet, hostile = asyncio.run(run())
        counts = report()
    try:
        idle = until(lambda: host.service.info()["used"] == 0, 20.0)
    except (AssertionError, RequestException):
        idle = float("inf")
    figures = {"memory_mb": memory.peak_mb, "quiet_gap_s": gap(quiet), "gap_s": gap(hostile)}
    return {**figures, "slots_back_s": idle, **counts}


def queue_cpu(host: Hosted, waiting: Sequence[int] = (0, 1, 6)) -> Figures:
    """CPU of gateway and replica with all slots talking and so many waiting; seconds a second."""
    pids = host.pid(GATEWAY), host.pid(REPLICA)

    async def run() -> list[float]:
        async with contextlib.AsyncExitStack() as stack:
            talkers = [await stack.enter_async_context(connect(host.service)) for _ in range(SLOTS)]
            await asyncio.gather(*map(begin, talkers))
            used, queued = [], 0
            for wanted in waiting:
                for _ in range(wanted - queued):
                    client = await stack.enter_async_context(connect(host.service))
                    await client.until(lambda heard: heard.queue)
                queued = wanted
                await asyncio.gather(*(talk(talker, 0.5) for talker in talkers))
                before = sum(map(cpu, pids))
                await asyncio.gather(*(talk(talker, CPU_S) for talker in talkers))
                used.append((sum(map(cpu, pids)) - before) / CPU_S)
            return used

    began = time.monotonic()
    used = asyncio.run(run())
    lines = sum(1 for at, line in list(host.said) if at >= began and "Failed to route" in line)
    figures = {f"cpu_{number}": value for number, value in zip(waiting, used, strict=True)}
    until(lambda: host.service.info()["used"] == 0, 20.0)
    return {**figures, "queue_cpu": max(used[1:]) / used[0], "log_lines": float(lines)}


def wait_after_a_slot_is_free(host: Hosted) -> Figures:
    """Seconds from a session's end to the handshake of who waits for its slot."""

    async def run() -> float:
        async with contextlib.AsyncExitStack() as stack:
            talkers = [await stack.enter_async_context(connect(host.service)) for _ in range(SLOTS)]
            await asyncio.gather(*map(begin, talkers))
            waiting = await stack.enter_async_context(connect(host.service))
            await waiting.headers()
            await waiting.until(lambda heard: heard.queue)
            await asyncio.sleep(2.0)
            began = time.monotonic()
            await talkers[0].socket.close()
            await waiting.until(lambda heard: heard.live)
            return time.monotonic() - began

    waited = asyncio.run(run())
    until(lambda: host.service.info()["used"] == 0, 20.0)
    return {"turn_s": waited}


def stall(host: Hosted, name: str, seconds: float = STALL_S) -> Figures:
    """A process stands still for so long, and the session goes on."""
    pid = host.pid(name)

    async def run() -> list[float]:
        async with connect(host.service) as client:
            await begin(client)
            await talk(client, 0.5)
            os.kill(pid, signal.SIGSTOP)
            try:
                await talk(client, seconds)
            finally:
                os.kill(pid, signal.SIGCONT)
            after = await talk(client, 3.0)
            assert not client.ended, client.heard
            return after

    after = asyncio.run(run())
    until(lambda: host.service.info()["used"] == 0, 20.0)
    return {f"answers_after_{name.rpartition(':')[2]}": len(after) * FRAME_SECONDS / 3.0}


def kill_proxy(host: Hosted) -> Figures:
    """Seconds from the proxy's death until every session's slot is free, and until new ones are served."""

    async def run() -> float:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(connect(host.service)) for _ in range(SLOTS)]
            await asyncio.gather(*map(begin, clients))
            began = time.monotonic()
            os.kill(host.pid(PROXY), signal.SIGKILL)
            for client in clients:
                await client.until_closed(10.0)
            return began

    began = asyncio.run(run())
    until(lambda: _ended(host, began) >= SLOTS or time.monotonic() - began > 30, 35.0)
    last = max(at for at, line in list(host.said) if at >= began and " ended: " in line)
    until(lambda: healthy(host), 60.0)
    back = time.monotonic() - began
    assert host.service.info()["used"] == 0
    return {"slots_back_s": last - began, "served_again_s": back}


def _ended(host: Hosted, since: float) -> int:
    return sum(1 for at, line in list(host.said) if at >= since and " ended: " in line)


def stop_with_a_queue(host: Hosted) -> list[Heard]:
    """SIGTERM while one talks and others wait: what each of them heard. The service is gone then."""

    async def run() -> list[Heard]:
        async with contextlib.AsyncExitStack() as stack:
            talkers = [await stack.enter_async_context(connect(host.service)) for _ in range(SLOTS)]
            await asyncio.gather(*map(begin, talkers))
            waiting = [await stack.enter_async_context(connect(host.service)) for _ in range(2)]
            for client in waiting:
                await client.until(lambda heard: heard.queue)
            host.process.send_signal(signal.SIGTERM)
            return [await client.until_closed(15.0) for client in (*talkers, *waiting)]

    heard = asyncio.run(run())
    assert host.process.wait(40) == 0
    return heard


def kill_raylet(host: Hosted) -> Figures:
    """Seconds from the raylet's death until the command has left, saying so. The service is gone then."""
    began = time.monotonic()
    os.kill(
        next(pid for pid, command in host.named().items() if "/raylet/raylet " in command), signal.SIGKILL
    )
    assert host.process.wait(40) == 1
    took = time.monotonic() - began
    assert host.find("Ray's raylet has ended", began), host.said[-5:]
    return {"left_s": took}


# The command


def _named(attack: str, found: Figures) -> Figures:
    return {f"{attack}.{name}": value for name, value in found.items()}


def _ports(host: Hosted) -> Figures:
    doors = [where for where in open_to_the_network(host) if " ray::ServeReplica" not in where]
    return {"ports_open": float(len(doors))}


def _floods(host: Hosted) -> Figures:
    figures: Figures = {}
    for attack in FLOODS:
        figures |= _named(attack.__name__, flood(host, [attack]))
    return figures


def _stop(host: Hosted) -> Figures:
    heard = stop_with_a_queue(host)
    return {"told_1012": sum(one.code == 1012 for one in heard) / len(heard)}


PARTS: dict[str, Callable[[Hosted], Figures]] = {  # in this order: the last ones end the service
    "ports": _ports,
    "floods": _floods,
    "mixed": lambda host: _named("all", flood(host, FLOODS, connections=2, seconds=2 * FLOOD_S)),
    "crowds": lambda host: _named("crowds", flood(host, CROWDS, connections=1, seconds=CROWD_S)),
    "cuts": lambda host: _named("cuts", flood(host, CUTS, connections=1, seconds=2 * FLOOD_S)),
    "queue": lambda host: queue_cpu(host) | wait_after_a_slot_is_free(host),
    "stall": lambda host: stall(host, REPLICA) | stall(host, GATEWAY),
    "proxy": kill_proxy,
    "stop": _stop,
    "raylet": kill_raylet,
}


def attempt(parts: Sequence[str], flags: Sequence[str], limits: bool) -> dict[str, Figures]:
    """One round: the figures of each part."""
    figures: dict[str, Figures] = {}
    services = [[part for part in parts if part != "raylet"], [part for part in parts if part == "raylet"]]
    for together in filter(None, services):
        with hosted(*flags, limits=limits) as host:
            for part in together:
                figures[part] = PARTS[part](host)
                print(part, json.dumps(figures[part]), file=sys.stderr, flush=True)
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS, metavar="PART")
    parser.add_argument("--haproxy", action="store_true")
    parser.add_argument("--without-limits", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    flags = ["--haproxy"] if options.haproxy else []
    parts = [part for part in PARTS if part in options.only and not (part == "proxy" and options.haproxy)]
    rounds = [attempt(parts, flags, not options.without_limits) for _ in range(options.rounds)]
    found = {part: summary([one[part] for one in rounds]) for part in parts}
    kept: dict[str, Any] = {}
    if options.output is not None and options.output.exists():
        kept = json.loads(options.output.read_text())["parts"]
    result = {"benchmark": "hostile", "machine": machine("ray", "uvicorn"), "limits": LIMITS}
    publish(
        result | {"parts": {part: (kept | found)[part] for part in PARTS if part in kept | found}},
        options.output,
    )
    return 1 if any(one["broken"] for one in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
