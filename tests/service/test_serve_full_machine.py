"""Where Ray has given away all there is a changed setting takes effect, and a conversation goes on."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Iterator

import pytest
from ray import serve
from serving import SMALL, Client, Service, come_back, connect, running, speech
from websockets.exceptions import ConnectionClosed

from deployments import application
from deployments.settings import Settings
from personaplex.session.moshi import Metadata

SETTINGS = {
    "model": "echo",
    "slots": 2,
    "replica_resources": {"place": 1.0},  # there are two, whatever CPUs other tests leave over
    "gateway_resources": {"place": 1.0},
    "queue_timeout_s": 30.0,
    "drain_limit_s": 2.0,
    "burst_s": 20.0,
}
LIMIT_S = 90.0


@pytest.fixture
def service(cluster: str) -> Iterator[Service]:
    """One replica and one gateway, beside which no other can start."""
    with running(cluster, **SETTINGS, session_limit_s=600.0) as service:
        yield service


def told(client: Client, kind: str) -> list[dict[str, object]]:
    return [dict(m.data) for m in client.heard.of(Metadata) if m.data.get("type") == kind]


async def talk_on(client: Client, until: float) -> None:
    """Speaks until the connection ends."""
    try:
        while time.monotonic() < until:
            await client.speak(speech(1.6))
    except ConnectionClosed:
        await client.until_closed()


def test_a_changed_setting_takes_effect_where_nothing_can_start_beside_what_it_replaces(
    service: Service,
) -> None:
    """The replica makes room first, and the session waits for its successor. Then the gateway does, and the
    client comes back."""

    def redeploy() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = application.build(Settings(**{**SMALL, **SETTINGS, "session_limit_s": 500.0}))
            serve.run(built, name=service.name, route_prefix=f"/{service.name}", blocking=False)

    async def run() -> None:
        (before,) = await asyncio.to_thread(service.replicas)
        async with connect(service) as first:
            await first.headers()
            await first.until(lambda heard: heard.live)
            redeploying = asyncio.ensure_future(asyncio.to_thread(redeploy))
            await talk_on(first, time.monotonic() + LIMIT_S)
            heard = first.heard.last_frame + 1
            assert first.heard.code != 1000, first.heard.reason
        assert told(first, "interrupted")
        (back,) = told(first, "continued")
        context, second = await come_back(service, str(back["resume"]), heard, LIMIT_S)
        await second.talk(speech(1.6))
        (session,) = told(second, "session")
        assert session["session"] == first.heard.session
        await context.__aexit__(None, None, None)
        (after,) = await asyncio.to_thread(service.replicas)
        assert after.replica != before.replica
        assert (await asyncio.to_thread(service.info))["session_limit_s"] == 500.0
        await redeploying

    asyncio.run(run())
    service.wait_idle()
