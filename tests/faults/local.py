"""What is done to a service on this machine while sessions talk, one fault after another.

Faults of replicas are for clients that never come back, as stock ones. Those of sockets, gateways and proxies
are for our own client, whose sessions have to go on, and so are moves.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
from hosted import Hosted

from . import inflict
from .callers import Crowd
from .ledger import Fault, Ledger
from .talks import Talks

FORGOTTEN_S = 5.5  # the fleet names a dead replica for no longer
BACK_S = 90.0
ACCOUNTED_S = 5.0  # until as many slots are held as sessions talk
MOVE_EVERY_S = 3.0
DISK_FULL_S = 5.0
QUIET = 10  # stretches of MOVE_EVERY_S without a move, to compare with
CUTS_AT_ONCE = 10  # clients' sockets that are cut, at random, until all sessions have to be back
CUT_EVERY_S = (0.2, 2.0)
RESUMED = ("client_cuts", "gateway_kills", "proxy_kills", "moves")  # options that are for our own client


class Faults:
    """What is done to one service, as `options` say, until `until`."""

    def __init__(self, host: Hosted, ledger: Ledger, callers: Crowd, options: argparse.Namespace) -> None:
        self._host, self._ledger, self._callers, self._options = host, ledger, callers, options
        self._dice = random.Random(options.seed)
        self._ports = range(options.ports, options.ports + 20)

    async def run(self, until: float) -> None:
        await self._back()
        if self._options.moves:
            for _ in range(QUIET):
                await self._note("quiet")
                await asyncio.sleep(MOVE_EVERY_S)
        for kind in self._plan():
            await asyncio.sleep(self._dice.uniform(1.0, 3.0))
            if time.monotonic() > until - 15:
                break
            await self._inflict(kind)
            await self._back()

    def _plan(self) -> Iterator[str]:
        options = self._options
        asked = ["kill"] * options.kills + ["stop"] * len(options.stops) + ["cut"] * options.cuts
        asked += ["full disk"] * options.disks
        asked += ["gateway kill"] * options.gateway_kills + ["proxy kill"] * options.proxy_kills
        asked += ["client cut"] * -(-options.client_cuts // CUTS_AT_ONCE) + ["move"] * options.moves
        if asked:
            self._dice.shuffle(asked)
            yield from asked
            return
        while True:
            yield self._dice.choice(["kill", "stop", "cut"])

    async def _inflict(self, kind: str) -> None:
        fault = await self._note(kind)
        if kind == "client cut":
            await self._cut_clients()
        elif kind == "move":
            await self._move(fault)
        elif kind == "full disk":
            pids = inflict.replicas(self._host) + inflict.gateways(self._host)
            await asyncio.to_thread(inflict.fill_disks, pids, DISK_FULL_S)
        elif kind in ("gateway kill", "proxy kill"):
            found = inflict.gateways if kind == "gateway kill" else inflict.proxies
            inflict.kill(self._dice.choice(await asyncio.to_thread(found, self._host)))
        else:
            pids = await asyncio.to_thread(inflict.replicas, self._host)
            await self._harm(fault, self._dice.choice(pids))
            await asyncio.sleep(FORGOTTEN_S)

    async def _note(self, kind: str) -> Fault:
        """Of a moment; a session that just ends or begins is waited for."""
        began = time.monotonic()
        while (info := await asyncio.to_thread(self._host.service.info))["used"] != self._callers.live:
            if time.monotonic() - began > ACCOUNTED_S:
                break
            await asyncio.sleep(0.2)
        fault = Fault(kind, time.monotonic(), info["used"], self._callers.live)
        self._ledger.faults.append(fault)
        return fault

    async def _harm(self, fault: Fault, pid: int) -> None:
        if fault.kind == "kill":
            inflict.kill(pid)
        elif fault.kind == "cut":
            inflict.cut(pid, self._ports)
        else:
            seconds = self._options.stops.pop() if self._options.stops else self._dice.choice([0.5, 5.0])
            fault.kind = f"stop {seconds:g} s"
            await asyncio.to_thread(inflict.stop, pid, seconds)

    async def _cut_clients(self) -> None:
        """Some at random, whether or not the last one is back; also while they come back."""
        assert isinstance(self._callers, Talks)
        for _ in range(min(CUTS_AT_ONCE, self._options.client_cuts)):
            while not self._callers.cut_one():  # noqa: ASYNC110  all are on their way back
                await asyncio.sleep(0.05)
            self._options.client_cuts -= 1
            await asyncio.sleep(self._dice.uniform(*CUT_EVERY_S))

    async def _move(self, fault: Fault) -> None:
        assert isinstance(self._callers, Talks)
        session = self._dice.choice(self._callers.running()).session
        answer = await asyncio.to_thread(inflict.move, self._host, self._options.admin_key, session)
        fault.came_of_it = answer
        await asyncio.sleep(max(0.0, fault.at + MOVE_EVERY_S - time.monotonic()))

    async def _back(self) -> None:
        """Waits until everything is there and every caller is live."""
        began = time.monotonic()
        while time.monotonic() - began < BACK_S:
            with contextlib.suppress(OSError, KeyError):
                info = await asyncio.to_thread(self._host.service.info)
                if await asyncio.to_thread(self._whole, info) and self._settled(info):
                    return
            await asyncio.sleep(0.2)
        raise TimeoutError("the service did not come back")

    def _whole(self, info: dict[str, Any]) -> bool:
        return bool(
            info["replicas"] == len(inflict.replicas(self._host)) == self._options.replicas
            and len(inflict.gateways(self._host)) == self._options.gateways
        )

    def _settled(self, info: dict[str, Any]) -> bool:
        return bool(info["used"] == self._callers.live == self._options.sessions)


@contextlib.contextmanager
def settings(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Those of the service; the files that they name are there meanwhile."""
    with tempfile.TemporaryDirectory(prefix="personaplex-faults-") as name:
        folder = Path(name)
        options.tokens, options.admin_key = folder / "tokens", secrets.token_urlsafe(24)
        values = {
            "replicas_min": options.replicas,
            "replicas_max": options.replicas,
            "gateways_min": options.gateways,
            "gateways_max": options.gateways,
            "placement": "spread",
            "replica_num_cpus": 0.1,
            "gateway_num_cpus": 0.1,
            "session_limit_s": 3_600,
            "media_port_min": options.ports,
            "media_port_max": options.ports + 19,
            "metrics_page": "true",
        }
        if resuming(options) or options.disks:
            values["token_log_dir"] = options.tokens
        if options.disks:
            values |= {"record": "always", "record_dir": folder / "records"}
        if options.moves:
            values["admin_keys_file"] = folder / "admin"
            (folder / "admin").write_text(options.admin_key + "\n")
        yield values | dict(one.split("=", 1) for one in options.set)


def resuming(options: argparse.Namespace) -> bool:
    """Whether the sessions are those of our own client."""
    return any(getattr(options, name) for name in RESUMED)


def left(host: Hosted) -> int:
    """Slots that are still held when every caller has gone."""
    began = time.monotonic()
    while time.monotonic() - began < 10:
        with contextlib.suppress(requests.RequestException):
            if not (used := int(host.service.info()["used"])):
                return 0
        time.sleep(0.2)
    return used
