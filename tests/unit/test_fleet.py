"""The end of a service, as the fleet passes it on to replicas and gateways."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from deployments.fleet import Fleet
from deployments.gateway import observer
from deployments.gateway.observer import Observer
from deployments.wire.messages import ReplicaStatus, SessionStatus


def _status(*sessions: str) -> ReplicaStatus:
    held = tuple(SessionStatus(name, 1.0) for name in sessions)
    return ReplicaStatus("r", "192.0.2.1", 1, "echo", (), 4, True, held)


def _observer(fleet: Any) -> Observer:
    """One whose handle calls `fleet` directly."""
    calls = {
        name: SimpleNamespace(remote=getattr(fleet, name)) for name in ("wait_close", "closed", "describe")
    }
    handle: Any = SimpleNamespace(**calls)
    return Observer(handle)


def test_the_service_holds_nothing_once_replicas_and_gateways_have_let_go() -> None:
    async def run() -> None:
        fleet, let_go = Fleet(), asyncio.Event()
        told: list[str] = []

        async def close() -> None:
            told.append("told")
            await let_go.wait()

        assert not await fleet.report(_status("a"))
        gateways = [
            asyncio.ensure_future(_observer(fleet).wait_close(name, close)) for name in ("one", "other")
        ]
        await asyncio.sleep(0.01)
        assert not told
        await fleet.close()
        assert await fleet.report(_status("a")), "the replica is told with its next report"
        await asyncio.sleep(0.01)
        assert told == ["told", "told"]
        assert await fleet.held() == 3, "a slot and two gateways"
        let_go.set()
        await asyncio.gather(*gateways)
        assert await fleet.held() == 1
        await fleet.report(_status())
        assert await fleet.held() == 0

    asyncio.run(asyncio.wait_for(run(), 5))


def test_a_gateway_asks_again_when_the_fleet_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer, "RETRY_S", 0.01)

    async def run() -> None:
        fleet, deaths = Fleet(), [ActorDiedError(), ActorDiedError()]
        closed = asyncio.Event()

        def wait_close(gateway: str) -> Awaitable[None]:
            if deaths:
                raise deaths.pop()
            return fleet.wait_close(gateway)

        async def close() -> None:
            closed.set()

        flaky = SimpleNamespace(wait_close=wait_close, closed=fleet.closed, describe=fleet.describe)
        watching = asyncio.ensure_future(_observer(flaky).wait_close("g", close))
        await asyncio.sleep(0.1)
        assert not closed.is_set()
        await fleet.close()
        await watching
        assert closed.is_set()
        assert await fleet.held() == 0

    asyncio.run(asyncio.wait_for(run(), 5))


def test_a_ticket_is_spent_once_and_forgotten_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet, now = Fleet(), 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert asyncio.run(fleet.spend("a", 60.0))
    assert not asyncio.run(fleet.spend("a", 60.0))
    assert asyncio.run(fleet.spend("b", 60.0))
    now = 160.0
    assert asyncio.run(fleet.spend("c", 60.0))
    assert set(fleet._spent) == {"c"}
