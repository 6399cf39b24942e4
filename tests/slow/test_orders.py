"""An operator's orders: whichever gateway hears one, the gateway that holds the session moves it; and who may
give one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from loopback import Counted, fleet_of, services
from loopback import Fleet as Replicas
from sessions import PERSONAS, speech
from starlette.applications import Starlette
from test_failover import Talker, assert_unharmed, memory, run, until, used
from test_resume import Caller

from deployments.fleet import Fleet
from deployments.gateway.admin import AdminRoutes
from deployments.gateway.handover import INTERRUPTED, RECONNECT
from deployments.gateway.keys import KeyTable, parse_key
from deployments.gateway.orders import OrderDesk
from deployments.gateway.services import Services
from deployments.gateway.suspects import SUSPECT_S, Suspects
from deployments.metrics import MOVES
from deployments.wire import orders
from deployments.wire.messages import ReplicaStatus
from deployments.wire.orders import (
    ALONE_S,
    KNOWN_S,
    LAPSE_S,
    SETTLE_S,
    GatewayBirth,
    MovedSession,
    MoveOrder,
    News,
    OrderResult,
    Orders,
)

ADMIN = "an-operator"
FRAMES = 60


class Remote:
    """A handle: each method of a `Fleet` as Serve gives it."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._fleet, name)
        return type("Method", (), {"remote": staticmethod(method)})


class Operated:
    """Two gateways over the same replicas, with an admin route each."""

    def __init__(self, replicas: Replicas) -> None:
        fleet = Remote(Fleet())
        self.counted = [Counted(), Counted()]
        self.lent: list[Services] = [services(replicas, one, after_s=5.0) for one in self.counted]
        self.desks = [
            OrderDesk(fleet, GatewayBirth(f"gateway {number}"), lent.moves, lent.failovers.suspects)
            for number, lent in enumerate(self.lent)
        ]
        self.applications = [application(replicas.describe, desk.give) for desk in self.desks]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Operated]:
        tasks = [asyncio.ensure_future(desk.watch()) for desk in self.desks]
        try:
            await asyncio.sleep(0)
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def talker(self, gateway: int, number: int) -> tuple[Talker, asyncio.Future[None]]:
        talker = Talker(self.lent[gateway], PERSONAS[0], speech(number, FRAMES), f"{number}" * 32)
        await talker.open()
        return talker, asyncio.ensure_future(talker.speak(0, FRAMES))


def application(describe: Any, give: Any, keys: str = ADMIN, api: str = "a-caller") -> Starlette:
    tables = [KeyTable([parse_key(key)]) for key in (keys, api)]
    return Starlette(routes=AdminRoutes(lambda: tables[0], lambda: tables[1], describe, give).routes())


async def request(
    app: Starlette, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    shown = {"authorization": f"Bearer {ADMIN}"} if headers is None else headers
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in shown.items()],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
    }
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    answered = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], b"".join(one.get("body", b"") for one in sent[1:]), answered


async def order(app: Starlette, **fields: Any) -> tuple[int, Any]:
    status, body, _ = await request(app, "POST", "/api/admin/moves", json.dumps(fields).encode())
    return status, json.loads(body) if status == 200 else body


def test_any_gateway_moves_a_session_of_any_other() -> None:
    async def test() -> None:
        async with fleet_of(2, memory) as fleet, Operated(fleet).running() as operated:
            talker, talking = await operated.talker(1, 7)
            await talker.answered(10)
            asked = await order(operated.applications[0], session="7" * 32)
            row = {"session": "7" * 32, "outcome": "moved", "from": "r0", "to": "r1"}
            assert asked == (200, {"sessions": [row], "gateways_silent": 0})
            await talking
            await talker.answered(FRAMES)
            assert talker.replica == "r1"
            assert_unharmed(talker, memory(), FRAMES)
            assert not talker.told(INTERRUPTED)
            assert operated.counted[1].totals[(MOVES.name, "continued")] == 1
            await talker.close()

    run(test)


