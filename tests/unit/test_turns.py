"""Whose turn it is: no key fills the queue, and none makes another wait for more than one turn."""

from __future__ import annotations

import asyncio
import pickle
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.request_router import FIFOMixin

from deployments.gateway.leases import GRACE_S, Leases
from deployments.gateway.router import SessionRouter
from deployments.gateway.turns import STALE_S, YIELD_S, QueuedRequest, Turns
from deployments.wire.holdings import Elsewhere, Holdings, Ledger, Waiting
from deployments.wire.messages import LeaseRequest
from personaplex.errors import NoCapacity, TooManySessions


class Named(str):
    """As Serve's replica ids."""

    @property
    def unique_id(self) -> str:
        return str(self)


class Clock:
    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


def caller(
    name: str, holder: str, arrived: float, priority: int = 5, turns: Turns | None = None
) -> QueuedRequest:
    return QueuedRequest(name, "NATF2", frozenset(), holder, priority, arrived, turns)


def serve(turns: Turns, clock: Clock, waiting: list[QueuedRequest]) -> QueuedRequest:
    """One slot becomes free, and its caller gets it."""
    clock.now += 1.0
    chosen = turns.pick(waiting)
    turns.sent(chosen)
    waiting.remove(chosen)
    turns.granted(chosen)
    turns.gone(chosen)
    return chosen


def test_a_flood_of_one_key_delays_anothers_caller_by_at_most_one_turn() -> None:
    """Wherever in the flood it comes, and also when the flood has just been served."""
    for before in range(6):
        clock = Clock()
        turns = Turns(clock)
        waiting = [caller(f"a{number}", "a", number / 1e3) for number in range(100)]
        for _ in range(before):
            serve(turns, clock, waiting)
        waiting.append(caller("b", "b", clock.now))
        order = [serve(turns, clock, waiting).session for _ in range(2)]
        assert "b" in order


def test_a_flood_already_on_its_way_counts_as_served() -> None:
    """Many slots come free at once: they are handed out before the first of them is granted."""
    clock = Clock()
    turns = Turns(clock)
    waiting = [caller(f"a{number}", "a", number) for number in range(10)]
    waiting += [caller("b", "b", 500.0), caller("c", "c", 501.0)]
    sent = []
    for _ in range(4):
        chosen = turns.pick(waiting)
        turns.sent(chosen)
        waiting.remove(chosen)
        sent.append(chosen.session)
    assert sent[:3] == ["a0", "b", "c"]


def test_who_comes_back_from_a_full_replica_has_not_had_its_turn() -> None:
    clock = Clock()
    turns = Turns(clock)
    a, b = caller("a", "a", 1.0), caller("b", "b", 2.0)
    assert turns.pick([a, b]) is a
    turns.sent(a)
    assert turns.pick([b]) is b
    assert turns.pick([a, b]) is a, "the replica refused it"


def test_keys_take_turns_and_each_keys_callers_are_in_their_order() -> None:
    clock = Clock()
    turns = Turns(clock)
    waiting = [caller(f"{holder}{n}", holder, n + ord(holder) / 1e3) for holder in "abc" for n in range(3)]
    expected = [one.session for one in turns.order(waiting)]
    assert expected == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]
    assert [serve(turns, clock, waiting).session for _ in range(9)] == expected


def test_who_waits_longest_goes_first_whoever_had_a_slot_when() -> None:
    """A holder whose last slot was long ago does not pass another that has waited longer for this one."""
    clock = Clock()
    turns = Turns(clock)
    old, new = caller("old", "o", clock.now), caller("new", "n", clock.now)
    turns.granted(old)
    clock.now += 2.0
    turns.granted(new)
    waiting = [caller("new again", "n", clock.now + 1.0), caller("old again", "o", clock.now + 5.0)]
    waiting += [caller("nobody knows", "x", clock.now + 6.0)]
    clock.now += 8.0
    expected = [one.session for one in turns.order(waiting)]
    assert expected == ["new again", "old again", "nobody knows"]
    assert [serve(turns, clock, waiting).session for _ in range(3)] == expected


def test_who_is_on_the_way_to_a_slot_stands_in_nobodys_way() -> None:
    clock = Clock()
    turns = Turns(clock)
    waiting = [caller(name, name, clock.now + n) for n, name in enumerate("abc")]
    turns.sent(waiting[0])
    assert [one.session for one in turns.order(waiting)] == ["a", "b", "c"], "not behind those that wait"
    assert turns.places(waiting) == ({"b": 1, "c": 2}, 2)
    assert set(turns.waiting(waiting)) == {"b", "c"}
    assert turns.pick(waiting).session == "a", "it was refused"
    assert turns.places(waiting) == ({"a": 1, "b": 2, "c": 3}, 3)


def test_a_higher_priority_goes_first() -> None:
    turns = Turns(Clock())
    waiting = [caller("low", "l", 0.0, 1), caller("high", "h", 9.0, 9), caller("mid", "m", 5.0)]
    assert [one.session for one in turns.order(waiting)] == ["high", "mid", "low"]
    assert turns.pick(waiting).session == "high"


