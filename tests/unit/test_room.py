"""What a gateway knows of the slots that its callers wait for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.gateway.lease import HeldSlot
from deployments.gateway.room import PLAYED_S, Room
from deployments.gateway.turns import QueuedRequest, Turns
from deployments.gateway.waits import Expected
from deployments.wire.messages import ReplicaStatus, SessionStatus


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Forecasts:
    """Waits that take down what they are asked; place n waits n seconds."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[float], list[float], int]] = []

    def forecast(self, own: list[float], elsewhere: list[float], places: int, now: float) -> list[Expected]:
        self.asked.append((own, elsewhere, places))
        return [Expected(float(place + 1), known=True) for place in range(places)]

    def told(self, session: str, expected: Expected, now: float) -> float:
        return expected.seconds

    def sayable(self, expected: Expected) -> float:
        return expected.seconds


class Service:
    def __init__(self, *held: HeldSlot) -> None:
        self.clock, self.waits, self.replicas = Clock(), Forecasts(), list[ReplicaStatus]()
        self.queue: list[QueuedRequest] = []
        self.leases = SimpleNamespace(held=lambda: list(held), waiting=lambda: self.queue, changes=0)
        self.room = self._make()

    def _make(self) -> Room:
        fleet: Any = SimpleNamespace(describe=self.describe)
        leases: Any = self.leases
        waits: Any = self.waits
        turns = Turns(self.clock)
        return Room(fleet, leases, turns, waits, limit=9, changed=lambda: None, clock=self.clock)

    async def describe(self) -> list[ReplicaStatus]:
        return self.replicas

    def queued(self, *sessions: str) -> None:
        self.queue = [QueuedRequest(name, "", arrived=float(n)) for n, name in enumerate(sessions)]
        self.leases.changes += 1


def replica(name: str, slots: int, *, accepting: bool = True, **ages: float) -> ReplicaStatus:
    sessions = tuple(SessionStatus(session, age) for session, age in ages.items())
    return ReplicaStatus(name, "", 0, "", (), slots, accepting, sessions)


def test_own_sessions_are_known_and_others_are_as_last_seen() -> None:
    service = Service(HeldSlot("a", "r", 90.0), HeldSlot("new", "r", 99.5), HeldSlot("old", "drained", 1.0))
    service.room.see(
        [replica("r", 4, a=9.0, b=20.0, c=3.0), replica("drained", 4, accepting=False, old=98.0, d=5.0)]
    )
    service.clock.now += 1.0
    service.queued("s", "t")
    assert service.room.wait("t") == 2.0
    assert service.waits.asked == [([11.0, 1.5], [4.0, 21.0], 3)]


def test_who_was_seen_where_now_another_holds_the_slot_has_ended() -> None:
    service = Service(HeldSlot("a", "r", 90.0), HeldSlot("new", "r", 99.9))
    service.room.see([replica("r", 3, a=10.0, b=20.0, c=3.0)])
    service.queued("s")
    assert service.room.wait("s") == 1.0
    ((_, elsewhere, _),) = service.waits.asked
    assert elsewhere == [3.0], "the oldest one"


def test_a_slot_that_was_seen_free_is_taken_by_now() -> None:
    service = Service()
    service.room.see([replica("r", 3, b=20.0)])
    service.queued("s")
    service.room.wait("s")
    assert service.waits.asked == [([], [20.0, 0.0, 0.0], 2)]


def test_the_queue_is_played_once_for_all_who_move_up_and_again_when_it_changes() -> None:
    service = Service()
    service.room.see([replica("r", 1, b=20.0)])
    service.queued("s", "t", "u")
    assert [service.room.wait(name) for name in "stu"] == [1.0, 2.0, 3.0]
    assert service.room.wait("nobody") is None
    assert len(service.waits.asked) == 1
    service.queued("t", "u")
    assert [service.room.wait(name) for name in "tu"] == [1.0, 2.0]
    assert len(service.waits.asked) == 2
    service.clock.now += PLAYED_S
    service.room.wait("u")
    assert len(service.waits.asked) == 3


@pytest.mark.parametrize(("free", "expected"), [(1, 0.0), (0, 3.0)])
def test_who_comes_now_is_last(free: int, expected: float) -> None:
    service = Service()
    service.queued("s", "t")
    service.replicas = [replica("r", 1 + free, b=20.0), replica("full", 1, accepting=False)]
    assert asyncio.run(service.room.expected_wait()) == expected


def test_without_word_of_the_replicas_nothing_is_known() -> None:
    service = Service(HeldSlot("a", "r", 90.0))
    service.queued("s")
    service.room.wait("s")
    assert service.waits.asked == [([], [], 2)]