def test_a_replica_is_drained_of_the_sessions_of_all_gateways_and_gets_no_new_one() -> None:
    async def test() -> None:
        async with fleet_of(2, memory) as fleet, Operated(fleet).running() as operated:
            pairs = [await operated.talker(gateway, gateway + 1) for gateway in (0, 1)]
            for talker, _ in pairs:
                await talker.answered(5)
            status, answer = await order(operated.applications[0], replica="r0", hold_s=30)
            assert status == 200
            assert [row["outcome"] for row in answer["sessions"]] == ["moved", "moved"]
            await used(fleet, 0, 2)
            await fleet.add()
            late, talking = await operated.talker(1, 3)
            assert late.replica == "r2", "the drained one comes first otherwise"
            await asyncio.gather(talking, *(one for _, one in pairs))
            for talker in (late, *(one for one, _ in pairs)):
                await talker.answered(FRAMES)
                assert_unharmed(talker, memory(), FRAMES)
                await talker.close()

    run(test)


def test_where_there_is_no_room_a_session_stays_and_the_operator_is_told() -> None:
    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            operated = Operated(fleet)
            operated.lent[0] = services(fleet, Counted(), after_s=5.0, queue_timeout_s=0.3)
            operated.desks[0]._moves = operated.lent[0].moves
            async with operated.running():
                talker, talking = await operated.talker(0, 7)
                await talker.answered(5)
                _, answer = await order(operated.applications[1], session="7" * 32)
                row = {"session": "7" * 32, "outcome": "no_capacity", "from": "r0", "to": "r0"}
                assert answer["sessions"] == [row]
                await talking
                await talker.answered(FRAMES)
                assert_unharmed(talker, memory(), FRAMES)
                await talker.close()

    run(test)


def test_what_is_not_there_is_not_moved() -> None:
    async def test() -> None:
        async with fleet_of(1, memory) as fleet, Operated(fleet).running() as operated:
            app = operated.applications[0]
            assert (await order(app, session="f" * 32))[0] == 404
            assert (await order(app, replica="nobody"))[0] == 404
            assert await order(app, replica="r0") == (200, {"sessions": [], "gateways_silent": 0})

    run(test)


def test_every_session_and_its_replica_are_listed() -> None:
    async def test() -> None:
        async with fleet_of(2, memory) as fleet, Operated(fleet).running() as operated:
            talker, talking = await operated.talker(0, 7)
            await talker.answered(1)
            status, body, headers = await request(operated.applications[1], "GET", "/api/admin/sessions")
            first, second = json.loads(body)["replicas"]
            assert status == 200
            assert headers["cache-control"] == "no-store"
            assert [one["session"] for one in first["sessions"]] == ["7" * 32]
            assert (second["replica"], second["sessions"]) == ("r1", [])
            await talking
            await talker.close()

    run(test)


async def nobody() -> list[ReplicaStatus]:
    return []


async def never(order: MoveOrder) -> OrderResult:
    raise AssertionError("an order that was refused was given")


@pytest.mark.parametrize(
    ("shown", "status"),
    [
        ({}, 401),
        ({"authorization": f"Basic {ADMIN}"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"x-api-key": ADMIN}, 401),
        ({"authorization": "Bearer other"}, 403),
        ({"authorization": f"Bearer {ADMIN}x"}, 403),
        ({"authorization": "Bearer a-caller"}, 403),
    ],
)
@pytest.mark.parametrize("path", ["/api/admin/moves", "/api/admin/sessions"])
def test_who_is_no_operator_is_refused(shown: dict[str, str], status: int, path: str) -> None:
    method = "POST" if path.endswith("moves") else "GET"
    answer = asyncio.run(request(application(nobody, never), method, path, b'{"session": "s"}', {**shown}))
    assert answer[0] == status
    assert ADMIN.encode() not in answer[1]