def test_one_key_gets_half_the_queue_and_there_is_always_a_place_for_another() -> None:
    turns, waiting = Turns(Clock()), list[QueuedRequest]()
    for holder in "aabbccdd":
        for number in range(64):
            if len(waiting) < 64 and not turns.full_for(holder, waiting, 64):
                waiting.append(caller(f"{holder}{number}", holder, number))
    counts = {holder: sum(one.holder == holder for one in waiting) for holder in "abcd"}
    assert counts == {"a": 32, "b": 16, "c": 8, "d": 4}
    assert not turns.full_for("e", waiting, 64)
    assert not turns.full_for("a", [], 1), "a queue of one place is somebody's"


def test_a_key_that_may_not_queue_is_told_so_and_others_may() -> None:
    async def run() -> None:
        who = {f"a{number}": ("a", 5) for number in range(9)} | {"b": ("b", 5)}
        handle: Any = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda _: Silent()))
        leases = Leases(handle, queue_limit=4, queue_timeout_s=9, who=who.get, shared=lambda session: True)
        claims = [await leases.claim(LeaseRequest(f"a{number}", "")) for number in range(2)]
        with pytest.raises(TooManySessions, match="as many callers") as caught:
            await leases.claim(LeaseRequest("a2", ""))
        assert caught.value.limit == "queue"
        claims.append(await leases.claim(LeaseRequest("b", "")))
        assert [one.session for one in leases.waiting()] == ["a0", "b", "a1"]
        places: dict[str, int] = {}
        tasks = [
            asyncio.ensure_future(claim.lease(lambda place, name=name: places.__setitem__(name, place)))
            for name, claim in zip(("a0", "a1", "b"), claims, strict=True)
        ]
        await asyncio.sleep(0)
        assert places == {"a0": 1, "b": 2, "a1": 3}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    asyncio.run(asyncio.wait_for(run(), 10 * GRACE_S + 5))


class Silent:
    """A call that is never answered."""

    async def __anext__(self) -> Any:
        await asyncio.Event().wait()

    def cancel(self) -> None:
        pass


# Between gateways


def test_a_gateway_leaves_a_slot_to_anothers_caller_who_comes_first() -> None:
    clock = Clock()
    turns = Turns(clock)
    mine = [caller("a", "a", clock.now - 5)]
    assert not turns.yields(mine), "nobody else is known of"
    turns.heard(Elsewhere(waiting={"b": Waiting(5, 1, 9.0)}))
    assert turns.yields(mine), "waits longer"
    turns.heard(Elsewhere(waiting={"b": Waiting(5, 1, 1.0)}))
    assert not turns.yields(mine), "came later"
    turns.granted(caller("a", "a", 0.0))
    assert turns.yields(mine), "a has just had a slot"
    turns.heard(Elsewhere(waiting={"b": Waiting(5, 1, 1.0)}, served_s={"b": 0.0}))
    clock.now += 0.1
    assert not turns.yields(mine), "b had one elsewhere, later"
    turns.heard(Elsewhere(waiting={"b": Waiting(9, 1, 0.0)}))
    assert turns.yields(mine), "a higher priority"
    clock.now += STALE_S + 1
    assert not turns.yields(mine), "word that is old"


def test_places_are_those_among_the_callers_of_all_gateways() -> None:
    clock = Clock()
    turns = Turns(clock)
    mine = [caller(f"m{number}", "a", clock.now - 10 * number) for number in range(3)]  # the last came first
    assert turns.places(mine) == ({"m2": 1, "m1": 2, "m0": 3}, 3)
    turns.heard(Elsewhere(waiting={"a": Waiting(5, 2, 18.0)}))  # one came 18 s ago, one perhaps 9
    assert turns.places(mine) == ({"m2": 1, "m1": 3, "m0": 5}, 5)
    turns.heard(Elsewhere(waiting={"z": Waiting(9, 2, 1.0), "b": Waiting(5, 4, 0.5)}))
    assert turns.places(mine) == ({"m2": 3, "m1": 5, "m0": 7}, 9), "the higher priority, then turn by turn"
    assert turns.places([]) == ({}, 6)
    clock.now += STALE_S + 1
    assert turns.places(mine) == ({"m2": 1, "m1": 2, "m0": 3}, 3), "word that is old"


def test_the_fleet_passes_on_who_waits_and_who_was_served() -> None:
    clock = Clock()
    turns, ledger = Turns(clock), Ledger(0.0)
    turns.granted(caller("x", "h", 0.0))
    clock.now += 2.0
    queued = [caller("y", "h", clock.now - 7), caller("z", "h", clock.now - 1)]
    ledger.report("g", Holdings(1, waiting=turns.waiting(queued), served_s=turns.served_s(60.0)), 10.0)
    heard = ledger.report("other", Holdings(1), 10.5)
    assert heard.waiting == {"h": Waiting(5, 2, 7.0)}
    assert heard.served_s == {"h": 2.5}


