"""Faults under sessions, with a ledger: `python -m tests.faults --minutes 30`.

    python -m tests.faults --minutes 12 --kills 50   # of one of two replicas, each after the last is back
    python -m tests.faults --minutes 1 --stops 0.5   # SIGSTOP for so long; --replicas 1: with no other
    python -m tests.faults --minutes 1 --cuts 5      # of links only
    python -m tests.faults --minutes 30              # kills, stops and cuts by chance
    python -m tests.faults --minutes 30 --url talk.example --inflict 'kubectl delete pod ...'

Starts `python -m personaplex.server` with the tiny model on a free port, or talks to a service elsewhere, to
which `--inflict` does something each `--every` seconds. Under it `--sessions` talk all the time. The result
is one JSON document; with --output it is added to the runs in that file. The exit status is 1 when a session
was lost, a slot was not accounted for, or a frame came twice.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hosted import Hosted, hosted
from ports import free_port
from serving import Service

from benchmarks.machine import machine

from . import inflict
from .callers import Callers
from .ledger import Fault, Ledger

SLOTS = 8
FORGOTTEN_S = 5.5  # the fleet names a dead replica for no longer
BACK_S = 90.0
SUM = re.compile(r'personaplex_failover_seconds_(sum|count)\{phase="(\w+)"\} (\S+)')


class Faults:
    """What is done to one local service, as `options` say, until `until`."""

    def __init__(self, host: Hosted, ledger: Ledger, callers: Callers, options: argparse.Namespace) -> None:
        self._host, self._ledger, self._callers, self._options = host, ledger, callers, options
        self._dice = random.Random(options.seed)
        self._ports = range(options.ports, options.ports + 20)

    async def run(self, until: float) -> None:
        await self._back()
        for kind in self._plan():
            await asyncio.sleep(self._dice.uniform(1.0, 3.0))
            if time.monotonic() > until - 15:
                break
            pids = await asyncio.to_thread(inflict.replicas, self._host)
            await self._inflict(kind, self._dice.choice(pids))
            await asyncio.sleep(FORGOTTEN_S)
            await self._back()

    def _plan(self) -> Iterator[str]:
        options = self._options
        asked = ["kill"] * options.kills + ["stop"] * len(options.stops) + ["cut"] * options.cuts
        if asked:
            self._dice.shuffle(asked)
            yield from asked
            return
        while True:
            yield self._dice.choice(["kill", "stop", "cut"])

    async def _inflict(self, kind: str, pid: int) -> None:
        info = await asyncio.to_thread(self._host.service.info)
        fault = Fault(kind, time.monotonic(), info["used"], self._callers.live)
        self._ledger.faults.append(fault)
        if kind == "kill":
            inflict.kill(pid)
        elif kind == "cut":
            inflict.cut(pid, self._ports)
        else:
            seconds = self._options.stops.pop() if self._options.stops else self._dice.choice([0.5, 5.0])
            fault.kind = f"stop {seconds:g} s"
            await asyncio.to_thread(inflict.stop, pid, seconds)

    async def _back(self) -> None:
        """Waits until all replicas are there and every caller is live."""
        began = time.monotonic()
        while time.monotonic() - began < BACK_S:
            with contextlib.suppress(OSError, KeyError):
                info = await asyncio.to_thread(self._host.service.info)
                pids = await asyncio.to_thread(inflict.replicas, self._host)
                if info["replicas"] == len(pids) == self._options.replicas and self._settled(info):
                    return
            await asyncio.sleep(0.2)
        raise TimeoutError("the replicas did not come back")

    def _settled(self, info: dict[str, Any]) -> bool:
        return bool(info["used"] == self._callers.live == self._options.sessions)


async def _elsewhere(service: Service, ledger: Ledger, callers: Callers, options: Any, until: float) -> None:
    while time.monotonic() < until - options.every:
        await asyncio.sleep(options.every)
        info = await asyncio.to_thread(service.info)
        ledger.faults.append(Fault("inflicted", time.monotonic(), info["used"], callers.live))
        await asyncio.to_thread(subprocess.run, options.inflict, shell=True, check=True)


def _phases(service: Service) -> dict[str, dict[str, float]]:
    """Means of the gateway's own histogram: it knows when no frame waits any more, a client does not."""
    found: dict[str, dict[str, float]] = {}
    for part, phase, value in SUM.findall(service.get("metrics").text):
        found.setdefault(phase, {})[part] = float(value)
    return {
        phase: {"mean_s": round(one["sum"] / one["count"], 3), "count": one["count"]}
        for phase, one in found.items()
        if one["count"]
    }