def test_a_key_of_both_kinds_is_no_operators() -> None:
    app = application(nobody, never, api=ADMIN)
    assert asyncio.run(request(app, "POST", "/api/admin/moves", b'{"session": "s"}'))[0] == 403


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[",
        b"[" * 2_000,
        b"[]",
        b"{}",
        b'{"session": 1}',
        b'{"session": ""}',
        b'{"session": "a/b"}',
        b'{"session": "a", "replica": "b"}',
        b'{"session": "a", "hold_s": 1}',
        b'{"replica": "a", "hold_s": true}',
        b'{"replica": "a", "hold_s": -1}',
        b'{"replica": "a", "hold_s": 1e9}',
        b'{"replica": "a", "hold_s": NaN}',
        b'{"replica": "a", "hold_s": "5"}',
        b"\xff\xfe",
    ],
)
def test_an_order_that_makes_no_sense_is_refused(body: bytes) -> None:
    assert asyncio.run(request(application(nobody, never), "POST", "/api/admin/moves", body))[0] == 400


def test_a_body_without_end_is_not_read() -> None:
    answer = asyncio.run(request(application(nobody, never), "POST", "/api/admin/moves", b" " * 5_000))
    assert answer[0] == 413


def test_a_gateway_that_dies_is_not_waited_for() -> None:
    """It asked once, a moment ago; the order waits for it until it must be dead, and no longer."""
    now = [0.0]

    async def test() -> None:
        kept = Orders(lambda: now[0])
        for name in ("dead", "alive"):
            assert await kept.next(GatewayBirth(name), 0) == News()
        running = asyncio.ensure_future(kept.run(MoveOrder(session="s"), 1_000.0))
        ((number, given),) = (await kept.next(GatewayBirth("alive"), 1.0)).orders
        assert given == MoveOrder(session="s")
        moved = MovedSession("s", orders.MOVED, "a", "b")
        kept.answer("alive", number, [moved])
        kept.answer("alive", number, [moved])
        await asyncio.sleep(0.05)
        assert not running.done(), "it may be slow"
        now[0] = LAPSE_S + 1
        assert await kept.next(GatewayBirth("alive"), 0) == News()
        assert await running == OrderResult((moved,), silent=1)
        assert (await kept.run(MoveOrder(session="s"), 0.0)).silent == 1, "the dead one gets no more orders"
        kept.answer("alive", number, [moved])

    asyncio.run(asyncio.wait_for(test(), 20))


def test_an_order_that_takes_too_long_says_who_is_silent() -> None:
    async def test() -> None:
        kept = Orders(asyncio.get_running_loop().time)
        assert await kept.next(GatewayBirth("slow"), 0) == News()
        assert await kept.run(MoveOrder(session="s"), 0.05) == OrderResult((), silent=1)

    asyncio.run(asyncio.wait_for(test(), 20))


def test_a_replica_that_is_held_stays_so_though_it_answers() -> None:
    now = [0.0]
    suspects = Suspects(lambda: now[0])
    suspects.hold("r", 60.0)
    suspects.add("r")
    suspects.clear("r")
    assert suspects.names() == {"r"}
    assert suspects.again_in_s() == 60.0
    now[0] = 60.0 + SUSPECT_S
    assert not suspects.names()


def test_orders_wait_for_nobody_who_is_not_there() -> None:
    async def test() -> None:
        asked = asyncio.ensure_future(Orders(lambda: 0.0).run(MoveOrder(replica="r"), 10.0))
        await until(asked.done, 1.0)
        assert asked.result() == OrderResult(())

    asyncio.run(test())