# In Serve's router


def router(turns: Turns, *requests: QueuedRequest) -> tuple[SessionRouter, list[Any], dict[str, int]]:
    made = SessionRouter.__new__(SessionRouter)
    made.initialize_state(placement="pack")
    queue: dict[str, int] = {"r": 0}
    made._replica_queue_len_cache = SimpleNamespace(get=queue.get)
    calls = [
        SimpleNamespace(
            args=[request],
            future=asyncio.get_running_loop().create_future(),
            routing_context=SimpleNamespace(should_backoff=False),
        )
        for request in requests
    ]
    made._pending_requests_to_fulfill = deque(calls)
    for name in ("_cancel_routing_task_for_pending_request", "_record_queue_wait_time"):
        setattr(made, name, lambda call: None)
    made._remove_pending_request_from_indices = lambda call: None  # type: ignore[method-assign]
    return made, calls, queue


def test_a_freed_slot_goes_to_whose_turn_it_is() -> None:
    async def run() -> None:
        turns = Turns(Clock())
        requests = [caller(f"a{n}", "a", n, turns=turns) for n in range(3)]
        requests.append(caller("b", "b", 9.0, turns=turns))
        made, calls, _ = router(turns, *requests)
        replica: Any = SimpleNamespace(replica_id=Named("r"))
        won = []
        for _ in range(4):
            made._fulfill_next_pending_request(replica)
            won += [
                one.args[0].session for one in calls if one.future.done() and one.args[0].session not in won
            ]
        assert won == ["a0", "b", "a1", "a2"]
        assert FIFOMixin in SessionRouter.__mro__

    asyncio.run(run())


def test_a_slot_is_left_to_another_gateway_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        clock = Clock()
        turns = Turns(clock)
        monkeypatch.setattr("deployments.gateway.router.time.monotonic", clock)
        requests = [caller(name, "a", clock.now, turns=turns) for name in ("a", "a2")]
        made, calls, queue = router(turns, *requests)
        replica: Any = SimpleNamespace(replica_id=Named("r"), routing_stats={}, max_ongoing_requests=1)

        async def offered() -> bool:
            return [[replica]] == await made.choose_replicas([replica], calls[0])

        assert await offered()
        turns.heard(Elsewhere(waiting={"b": Waiting(5, 1, 60.0)}))
        assert not await offered()
        clock.now += YIELD_S / 2
        assert not await offered()
        queue["r"] = 1  # the other gateway's caller took it
        await offered()
        queue["r"] = 0
        assert not await offered(), "another slot, another moment"
        clock.now += YIELD_S
        assert await offered()
        made._fulfill_next_pending_request(replica)
        made._pending_requests_to_fulfill = deque(calls[1:])
        assert not await offered(), "the next slot is another one"
        clock.now += YIELD_S
        assert await offered()
        turns.heard(Elsewhere())
        assert await offered()

    asyncio.run(run())


def test_before_a_free_slot_is_taken_the_fleet_is_asked_about_callers_elsewhere() -> None:
    async def run() -> None:
        turns, asked = Turns(Clock()), 0
        made, calls, _ = router(turns, caller("a", "a", 0.0, turns=turns))
        replica: Any = SimpleNamespace(replica_id=Named("r"), routing_stats={}, max_ongoing_requests=1)

        async def ask() -> None:
            nonlocal asked
            asked += 1
            turns.heard(Elsewhere(waiting={"b": Waiting(9, 1, 60.0)}))

        turns.ask = ask
        assert [[replica]] == await made.choose_replicas([replica], calls[0])
        assert not asked, "nobody waits elsewhere"
        turns.heard(Elsewhere(waiting={"b": Waiting(0, 1, 0.0)}))
        assert not await made.choose_replicas([replica], calls[0]), "meanwhile somebody with a priority came"
        assert asked == 1

    asyncio.run(run())


def test_others_hear_of_a_slot_that_is_about_to_be_taken() -> None:
    turns = Turns(Clock())
    turns.sent(caller("a", "a", 0.0))
    assert turns.served_s(60.0) == {"a": 0.0}


def test_to_a_replica_a_request_says_nothing_of_keys() -> None:
    request = caller("s", "label acme", 1.0, turns=Turns(Clock()))
    assert pickle.loads(pickle.dumps(request)) == LeaseRequest("s", "NATF2")
    assert b"acme" not in pickle.dumps(request)
    assert "acme" not in repr(request)


def test_a_full_queue_is_full_for_everybody() -> None:
    async def run() -> None:
        handle: Any = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda _: Silent()))
        leases = Leases(
            handle, queue_limit=1, queue_timeout_s=9, who=lambda name: (name, 5), shared=lambda session: True
        )
        claim = await leases.claim(LeaseRequest("a", ""))
        with pytest.raises(NoCapacity, match="full"):
            await leases.claim(LeaseRequest("b", ""))
        claim.give_up()

    asyncio.run(run())
