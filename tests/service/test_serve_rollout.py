"""A changed setting, then new code, replace every replica of the live service under eight sessions, and no
conversation notices."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sys
import time
import warnings
from collections.abc import AsyncIterator, Iterator

import pytest
from ray import cloudpickle, serve
from serving import SMALL, Client, Service, connect, running, speech

from deployments import application
from deployments.replica.replica import Replica
from deployments.settings import Settings
from deployments.wire.messages import ReplicaStatus
from personaplex.session.moshi import Metadata

SETTINGS = {
    "model": "echo",
    "slots": 8,  # while one replica is replaced the other one holds every session
    "replicas_min": 2,
    "replicas_max": 2,
    "burst_s": 20.0,
    "session_limit_s": 600.0,
    "failover_after_s": 3.0,  # two cores for all of this: a late replica is not what is tested
    "placement": "spread",
}
SESSIONS = 8
LIMIT_S = 120.0
NEXT = "the next release"


class NextReplica(Replica):
    """The replica of another release, which says so."""

    def _status(self) -> ReplicaStatus:
        status = super()._status()
        return dataclasses.replace(status, engine={**status.engine, "release": NEXT})


@pytest.fixture(scope="module")
def service(cluster: str) -> Iterator[Service]:
    with running(cluster, **SETTINGS) as service:
        yield service


async def talk_until(client: Client, done: asyncio.Event) -> None:
    while not done.is_set():
        await client.speak(speech(1.6))
    frames = len(client.decoded())
    await client.until(lambda heard: heard.last_frame >= frames - 1, LIMIT_S)


@contextlib.asynccontextmanager
async def talking(service: Service) -> AsyncIterator[list[Client]]:
    """SESSIONS clients that talk all the time; each has to end by its own will, and to be answered to its
    end."""
    done, live = asyncio.Event(), asyncio.Event()
    clients: list[Client] = []

    async def one() -> None:
        async with connect(service) as client:
            await client.headers()
            await client.until(lambda heard: heard.live, LIMIT_S)
            clients.append(client)
            if len(clients) == SESSIONS:
                live.set()
            await talk_until(client, done)
            assert client.heard.code is None, client.heard.reason

    tasks = [asyncio.ensure_future(one()) for _ in range(SESSIONS)]
    try:
        await asyncio.wait_for(live.wait(), LIMIT_S)
        yield clients
    finally:
        done.set()
        await asyncio.gather(*tasks)


def redeploy(service: Service, **settings: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = application.build(Settings(**{**SMALL, **SETTINGS, **settings}))
        serve.run(built, name=service.name, route_prefix=f"/{service.name}", blocking=False)


def moves(client: Client) -> int:
    told = [message.data.get("type") for message in client.heard.of(Metadata)]
    assert "interrupted" not in told, "it was waited for"
    return told.count("continued")


def test_settings_and_code_change_under_sessions(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every replica is replaced in less than LIMIT_S each time, though each session could last longer."""

    async def seen() -> list[ReplicaStatus]:
        return await asyncio.to_thread(service.replicas)

    async def replaced(**settings: object) -> float:
        before = {one.replica for one in await seen()}
        began = time.monotonic()
        # It returns when the old gateway is gone, which stays for its sockets.
        redeploying.append(asyncio.ensure_future(asyncio.to_thread(redeploy, service, **settings)))
        await asyncio.to_thread(
            service.wait,
            lambda found: len(found) == 2 and not before & {one.replica for one in found},
            LIMIT_S,
        )
        return time.monotonic() - began

    async def run() -> None:
        async with talking(service) as clients:
            assert await replaced(gather_ms=1.0) < LIMIT_S
            once = [moves(client) for client in clients]
            assert min(once) >= 1
            cloudpickle.register_pickle_by_value(sys.modules[__name__])
            monkeypatch.setattr(application, "Replica", NextReplica)
            assert await replaced(gather_ms=1.0) < LIMIT_S
            assert all(one.engine.get("release") == NEXT for one in await seen())
            assert all(moves(client) > before for client, before in zip(clients, once, strict=True))
        for client in clients:
            moves(client)
            numbers = [int.from_bytes(page[18:22], "little") for page in client.heard.pages]
            assert numbers == sorted(set(numbers)), "no frame twice"
        await asyncio.gather(*redeploying)

    redeploying: list[asyncio.Future[None]] = []
    asyncio.run(run())
    service.wait_idle()
