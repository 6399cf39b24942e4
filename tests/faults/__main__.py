"""Faults under sessions, with a ledger: `python -m tests.faults --minutes 30`.

    python -m tests.faults --minutes 12 --kills 50   # of one of two replicas, each after the last is back
    python -m tests.faults --minutes 1 --stops 0.5   # SIGSTOP for so long; --replicas 1: with no other
    python -m tests.faults --minutes 1 --cuts 5      # of links only
    python -m tests.faults --minutes 2 --disks 5     # full under records and logs, for 5 s
    python -m tests.faults --minutes 10 --client-cuts 200      # sockets of clients, which come back
    python -m tests.faults --minutes 15 --gateway-kills 20     # --gateways 2: with another one
    python -m tests.faults --minutes 15 --proxy-kills 20       # of Serve's; --haproxy: of HAProxy
    python -m tests.faults --minutes 8 --moves 50              # of sessions that talk, one by one
    python -m tests.faults --minutes 30              # kills, stops and cuts by chance
    python -m tests.faults --minutes 30 --url talk.example --inflict 'kubectl delete pod ...'

Starts `python -m personaplex.server` with the tiny model on a free port, or talks to a service elsewhere, to
which `--inflict` does something each `--every` seconds. Under it `--sessions` talk all the time. The result
is one JSON document; with --output it is added to the runs in that file. The exit status is 1 when a session
was lost, a slot was not accounted for, a frame came twice, or, of our own clients, when tokens differ from
those of an uninterrupted session or something was missed that nobody told.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hosted import hosted
from ports import free_port
from serving import Service

from benchmarks.machine import machine

from . import local, tokens
from .callers import Callers, Crowd
from .ledger import Fault, Ledger
from .talks import Talks

SLOTS = 8
SUM = re.compile(r'personaplex_failover_seconds_(sum|count)\{phase="(\w+)"\} (\S+)')


async def _elsewhere(service: Service, ledger: Ledger, callers: Crowd, options: Any, until: float) -> None:
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


async def _run(callers: Crowd, options: argparse.Namespace, faults: Callable[[], Awaitable[None]]) -> None:
    calling = asyncio.ensure_future(callers.run(options.sessions))
    try:
        await faults()
    finally:
        callers.stop()
        await calling


def _local(options: argparse.Namespace) -> tuple[Ledger, dict[str, Any]]:
    options.ports = free_port()
    kind = Talks if local.resuming(options) else Callers
    with local.settings(options) as values:
        flags = [f"--set={name}={value}" for name, value in values.items()]
        flags += ["--haproxy"] * options.haproxy
        with hosted("--model", options.model, "--slots", str(SLOTS), *flags) as host:
            ledger, until = Ledger(), time.monotonic() + 60 * options.minutes
            callers = kind(host.service, ledger, until + local.BACK_S, options.longest, options.seed)
            faults = local.Faults(host, ledger, callers, options)
            asyncio.run(_run(callers, options, lambda: faults.run(until)))
            about = {"phases": _phases(host.service), "slots_left": local.left(host)}
        if isinstance(callers, Talks) and options.model != "echo":
            about["tokens"] = tokens.figures(tokens.compare(callers.done, options.tokens, options.model))
    kept = {name: str(value) for name, value in values.items() if not name.endswith(("_dir", "_file"))}
    return ledger, {"settings": kept, "model": options.model, **about}


def _remote(options: argparse.Namespace) -> tuple[Ledger, dict[str, Any]]:
    service, ledger, until = Service("", options.url), Ledger(), time.monotonic() + 60 * options.minutes
    kind = Talks if options.resuming else Callers
    callers = kind(service, ledger, until, options.longest, options.seed)
    asyncio.run(_run(callers, options, lambda: _elsewhere(service, ledger, callers, options, until)))
    return ledger, {"url": options.url, "inflict": options.inflict}


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
    parser.add_argument("--cuts", type=int, default=0, help="of links between gateways and replicas")
    parser.add_argument("--disks", type=int, default=0, help="of gateways and replicas, which are full")
    parser.add_argument("--client-cuts", type=int, default=0, help="of sockets of our own clients")
    parser.add_argument("--gateway-kills", type=int, default=0)
    parser.add_argument("--proxy-kills", type=int, default=0)
    parser.add_argument("--moves", type=int, default=0, help="of sessions, by an operator's word")
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--haproxy", action="store_true", help="it holds the sockets")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--url", default="", metavar="HOST:PORT", help="a service elsewhere")
    parser.add_argument(
        "--resuming", action="store_true", help="our own clients talk to that, which come back"
    )
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
    return 1 if _wrong(figures, about) else 0


def _wrong(figures: dict[str, Any], about: dict[str, Any]) -> bool:
    compared = about.get("tokens", {})
    return bool(
        figures["failures"]
        or figures["twice"]
        or figures["slots_wrong"]
        or about.get("slots_left")
        or compared.get("sessions_with_other_tokens")
        or compared.get("untold_holes")
    )


if __name__ == "__main__":
    sys.exit(main())
