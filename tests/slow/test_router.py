"""Placement, scaling, and how a gateway waits for a lease."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError

from deployments.gateway.lease import Lease
from deployments.gateway.leases import GRACE_S, Leases
from deployments.gateway.router import LOOK_EVERY_S, SessionRouter
from deployments.gateway.suspects import ShortestFirst
from deployments.policy import Candidate, SessionScaling, rank, replicas_for
from deployments.wire.messages import Grant, LeaseRequest, Refusal
from personaplex.errors import NoCapacity, SessionLost

REQUEST = LeaseRequest("s", "NATF2")
GRANT = Grant("192.0.2.1", 1, bytes(16), "r", 4)


def _names(candidates: list[Candidate], voice: str = "", placement: str = "pack") -> list[str]:
    return [one.key for one in rank(candidates, voice, placement)]


def test_pack_prefers_the_fullest_and_spread_the_emptiest() -> None:
    fleet = [Candidate("a", 1, 4), Candidate("b", 3, 4), Candidate("c", 0, 4)]
    assert _names(fleet) == ["b", "a", "c"]
    assert _names(fleet, placement="spread") == ["c", "a", "b"]


def test_full_draining_and_failed_replicas_take_nobody() -> None:
    fleet = [Candidate("full", 4, 4), Candidate("draining", 0, 4, accepting=False), Candidate("over", 5, 4)]
    assert _names(fleet) == []


def test_a_cached_voice_comes_before_packing() -> None:
    fleet = [Candidate("a", 3, 4), Candidate("b", 0, 4, voices=frozenset({"NATF2"}))]
    assert _names(fleet, voice="NATF2") == ["b", "a"]
    assert _names(fleet, voice="NATM1") == ["a", "b"]
    assert _names(fleet, voice="") == ["a", "b"]


@pytest.mark.parametrize(
    ("sessions", "spare", "share", "replicas"),
    [
        (0, 0, 0.8, 0),
        (0, 1, 0.8, 1),
        (1, 0, 0.8, 1),
        (8, 0, 0.8, 1),  # exactly 80 % of 10
        (8.1, 0, 0.8, 2),
        (10, 0, 1.0, 1),
        (10, 1, 1.0, 2),
        (100, 20, 0.5, 20),
        (100, 20, 1.0, 12),
    ],
)
def test_replicas_follow_sessions(sessions: float, spare: int, share: float, replicas: int) -> None:
    assert replicas_for(sessions, 10, spare, share) == replicas


def test_serve_asks_the_policy_with_its_context() -> None:
    policy = SessionScaling(slots=10, spare_slots=0, target_utilisation=0.8)
    assert policy(SimpleNamespace(total_num_requests=17.0)) == (3, {})


class Named(str):
    @property
    def unique_id(self) -> str:
        return str(self)


def _replica(name: str, **stats: Any) -> Any:
    """As Serve's: names are objects that hold them."""
    return SimpleNamespace(replica_id=Named(name), routing_stats=stats, max_ongoing_requests=2)


def _router(queue: dict[str, int | None]) -> SessionRouter:
    """A router with Serve's queue lengths as given."""
    router = SessionRouter.__new__(SessionRouter)
    router.initialize_state(placement="pack")
    router._pending_requests_to_fulfill = deque()
    router._replica_queue_len_cache = SimpleNamespace(get=queue.get)  # Serve's, filled by its own calls
    return router


def _pending(voice: str = "", *excluded: str) -> Any:
    context = SimpleNamespace(should_backoff=False)
    return SimpleNamespace(args=[LeaseRequest("s", voice, frozenset(excluded))], routing_context=context)


def _route(
    queue: dict[str, int | None], replicas: list[Any], voice: str = "", *excluded: str
) -> list[list[str]]:
    """What a new SessionRouter answers Serve."""
    ranks = asyncio.run(_router(queue).choose_replicas(replicas, _pending(voice, *excluded)))
    return [[replica.replica_id for replica in ones] for ones in ranks]


