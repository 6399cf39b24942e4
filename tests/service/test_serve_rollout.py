"""A changed setting replaces every replica of the live service, and no conversation notices."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Iterator

import pytest
from ray import serve
from serving import SMALL, Client, Service, connect, running, speech

from deployments.application import build
from deployments.settings import Settings
from personaplex.session.moshi import Metadata

SETTINGS = {
    "model": "echo",
    "slots": 4,
    "replicas_min": 2,
    "replicas_max": 2,
    "burst_s": 20.0,
    "session_limit_s": 600.0,
}
SESSIONS = 4
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def service(cluster: str) -> Iterator[Service]:
    with running(cluster, **SETTINGS, placement="spread") as service:
        yield service


async def talk_until(client: Client, done: asyncio.Event) -> None:
    while not done.is_set():
        await client.speak(speech(1.6))
    frames = len(client.decoded())
    await client.until(lambda heard: heard.last_frame >= frames - 1, 30)


def redeploy(service: Service, **settings: object) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        application = build(Settings(**{**SMALL, **SETTINGS, "placement": "spread", **settings}))
        serve.run(application, name=service.name, route_prefix=f"/{service.name}", blocking=False)


def test_a_replicas_setting_changes_under_its_sessions(service: Service) -> None:
    """Every replica is replaced in less than LIMIT_S, though each session could last longer."""
    before = {replica.replica for replica in service.replicas()}

    async def run() -> tuple[list[Client], float]:
        done, live = asyncio.Event(), asyncio.Event()
        clients: list[Client] = []

        async def one() -> None:
            async with connect(service) as client:
                await client.headers()
                await client.until(lambda heard: heard.live)
                clients.append(client)
                if len(clients) == SESSIONS:
                    live.set()
                await talk_until(client, done)
                assert client.heard.code is None, client.heard.reason

        talking = [asyncio.ensure_future(one()) for _ in range(SESSIONS)]
        await asyncio.wait_for(live.wait(), 60)
        began = time.monotonic()
        # It returns when the old gateway is gone, which stays for its sockets.
        redeploying = asyncio.ensure_future(asyncio.to_thread(redeploy, service, gather_ms=1.0))
        await asyncio.to_thread(
            service.wait,
            lambda seen: len(seen) == 2 and not before & {one.replica for one in seen},
            LIMIT_S,
        )
        took = time.monotonic() - began
        done.set()
        await asyncio.gather(*talking, redeploying)
        return clients, took

    clients, took = asyncio.run(run())
    assert took < LIMIT_S
    for client in clients:
        told = [m.data for m in client.heard.of(Metadata)]
        assert any(one.get("type") == "continued" for one in told), "it was moved"
        assert not any(one.get("type") == "interrupted" for one in told), "and never waited"
        numbers = [int.from_bytes(page[18:22], "little") for page in client.heard.pages]
        assert numbers == sorted(set(numbers)), "no frame twice"
    service.wait_idle()
