"""Sessions that leave a replica which goes: nothing of theirs is lost, and no frame is late for it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from loopback import Counted, MemoryEngine, fleet_of, services
from sessions import PERSONAS, speech
from test_failover import Talker, assert_unharmed, memory, run, until, used
from test_resume import NAME, SOUND, Caller

from deployments.gateway.handover import CONTINUED, INTERRUPTED
from deployments.gateway.moves import AT_ONCE, Moves
from deployments.gateway.upstream import WINDOW
from deployments.metrics import FAILOVERS, MOVES
from personaplex.engine.interface import Slot


def test_a_moved_session_says_what_it_would_have_said() -> None:
    async def test() -> None:
        async with fleet_of(2, memory) as fleet:
            published = Counted()
            lent = services(fleet, published, after_s=5.0)
            talkers = [Talker(lent, PERSONAS[0], speech(n, 60), f"{n}" * 32) for n in (1, 2)]
            for talker in talkers:
                await talker.open()
            await used(fleet, 2, 0)
            talking = [asyncio.ensure_future(talker.speak(0, 60)) for talker in talkers]
            await talkers[0].answered(20)
            lent.moves.running({fleet.replicas[1].name})
            await used(fleet, 0, 2)
            await asyncio.gather(*talking)
            for talker in talkers:
                await talker.answered(60)
                assert_unharmed(talker, memory(), 60)
                assert not talker.told(INTERRUPTED), "nothing was interrupted"
                await talker.close()
            assert published.totals[(MOVES.name, "continued")] == 2
            assert (FAILOVERS.name, "continued") not in published.totals

    run(test)


def test_a_session_whose_user_says_nothing_is_moved_too() -> None:
    async def test() -> None:
        async with fleet_of(2, memory) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            talker = Talker(lent, PERSONAS[0], SOUND)
            await talker.open()
            await talker.speak(0, 5)
            await talker.answered(5)
            lent.moves.running({fleet.replicas[1].name})
            await used(fleet, 0, 1)
            await talker.speak(5, 10)
            await talker.answered(10)
            assert_unharmed(talker, memory(), 10)
            await talker.close()

    run(test)


def test_without_room_it_stays_and_is_tried_again() -> None:
    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            lent = services(fleet, Counted(), after_s=5.0, queue_timeout_s=0.3)
            talker = Talker(lent, PERSONAS[0], SOUND)
            await talker.open()
            talking = asyncio.ensure_future(talker.speak(0, 60))
            lent.moves.running({"another one"})  # which is full, or not there yet
            await talker.answered(30)
            assert talker.replica == fleet.replicas[0].name
            await fleet.add()
            await used(fleet, 0, 1)
            await talking
            await talker.answered(60)
            assert_unharmed(talker, memory(), 60)
            await talker.close()

    run(test)


def test_the_old_replica_may_die_while_its_sessions_leave() -> None:
    async def test() -> None:
        async with fleet_of(2, memory) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            talker = Talker(lent, PERSONAS[0], SOUND)
            await talker.open()
            talking = asyncio.ensure_future(talker.speak(0, 60))
            await talker.answered(10)
            moving = asyncio.ensure_future(talker.upstream.handover.move())
            await asyncio.sleep(0)
            assert talker.upstream.handover._failover is not None, "the search has begun"
            fleet.kill(fleet.replicas[0])
            await talking
            await talker.answered(60)
            await moving
            assert_unharmed(talker, memory(), 60)
            await talker.close()

    run(test)


def test_after_a_move_the_client_holds_a_new_token() -> None:
    async def test() -> None:
        async with fleet_of(2, memory) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            first = Caller(lent)
            await first.open()
            old = first.token
            await first.speak(0, 10)
            await first.answered(10)
            assert await first.upstream.handover.move()
            assert len(first.told(CONTINUED)) == 1
            assert first.token != old
            first.lose_gateway()
            second = Caller(lent, name=NAME)
            await second.come_back(first.token, 10)
            await second.speak(10, 20)
            await second.answered(10)
            assert [number for number, _ in second.heard] == list(range(10, 20))
            await second.close()

    run(test)


class Session:
    """Where it is. It is moved once it may be."""

    def __init__(self, replica: str, frames: int, begun: list[int]) -> None:
        self.replica, self.frames, self.may = replica, frames, asyncio.Event()
        self._begun = begun

    async def move(self) -> bool:
        self._begun.append(self.frames)
        await self.may.wait()
        self.replica = "new"
        return True


def test_a_few_at_a_time_and_the_shortest_first() -> None:
    async def test() -> None:
        moves, begun = Moves(), list[int]()
        lengths = [int(n) for n in np.random.default_rng(0).permutation(3 * AT_ONCE)]
        sessions = [Session("old", frames, begun) for frames in lengths]
        for session in sessions:
            moves.add(session)
        moves.add(Session("new", 99, begun))
        moves.running(set())
        await asyncio.sleep(0.01)
        assert begun == [], "the end of the service is no reason to go"
        moves.running({"new"})
        for first in range(0, len(lengths), AT_ONCE):
            await until(lambda first=first: len(begun) == first + AT_ONCE)
            await asyncio.sleep(0.01)
            assert begun == sorted(lengths)[: first + AT_ONCE]
            for session in sessions:
                if session.frames in begun:
                    session.may.set()
        await until(lambda: all(session.replica == "new" for session in sessions))
        assert 99 not in begun, "it is where it may stay"

    run(test)


WINDOW_FRAME = 15


class SmallWindow(MemoryEngine):
    def window(self, slot: Slot) -> int:
        return WINDOW_FRAME


def small_window() -> MemoryEngine:
    return SmallWindow(2)


@pytest.mark.parametrize("at", [5, 25], ids=["moved before", "moved after"])
def test_a_full_window_is_told_once_whatever_replica_it_is_at(at: int) -> None:
    async def test() -> None:
        async with fleet_of(2, small_window) as fleet:
            talker = Talker(services(fleet, Counted(), after_s=5.0), PERSONAS[0], SOUND)
            await talker.open()
            await talker.speak(0, at)
            await talker.answered(at)
            assert len(talker.told(WINDOW)) == (at > WINDOW_FRAME)
            assert await talker.upstream.handover.move()
            await talker.speak(at, 40)
            await talker.answered(40)
            assert [notice.data for notice in talker.told(WINDOW)] == [{"frame": WINDOW_FRAME}]
            assert_unharmed(talker, memory(), 40)
            await talker.close()

    run(test)


@pytest.mark.parametrize("at", [5, 25], ids=["resumed before", "resumed after"])
def test_a_full_window_is_told_once_whichever_connection_it_is(at: int) -> None:
    async def test() -> None:
        async with fleet_of(2, small_window) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            first, second = Caller(lent), Caller(lent, name=NAME)
            await first.open()
            await first.speak(0, at)
            await first.answered(at)
            first.lose_gateway()
            await second.come_back(first.token, at)
            await second.speak(at, 40)
            await second.answered(40 - at)
            told = [[notice.data for notice in one.told(WINDOW)] for one in (first, second)]
            once = [{"frame": WINDOW_FRAME}]
            assert told == ([[], once] if at < WINDOW_FRAME else [once, []])
            await second.close()

    run(test)


def test_a_window_that_never_fills_is_not_told() -> None:
    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            talker = Talker(services(fleet, Counted(), after_s=5.0), PERSONAS[0], SOUND)
            await talker.open()
            await talker.speak(0, 20)
            await talker.answered(20)
            assert not talker.told(WINDOW)
            await talker.close()

    run(test)