def test_the_router_ranks_what_serve_knows_and_has_full_replicas_asked_last() -> None:
    replicas = [_replica("a"), _replica("b"), _replica("c"), _replica("d", accepting=False)]
    assert _route({"a": 2, "b": 0, "c": 1, "d": 0}, replicas) == [["c"], ["b"], ["a"]]
    assert _route({"a": 2, "b": 2, "c": 2}, replicas[:3]) == [["a", "b", "c"]]
    assert _route({}, replicas[:2]) == [["a"], ["b"]]
    assert _route({}, [_replica("a"), _replica("b", voices=["NATF2"])], "NATF2") == [["b"], ["a"]]


def test_an_excluded_replica_is_not_offered_even_when_it_is_full() -> None:
    replicas = [_replica("a"), _replica("b"), _replica("c")]
    assert _route({"a": 2, "b": 0, "c": 1}, replicas, "", "b", "a") == [["c"]]
    assert _route({"a": 2, "b": 0, "c": 1}, replicas, "", "a", "b", "c") == []


def test_a_call_that_waits_sleeps_and_full_replicas_are_asked_by_one_of_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without `should_backoff` Serve calls again at once: a waiting session took a third of a core, twice."""
    now = [100.0]
    monkeypatch.setattr("deployments.gateway.router.time.monotonic", lambda: now[0])
    queue: dict[str, int | None] = {"a": 2}
    router, calls = _router(queue), [_pending() for _ in range(6)]

    def offered() -> list[int]:
        return [len(asyncio.run(router.choose_replicas([_replica("a")], call))) for call in calls]

    assert offered() == [1, 0, 0, 0, 0, 0]
    assert all(call.routing_context.should_backoff for call in calls)
    assert offered() == [0] * 6
    now[0] += LOOK_EVERY_S
    assert offered() == [1, 0, 0, 0, 0, 0]
    queue["a"] = 1  # a session of this gateway ended: nobody has to ask
    assert offered() == [1] * 6


# Leases


class Call:
    """A streaming call as Serve gives it: items as they are put, an exception raised when it is one."""

    def __init__(self, *items: Any) -> None:
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self.cancelled = False
        for item in items:
            self.put(item)

    def put(self, item: Any) -> None:
        self._items.put_nowait(item)

    async def __anext__(self) -> Any:
        item = await self._items.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


class Replicas:
    """A handle whose calls are those of a list, in order."""

    def __init__(self, *calls: Call) -> None:
        self.calls, self.made = deque(calls), 0
        self.asked: list[LeaseRequest] = []

    def options(self, **options: Any) -> Replicas:
        assert options == {"method_name": "lease", "stream": True}
        return self

    def remote(self, request: LeaseRequest) -> Call:
        self.made += 1
        self.asked.append(request)
        return self.calls.popleft()


def _run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 10))  # type: ignore[arg-type]


def _leases(*calls: Call, limit: int = 4, timeout_s: float = 2.0) -> Leases:
    replicas: Any = Replicas(*calls)
    return Leases(replicas, queue_limit=limit, queue_timeout_s=timeout_s)


async def _acquire(leases: Leases, tell: Callable[[int], None]) -> Lease:
    """As a gateway does, less the upgrade in between."""
    return await (await leases.claim(REQUEST)).lease(tell)


def test_a_free_slot_is_had_without_a_word_about_queues() -> None:
    async def test() -> None:
        told: list[int] = []
        lease = await _acquire(_leases(Call(GRANT)), told.append)
        assert lease.grant is GRANT
        assert not told
        lease.release()

    _run(test)


def test_a_lease_ends_when_its_call_does() -> None:
    async def test() -> None:
        call = Call(GRANT)
        lease = await _acquire(_leases(call), lambda _: None)
        assert not await lease.wait_freed(0.05)
        call.put(StopAsyncIteration())
        assert await lease.wait_freed(1.0)
        lease.release()
        assert not call.cancelled

    _run(test)


def test_an_unused_lease_is_given_back() -> None:
    async def test() -> None:
        call = Call(GRANT)
        lease: Lease = await _acquire(_leases(call), lambda _: None)
        lease.release()
        lease.release()
        assert call.cancelled

    _run(test)


def test_those_who_wait_are_told_their_place_and_every_change_of_it() -> None:
    async def test() -> None:
        calls = [Call() for _ in range(3)]
        leases, told = _leases(*calls), [[], [], []]  # type: ignore[var-annotated]
        waiting = []
        for place in range(3):
            waiting.append(asyncio.ensure_future(_acquire(leases, told[place].append)))
            await asyncio.sleep(GRACE_S / 10)
        await asyncio.sleep(GRACE_S * 1.5)
        assert told == [[1], [2], [3]]
        assert leases.queued == 3
        calls[0].put(GRANT)
        (await waiting[0]).release()
        assert told == [[1], [2, 1], [3, 2]]
        waiting[1].cancel()
        await asyncio.wait({waiting[1]})
        assert told == [[1], [2, 1], [3, 2, 1]]
        assert calls[1].cancelled
        calls[2].put(GRANT)
        (await waiting[2]).release()
        assert leases.queued == 0

    _run(test)


def test_a_full_queue_refuses_and_a_long_wait_ends() -> None:
    async def test() -> None:
        calls = [Call() for _ in range(2)]
        leases = _leases(*calls, limit=1, timeout_s=0.8)
        patient = asyncio.ensure_future(_acquire(leases, lambda _: None))
        await asyncio.sleep(GRACE_S * 1.2)
        with pytest.raises(NoCapacity, match="full"):
            await _acquire(leases, lambda _: None)
        with pytest.raises(NoCapacity, match="in time"):
            await patient
        assert all(call.cancelled for call in calls)
        assert leases.queued == 0

    _run(test)


def test_who_waits_when_the_service_ends_is_told_and_who_comes_later_too() -> None:
    async def test() -> None:
        calls = [Call() for _ in range(3)]
        leases = _leases(*calls)
        waiting = [asyncio.ensure_future(_acquire(leases, lambda _: None)) for _ in range(2)]
        await asyncio.sleep(GRACE_S * 1.2)
        waiting.append(asyncio.ensure_future(_acquire(leases, lambda _: None)))  # not queued yet
        await asyncio.sleep(0.01)
        leases.close()
        leases.close()
        for one in waiting:
            with pytest.raises(SessionLost, match="stopped"):
                await one
        with pytest.raises(SessionLost, match="stopped"):
            await _acquire(leases, lambda _: None)
        assert all(call.cancelled for call in calls)
        assert leases.queued == 0

    _run(test)


def test_a_claim_that_is_not_used_gives_its_slot_back() -> None:
    async def test() -> None:
        calls = [Call(GRANT), Call(GRANT)]
        leases = _leases(*calls)
        taken, left = await leases.claim(REQUEST), await leases.claim(REQUEST)
        lease = await taken.lease(lambda _: None)
        for claim in (taken, left, left):
            claim.give_up()
        assert [call.cancelled for call in calls] == [False, True], "who has a lease has it"
        lease.release()

    _run(test)


def test_a_place_in_the_queue_is_a_claim_and_is_told_when_it_is_asked_for() -> None:
    async def test() -> None:
        calls = [Call() for _ in range(2)]
        leases, told = _leases(*calls, limit=1), list[int]()
        claim = await leases.claim(REQUEST)
        assert leases.queue_full
        with pytest.raises(NoCapacity, match="full"):
            await leases.claim(REQUEST)
        waiting = asyncio.ensure_future(claim.lease(told.append))
        await asyncio.sleep(0)
        assert told == [1]
        waiting.cancel()
        await asyncio.wait({waiting})
        assert all(call.cancelled for call in calls)
        assert leases.queued == 0

    _run(test)


def test_a_client_that_leaves_before_its_place_is_known_leaves_nothing() -> None:
    async def test() -> None:
        call = Call()
        leases = _leases(call)
        claiming = asyncio.ensure_future(leases.claim(REQUEST))
        await asyncio.sleep(GRACE_S / 10)
        claiming.cancel()
        await asyncio.wait({claiming})
        await asyncio.sleep(0.01)
        assert call.cancelled
        assert not leases._waiting

    _run(test)


@pytest.mark.parametrize("turns", range(8))
def test_a_slot_that_comes_while_its_client_leaves_is_given_back(turns: int) -> None:
    """Wherever on its way to the session the slot is: a result nobody awaits any more was lost once."""

    async def test() -> None:
        call = Call()
        claim = await _leases(call).claim(REQUEST)
        waiting = asyncio.ensure_future(claim.lease(lambda _: None))
        await asyncio.sleep(0)
        call.put(GRANT)
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait({waiting})
        if not waiting.cancelled():
            waiting.result().release()
        await asyncio.sleep(0.01)
        assert call.cancelled

    _run(test)


@pytest.mark.parametrize(
    ("end", "over"),
    [
        (StopAsyncIteration(), True),  # the replica says that the slot is free
        (asyncio.CancelledError(), True),  # Serve ends the call together with the WebSocket's request
        (RequestCancelledError(), True),
        (ActorDiedError(), False),
        (BackPressureError(1, 1), False),
        (None, False),  # given back
    ],
)
def test_slots_are_held_until_they_end_and_those_whose_session_is_over_are_measured(
    end: BaseException | None, over: bool
) -> None:
    async def test() -> None:
        call, freed = Call(GRANT), list[float]()
        leases = Leases(cast(Any, Replicas(call)), queue_limit=4, queue_timeout_s=2.0, freed=freed.append)
        lease = await _acquire(leases, lambda _: None)
        assert [(one.session, one.replica) for one in leases.held()] == [(REQUEST.session, GRANT.replica)]
        await asyncio.sleep(0.05)
        if end is None:
            lease.release()
        else:
            call.put(end)
        assert await lease.wait_freed(1.0)
        lease.release()  # as every session does behind it: without effect by then
        await asyncio.sleep(0.01)
        assert not leases.held()
        assert call.cancelled == (end is None)
        assert len(freed) == over
        assert all(0.05 <= seconds < 1.0 for seconds in freed)

    _run(test)


def test_tries_that_fail_make_one_line_of_log(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        calls = [Call(ActorDiedError()) for _ in range(50)]
        with pytest.raises(NoCapacity):
            await _acquire(_leases(*calls, timeout_s=1.0), lambda _: None)

    _run(test)
    assert len(caplog.records) == 1


def test_without_a_queue_nobody_waits() -> None:
    async def test() -> None:
        with pytest.raises(NoCapacity):
            await _acquire(_leases(Call(), limit=0), lambda _: None)

    _run(test)


@pytest.mark.parametrize(
    "failure", [Refusal(), ActorDiedError(), DeploymentUnavailableError(None), StopAsyncIteration()]
)
def test_a_replica_that_refuses_or_dies_is_replaced_by_another(failure: Any) -> None:
    async def test() -> None:
        leases = _leases(Call(failure), Call(failure), Call(GRANT))
        lease = await _acquire(leases, lambda _: None)
        assert lease.grant is GRANT
        lease.release()

    _run(test)


def test_a_replica_that_is_suspected_is_left_out_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deployments.gateway.suspects.SUSPECT_S", 0.4)

    async def test() -> None:
        calls = Replicas(Call(), Call(GRANT))
        leases = Leases(cast(Any, calls), queue_limit=4, queue_timeout_s=5.0)
        leases.suspects.add("r")
        leases.suspects.add("x")
        leases.suspects.clear("x")
        began = asyncio.get_running_loop().time()
        lease = await _acquire(leases, lambda _: None)
        assert 0.35 < asyncio.get_running_loop().time() - began < 1.0
        assert [one.excluded for one in calls.asked] == [{"r"}, set()]
        lease.release()

    _run(test)


def test_sessions_lost_together_ask_in_the_order_of_their_lengths() -> None:
    async def test() -> None:
        order, asked = ShortestFirst(), list[int]()

        async def ask(frames: int) -> None:
            await order.turn(frames)
            asked.append(frames)

        asking = [asyncio.ensure_future(ask(frames)) for frames in (30, 7, 900, 7, 1)]
        await asyncio.sleep(0)
        asking[2].cancel()
        await asyncio.wait(asking)
        assert asked == [1, 7, 7, 30]

    _run(test)


def test_a_service_without_replicas_is_not_tried_for_ever() -> None:
    async def test() -> None:
        calls = [Call(DeploymentUnavailableError(None)) for _ in range(50)]
        with pytest.raises(NoCapacity):
            await _acquire(_leases(*calls, timeout_s=0.5), lambda _: None)

    _run(test)