async def _run(service: Service, options: argparse.Namespace, faults: Callable[..., Awaitable[None]]) -> Any:
    ledger, until = Ledger(), time.monotonic() + 60 * options.minutes
    callers = Callers(service, ledger, until, options.longest, options.seed)
    calling = asyncio.ensure_future(callers.run(options.sessions))
    try:
        await faults(ledger, callers, until)
    finally:
        callers.stop()
        await calling
    return ledger


def _local(options: argparse.Namespace) -> tuple[Ledger, dict[str, Any]]:
    options.ports = free_port()
    values = {
        "replicas_min": options.replicas,
        "replicas_max": options.replicas,
        "placement": "spread",
        "replica_num_cpus": 0.1,
        "gateway_num_cpus": 0.1,
        "session_limit_s": 3_600,
        "media_port_min": options.ports,
        "media_port_max": options.ports + 19,
        "metrics_page": "true",
        **dict(one.split("=", 1) for one in options.set),
    }
    flags = [f"--set={name}={value}" for name, value in values.items()]
    with hosted("--model", options.model, "--slots", str(SLOTS), *flags) as host:

        async def faults(ledger: Ledger, callers: Callers, until: float) -> None:
            await Faults(host, ledger, callers, options).run(until)

        ledger = asyncio.run(_run(host.service, options, faults))
        phases = _phases(host.service)
        left = _left(host.service)
    return ledger, {"settings": values, "model": options.model, "phases": phases, "slots_left": left}


def _left(service: Service) -> int:
    """Slots that are still held when every caller has gone."""
    began = time.monotonic()
    while time.monotonic() - began < 10 and service.info()["used"]:
        time.sleep(0.2)
    return int(service.info()["used"])


def _remote(options: argparse.Namespace) -> tuple[Ledger, dict[str, Any]]:
    service = Service("", options.url)

    async def faults(ledger: Ledger, callers: Callers, until: float) -> None:
        await _elsewhere(service, ledger, callers, options, until)

    return asyncio.run(_run(service, options, faults)), {"url": options.url, "inflict": options.inflict}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=1.0, help="the longest run")
    parser.add_argument("--sessions", type=int, default=8)
    parser.add_argument("--longest", type=float, default=60.0, help="seconds of the longest session")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--stops", type=float, action="append", default=[], metavar="SECONDS")
    parser.add_argument("--cuts", type=int, default=0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--url", default="", metavar="HOST:PORT", help="a service elsewhere")
    parser.add_argument("--inflict", default="true", metavar="COMMAND", help="what is done to it")
    parser.add_argument("--every", type=float, default=20.0, metavar="SECONDS")
    parser.add_argument("--output", type=Path, help="JSON with a list of runs, to which this one is added")
    return parser.parse_args()


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the service goes with us
    command = " ".join(sys.argv[1:])
    ledger, about = _remote(options) if options.url else _local(options)
    figures = ledger.figures()
    run = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": f"python -m tests.faults {command}",
        "machine": machine("ray", "torch"),
        **about,
        "figures": figures,
    }
    print(json.dumps(run, indent=2))
    if options.output is not None:
        runs = json.loads(options.output.read_text()) if options.output.exists() else []
        options.output.write_text(json.dumps([*runs, run | ledger.document()], indent=1) + "\n")
    wrong = figures["failures"] or figures["twice"] or figures["slots_wrong"] or about.get("slots_left")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