def test_a_gateway_is_outdated_once_one_of_another_version_has_settled() -> None:
    now = [0.0]
    old, same = GatewayBirth("old", "1", 10.0), GatewayBirth("same", "1", 20.0)
    new, older = GatewayBirth("new", "2", 30.0), GatewayBirth("older", "0", 5.0)

    async def test() -> None:
        kept = Orders(lambda: now[0])
        for gateway in (old, same, older):
            await kept.next(gateway, 0)
        now[0] = SETTLE_S
        assert not (await kept.next(old, 0)).outdated, "one of the same version, and one that is older"
        assert (await kept.next(older, 0)).outdated
        assert not (await kept.next(new, 0)).outdated
        assert not (await kept.next(old, 0)).outdated, "the proxies may not know the new one yet"
        now[0] = 2 * SETTLE_S
        assert (await kept.next(old, 0)).outdated
        assert (await kept.next(same, 0)).outdated
        assert not (await kept.next(new, 0)).outdated
        now[0] += LAPSE_S + 1
        assert not (await kept.next(old, 0)).outdated, "the new one has died"

    asyncio.run(test())


def test_a_new_gateway_stands_in_a_replicas_way_once_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    reports: list[float] = []  # when

    async def test() -> None:
        kept = Orders(lambda: now[0])

        async def sleep(seconds: float) -> None:
            now[0] += seconds
            while reports and reports[0] <= now[0]:
                reports.pop(0)
                kept.reported()

        monkeypatch.setattr(orders.asyncio, "sleep", sleep)

        async def asked(version: str, began: float) -> tuple[bool, float]:
            before = now[0]
            return await kept.in_the_way(GatewayBirth("new", version, began)), now[0] - before

        assert await asked("1", 10.0) == (False, pytest.approx(KNOWN_S, abs=0.2)), "nobody else is there"
        await kept.next(GatewayBirth("old", "1", 10.0), 0)
        assert await asked("1", 20.0) == (False, pytest.approx(KNOWN_S, abs=0.2)), "of the same version"
        reports.append(now[0] + 1.0)
        assert await asked("2", 30.0) == (False, pytest.approx(1.0, abs=0.2)), "there is a replica"
        assert await asked("2", 40.0) == (True, pytest.approx(ALONE_S, abs=0.2))
        assert await asked("2", 50.0) == (False, 0.0), "once"
        await kept.next(GatewayBirth("old", "1", 10.0), 0)
        assert await asked("0", 5.0) == (False, pytest.approx(KNOWN_S, abs=0.2)), "it is older itself"
        assert await asked("3", 60.0) == (True, pytest.approx(ALONE_S, abs=0.2))
        now[0] += LAPSE_S
        assert await asked("4", 70.0) == (False, pytest.approx(KNOWN_S, abs=0.2)), "the old one is gone"

    asyncio.run(test())


def test_a_client_is_not_asked_over_while_its_session_is_at_no_replica() -> None:
    """Only its gateway has the log then."""

    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            caller = Caller(lent)
            await caller.open()
            await caller.speak(0, 5)
            await caller.answered(5)
            fleet.kill(fleet.replicas[0])
            await until(lambda: caller.told(INTERRUPTED))
            await lent.moves.ask_over()
            assert not caller.told(RECONNECT)
            await caller.close()

    run(test)


def test_an_outdated_gateway_asks_each_client_over_that_can_come_back() -> None:
    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            caller, stock = Caller(lent), Talker(lent, PERSONAS[0], speech(2, FRAMES), "2" * 32)
            actor = Fleet()
            desk = OrderDesk(Remote(actor), GatewayBirth("old", "1"), lent.moves, lent.failovers.suspects)
            watching = asyncio.ensure_future(desk.watch())
            for one in (caller, stock):
                await one.open()
                await one.speak(0, 5)
                await one.answered(5)
            assert not caller.told(RECONNECT)
            actor._orders._inboxes["new"] = orders._Inbox(
                GatewayBirth("new", "2", 1.0), -99.0, time.monotonic()
            )
            actor._orders._inboxes["old"].filled.set()
            await until(lambda: caller.told(RECONNECT))
            for _ in range(3):
                await lent.moves.ask_over()
            assert len(caller.told(RECONNECT)) == 1
            assert not stock.told(RECONNECT)
            watching.cancel()
            for one in (caller, stock):
                await one.close()

    run(test)
