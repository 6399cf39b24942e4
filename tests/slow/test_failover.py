"""A session whose replica dies, fails, cannot be reached or is silent goes on at another one: in one process,
with real links, sessions and engines."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from loopback import Counted, Fleet, LoopbackReplica, MemoryEngine, fleet_of, services
from numpy.typing import NDArray
from sessions import PERSONAS, engine, speech

from deployments.gateway.failover import LOST_LIMIT
from deployments.gateway.handover import CONTINUED, INTERRUPTED
from deployments.gateway.leases import Claim
from deployments.gateway.services import Services
from deployments.gateway.stats import SessionStats
from deployments.gateway.upstream import Upstream
from deployments.metrics import FAILOVER_SECONDS, FAILOVERS
from deployments.replica import sessions as replica_sessions
from deployments.wire.messages import LeaseRequest, MessageKind
from personaplex.engine.interface import Stepper
from personaplex.errors import (
    EngineFault,
    LogRefused,
    NoCapacity,
    RepeatedlyLost,
    SessionLost,
    UnknownVersion,
)
from personaplex.persona import Persona
from personaplex.session.events import Event, Failed, Ready, SessionNotice

AFTER_S = 0.4
PACE_S = 0.02  # four times real time


class Talker:
    """A session and its user, who says `sound` one frame every PACE_S."""

    def __init__(self, lent: Services, persona: Persona, sound: NDArray[np.float32], name: str = "s") -> None:
        self.persona, self.sound = persona, sound
        self.events: list[Event] = []
        self.heard: list[tuple[int, NDArray[np.float32]]] = []
        self._lent = lent
        stats = SessionStats(name, lent.metrics, None)
        self.upstream = Upstream(name, lent, stats, self.events.append, self._hear)
        self._name = name

    async def open(self) -> None:
        claim: Claim = await self._lent.leases.claim(LeaseRequest.of(self._name, self.persona))
        await self.upstream.open(self.persona, claim)
        await until(lambda: self.of(Ready) or self.error)

    async def speak(self, first: int, last: int) -> None:
        for frame in self.sound[first:last]:
            self.upstream.send_frame(frame)
            await asyncio.sleep(PACE_S)

    async def answered(self, frames: int, timeout_s: float = 30.0) -> None:
        await until(lambda: len(self.heard) >= frames or self.error, timeout_s)

    async def close(self) -> None:
        self.upstream.close()
        await self.upstream.release(1.0)

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def told(self, kind: str) -> list[SessionNotice]:
        return [notice for notice in self.of(SessionNotice) if notice.kind == kind]

    @property
    def error(self) -> Exception | None:
        return next((event.error for event in self.of(Failed)), None)

    @property
    def replica(self) -> str:
        assert self.upstream.handover.current is not None
        return self.upstream.handover.current.replica

    def _hear(self, number: int, pcm: NDArray[np.float32], stale: bool) -> None:
        self.heard.append((number, pcm))


async def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, "waited in vain"
        await asyncio.sleep(0.005)


def alone(machine: Stepper, persona: Persona, sound: NDArray[np.float32]) -> NDArray[np.int64]:
    """The tokens of the session when nothing happens to it: [frames, 17]."""
    slot = machine.admit(persona)
    while machine.prefill() is None:
        pass
    rows = []
    for frame in sound:
        machine.feed(slot, frame)
        rows.append(machine.step()[0].tokens)
    return np.stack(rows)


def assert_unharmed(talker: Talker, machine: Stepper, frames: int) -> None:
    """Every frame was answered once, in order, with the tokens of an uninterrupted session."""
    assert talker.error is None
    assert [number for number, _ in talker.heard] == list(range(frames))
    expected = alone(machine, talker.persona, talker.sound[:frames])
    np.testing.assert_array_equal(talker.upstream.log.tokens, expected)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))  # type: ignore[arg-type]


def memory() -> MemoryEngine:
    return MemoryEngine(2)


async def used(fleet: Fleet, *slots: int) -> None:
    await until(lambda: [one.used for one in fleet.replicas] == list(slots))


async def all_free(fleet: Fleet, lent: Services) -> None:
    await until(lambda: not any(one.used for one in fleet.replicas) and not lent.ending)


def test_three_kills_change_no_token() -> None:
    """At random frames, under a greedy and a sampled session; a dead replica is replaced before the
    next."""
    dice, counted = random.Random(5), Counted()
    kills, between = 3, 16
    frames = (kills + 1) * between  # the last ones show what the last kill cost, whoever was done before it

    async def test() -> None:
        async with fleet_of(2, lambda: engine(2), slots=2) as fleet:
            lent = services(fleet, counted, after_s=5.0)
            talkers = [Talker(lent, PERSONAS[index], speech(index, frames), f"s{index}") for index in (1, 2)]
            for talker in talkers:
                await talker.open()
            for first in range(0, kills * between, between):
                speaking = [asyncio.ensure_future(one.speak(first, first + between)) for one in talkers]
                for talker in talkers:
                    await talker.answered(first + 1)
                await talkers[0].answered(first + dice.randrange(2, 12))
                fleet.kill(next(one for one in fleet.replicas if one.used))
                await asyncio.gather(*speaking)
                for talker in talkers:
                    await until(lambda one=talker, n=first // between: len(one.told(CONTINUED)) > n)
                    await talker.answered(first + between)
                await fleet.add()
            for talker in talkers:
                await talker.speak(frames - between, frames)
            for talker in talkers:
                await talker.answered(frames)
                assert_unharmed(talker, engine(1), frames)
                assert len(talker.told(INTERRUPTED)) == len(talker.told(CONTINUED)) == 3
                await talker.close()
            await all_free(fleet, lent)

    run(test)
    assert counted.totals[(FAILOVERS.name, "continued")] == 6
    for phase in ("detection", "slot", "rebuild", "answer", "gap"):
        assert len(counted.observed[(FAILOVER_SECONDS.name, phase)]) == 6
    assert counted.observed[(FAILOVER_SECONDS.name, "catch_up")]
    assert max(counted.observed[(FAILOVER_SECONDS.name, "gap")]) < 30


async def _talks(fleet: Fleet, counted: Counted, sound: NDArray[np.float32], **lent: Any) -> Talker:
    """A session that has been answered ten times."""
    talker = Talker(services(fleet, counted, after_s=AFTER_S, **lent), PERSONAS[0], sound)
    await talker.open()
    await talker.speak(0, 10)
    await talker.answered(10)
    return talker


@pytest.mark.parametrize("seed", [1, 2])
def test_random_faults_change_no_token(seed: int) -> None:
    """Kills, short and long silences of any replica, cut links, under four sessions on two replicas."""
    dice, counted, frames = random.Random(seed), Counted(), 240

    async def inflict(fleet: Fleet) -> None:
        replica = dice.choice(fleet.replicas)
        fault = dice.choice(["kill", "short", "long", "cut"])
        if fault == "kill":
            fleet.kill(replica)
            await asyncio.sleep(dice.uniform(0, 0.3))
            await fleet.add()
        elif fault == "cut":
            for link in replica.links:
                if link._transport is not None:
                    link._transport.abort()
        else:
            replica.freeze()
            await asyncio.sleep(dice.uniform(0, AFTER_S / 2) if fault == "short" else 2 * AFTER_S)
            replica.thaw()

    async def test() -> None:
        async with fleet_of(2, lambda: MemoryEngine(4), slots=4) as fleet:
            lent = services(fleet, counted, after_s=AFTER_S)
            talkers = [Talker(lent, Persona(), speech(0, frames), f"s{number}") for number in range(4)]
            for talker in talkers:
                await talker.open()
            speaking = [asyncio.ensure_future(talker.speak(0, frames)) for talker in talkers]
            while not speaking[0].done():
                await inflict(fleet)
                await asyncio.sleep(dice.uniform(0.2, 0.6))
            await asyncio.gather(*speaking)
            for talker in talkers:
                await talker.answered(frames)
                assert_unharmed(talker, MemoryEngine(1), frames)
                assert len(talker.told(INTERRUPTED)) == len(talker.told(CONTINUED))
                await talker.close()
            await all_free(fleet, lent)

    run(test)
    assert counted.totals[(FAILOVERS.name, "continued")] >= 4


def test_a_short_silence_is_a_gap() -> None:
    counted = Counted()

    async def test() -> None:
        async with fleet_of(2, memory, slots=2) as fleet:
            talker = await _talks(fleet, counted, speech(0, 40))
            first = fleet.replicas[0]
            first.freeze()
            speaking = asyncio.ensure_future(talker.speak(10, 40))
            await asyncio.sleep(AFTER_S / 2)
            first.thaw()
            await speaking
            await talker.answered(40)
            assert_unharmed(talker, memory(), 40)
            assert not talker.told(INTERRUPTED)
            assert talker.replica == first.name
            await talker.close()

    run(test)
    assert (FAILOVERS.name, "continued") not in counted.totals


def test_a_gateway_that_stood_still_itself_blames_nobody() -> None:
    counted = Counted()

    async def test() -> None:
        async with fleet_of(2, memory, slots=2) as fleet:
            talker = await _talks(fleet, counted, speech(0, 40))
            for frame in talker.sound[10:15]:
                talker.upstream.send_frame(frame)
            await asyncio.sleep(0)
            time.sleep(2 * AFTER_S)  # noqa: ASYNC251  that is the point
            await talker.speak(15, 40)
            await talker.answered(40)
            assert_unharmed(talker, memory(), 40)
            assert not talker.told(INTERRUPTED)
            await talker.close()

    run(test)


def test_a_replica_that_cannot_be_reached_is_asked_once() -> None:
    """Its lease is had, its port is closed; the third one takes the session."""
    counted = Counted()

    async def test() -> None:
        async with fleet_of(3, memory, slots=2) as fleet:
            talker = await _talks(fleet, counted, speech(0, 40))
            first, second, third = fleet.replicas
            second._server.close()
            await second._server.wait_closed()
            fleet.kill(first)
            await talker.speak(10, 40)
            await talker.answered(40)
            assert_unharmed(talker, memory(), 40)
            assert talker.replica == third.name
            assert [second.name in one.excluded for one in fleet.asked[1:]] == [False, True]
            await talker.close()
            await all_free(fleet, talker._lent)

    run(test)


def test_a_replica_that_speaks_another_version_is_left_for_one_that_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rollout: the session was never begun there, so it opens at the next one."""
    spoken = replica_sessions.messages.unpack_opening
    asked: list[bytes] = []

    def refuse_once(payload: bytes) -> Any:
        asked.append(payload)
        if len(asked) == 1:
            raise UnknownVersion("the link speaks version 2, this process 1")
        return spoken(payload)

    monkeypatch.setattr(replica_sessions.messages, "unpack_opening", refuse_once)

    async def test() -> None:
        async with fleet_of(2, memory, slots=2) as fleet:
            talker = await _talks(fleet, Counted(), speech(0, 20))
            assert len(asked) == 2
            assert talker.replica == fleet.replicas[1].name
            assert_unharmed(talker, memory(), 10)
            await talker.close()
            await all_free(fleet, talker._lent)

    run(test)


def test_after_a_long_silence_nothing_of_the_old_replica_is_heard() -> None:
    counted = Counted()

    async def test() -> None:
        async with fleet_of(2, memory, slots=2) as fleet:
            talker = await _talks(fleet, counted, speech(0, 90))
            first, second = fleet.replicas
            first.freeze()
            speaking = asyncio.ensure_future(talker.speak(10, 90))
            await talker.answered(20)
            assert talker.replica == second.name
            first.thaw()
            await speaking
            await talker.answered(90)
            assert_unharmed(talker, memory(), 90)
            await used(fleet, 0, 1)
            assert len(talker.told(INTERRUPTED)) == len(talker.told(CONTINUED)) == 1
            await talker.close()

    run(test)
    assert counted.totals[(FAILOVERS.name, "continued")] == 1


def test_without_another_replica_a_long_silence_is_a_gap_too() -> None:
    counted = Counted()

    async def test() -> None:
        async with fleet_of(1, memory, slots=2) as fleet:
            talker = await _talks(fleet, counted, speech(0, 90))
            (only,) = fleet.replicas
            only.freeze()
            speaking = asyncio.ensure_future(talker.speak(10, 90))
            await until(lambda: talker.told(INTERRUPTED))
            await asyncio.sleep(2 * AFTER_S)
            only.thaw()
            await speaking
            await talker.answered(90)
            assert_unharmed(talker, memory(), 90)
            assert len(talker.told(INTERRUPTED)) == len(talker.told(CONTINUED)) == 1
            await talker.close()
            await used(fleet, 0)

    run(test)
    assert counted.totals[(FAILOVERS.name, "recovered")] == 1


def test_a_search_is_given_up_when_the_old_replica_answers_first() -> None:
    """The other replica took the log and stands still itself: its slot comes back, late answers are
    nobody's."""
    counted = Counted()

    async def test() -> None:
        async with fleet_of(2, memory, slots=2) as fleet:
            talker = await _talks(fleet, counted, speech(0, 90))
            first, second = fleet.replicas
            first.freeze()
            second.freeze()
            speaking = asyncio.ensure_future(talker.speak(10, 90))
            await until(lambda: second.links)
            first.thaw()
            await talker.answered(50)
            assert talker.replica == first.name
            second.thaw()
            await speaking
            await talker.answered(90)
            assert_unharmed(talker, memory(), 90)
            await used(fleet, 1, 0)
            await talker.close()

    run(test)
    assert counted.totals[(FAILOVERS.name, "recovered")] == 1
    assert (FAILOVERS.name, "continued") not in counted.totals


def test_a_replica_that_answers_now_and_then_is_left() -> None:
    """Each answer ends the silence, but it never catches up: the other one goes on from the first frame that
    nobody answered, having run the frames since the log was taken."""
    counted = Counted()

    async def test() -> None:
        async with fleet_of(2, memory, slots=2) as fleet:
            talker = await _talks(fleet, counted, speech(0, 120))
            first, second = fleet.replicas
            first.freeze()
            second.freeze()
            speaking = asyncio.ensure_future(talker.speak(10, 120))
            await until(lambda: second.links)
            await asyncio.sleep(0.1)  # the log is on its way
            for _ in range(3):
                before = len(talker.heard)
                first.thaw()
                await talker.answered(before + 1)
                first.freeze()
            second.thaw()
            await until(lambda: talker.replica == second.name)
            await speaking
            await talker.answered(120)
            first.thaw()
            assert_unharmed(talker, memory(), 120)
            await used(fleet, 0, 1)
            await talker.close()

    run(test)


def test_an_engine_that_fails_is_left_for_another() -> None:
    counted = Counted()

    def broken() -> Any:
        machine = memory()
        step, left = machine.step, 15

        def fail() -> Any:
            nonlocal left
            left -= 1
            if not left:
                raise EngineFault("the device is gone")
            return step()

        machine.step = fail  # type: ignore[method-assign]
        return machine

    async def test() -> None:
        async with fleet_of(0, memory, slots=2) as fleet:
            await fleet.add(broken)
            await fleet.add()
            talker = await _talks(fleet, counted, speech(0, 40))
            await talker.speak(10, 40)
            await talker.answered(40)
            assert_unharmed(talker, memory(), 40)
            assert not fleet.replicas[0].sessions.accepting
            await used(fleet, 0, 1)
            await talker.close()

    run(test)


@pytest.mark.parametrize("silent", [True, False])
def test_a_log_that_is_not_known_is_refused_by_type(silent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session whose replica is only silent stays there; one that is nowhere ends with the refusal."""
    counted = Counted()

    def refuse(data: bytes) -> Any:
        raise UnknownVersion("the session log is of version 2, this process reads 1")

    async def test() -> None:
        async with fleet_of(2, memory, slots=2) as fleet:
            talker = await _talks(fleet, counted, speech(0, 60), queue_timeout_s=1.0)
            monkeypatch.setattr(replica_sessions.SessionLog, "unpack", refuse)
            first = fleet.replicas[0]
            if silent:
                first.freeze()
            else:
                fleet.kill(first)
            speaking = asyncio.ensure_future(talker.speak(10, 60))
            if silent:
                await until(lambda: counted.totals.get((FAILOVERS.name, "refused")))
                first.thaw()
                await speaking
                await talker.answered(60)
                assert_unharmed(talker, memory(), 60)
            else:
                await until(lambda: talker.error)
                assert isinstance(talker.error, UnknownVersion)
                await speaking
            await talker.close()
            await all_free(fleet, talker._lent)

    run(test)
    assert counted.totals[(FAILOVERS.name, "refused")] >= 1


def test_a_session_waits_for_a_replica_and_no_longer_than_it_may() -> None:
    counted = Counted()

    async def test() -> None:
        async with fleet_of(1, memory, slots=2) as fleet:
            talker = await _talks(fleet, counted, speech(0, 90), queue_timeout_s=1.5)
            fleet.kill(fleet.replicas[0])
            speaking = asyncio.ensure_future(talker.speak(10, 90))
            await until(lambda: talker._lent.leases.queued == 1)
            await fleet.add()
            await speaking
            await talker.answered(90)
            assert_unharmed(talker, memory(), 90)
            fleet.kill(fleet.replicas[0])
            await until(lambda: talker.error)
            assert isinstance(talker.error, NoCapacity)
            assert len(talker.of(Failed)) == 1
            await talker.close()

    run(test)
    assert counted.totals[(FAILOVERS.name, "no_capacity")] == 1


def test_the_end_of_the_service_is_no_failover() -> None:
    """Replicas close their sessions and gateways their queues, in any order."""
    for leases_first in (True, False):
        counted = Counted()

        async def test(leases_first: bool = leases_first, counted: Counted = counted) -> None:
            async with fleet_of(2, memory, slots=2) as fleet:
                talker = await _talks(fleet, counted, speech(0, 20))
                close = [talker._lent.leases.close, *(one.sessions.close for one in fleet.replicas)]
                for step in close if leases_first else reversed(close):
                    step()
                    await asyncio.sleep(0.05)
                await until(lambda: talker.error)
                assert isinstance(talker.error, SessionLost)
                assert "stopped" in str(talker.error)
                await talker.close()
                await all_free(fleet, talker._lent)

        run(test)
        assert not [key for key in counted.totals if key[0] == FAILOVERS.name]


def test_a_session_that_kills_every_replica_is_ended() -> None:
    counted = Counted()
    killed: list[LoopbackReplica] = []

    async def test() -> None:
        async with fleet_of(1, memory, slots=2) as fleet:
            talker = await _talks(fleet, counted, speech(0, 20))

            async def poisoned() -> None:
                while not talker.error:
                    for replica in [one for one in fleet.replicas if one.sessions.holders.open]:
                        fleet.kill(replica)
                        killed.append(replica)
                        await fleet.add()
                    await asyncio.sleep(0.005)

            await asyncio.gather(poisoned(), talker.speak(10, 20))
            assert isinstance(talker.error, RepeatedlyLost), "nobody may come back to it"
            await talker.close()

    run(test)
    assert len(killed) <= 2 * LOST_LIMIT + 2


def test_a_replica_lost_before_the_slot_was_ready_costs_nobody_anything() -> None:
    async def test() -> None:
        async with fleet_of(2, memory, slots=2) as fleet:
            talker = Talker(services(fleet, Counted(), after_s=AFTER_S), PERSONAS[1], speech(1, 20))
            fleet.replicas[0].freeze()
            opening = asyncio.ensure_future(talker.open())
            await talker.speak(0, 5)
            fleet.kill(fleet.replicas[0])
            await opening
            await talker.speak(5, 20)
            await talker.answered(20)
            assert_unharmed(talker, memory(), 20)
            assert len(talker.of(Ready)) == 1
            assert not talker.told(INTERRUPTED)
            await talker.close()

    run(test)


def test_of_sessions_lost_together_the_shortest_get_the_slots_that_are_left() -> None:
    async def test() -> None:
        async with fleet_of(2, lambda: MemoryEngine(4), slots=4) as fleet:
            lent = services(fleet, Counted(), after_s=5.0, queue_timeout_s=1.0)
            talkers = [Talker(lent, Persona(), speech(0, 40), f"s{number}") for number in range(6)]
            for talker in talkers:
                await talker.open()
            lengths = (30, 5, 20, 10)  # of those on the first replica
            await asyncio.gather(
                *(one.speak(0, frames) for one, frames in zip(talkers, lengths, strict=False))
            )
            for talker, frames in zip(talkers, lengths, strict=False):
                await talker.answered(frames)
            fleet.kill(fleet.replicas[0])
            await until(lambda: sum(one.error is not None for one in talkers) == 2)
            assert [one.error is not None for one in talkers] == [True, False, True, False, False, False]
            for talker in talkers:
                await talker.close()

    run(test)


def test_who_leaves_during_a_failover_leaves_nothing() -> None:
    async def test() -> None:
        for wait_s in (0.0, 0.01, 0.03, 0.1):
            async with fleet_of(2, memory, slots=2) as fleet:
                talker = await _talks(fleet, Counted(), speech(0, 20))
                fleet.replicas[1].freeze()
                fleet.kill(fleet.replicas[0])
                await asyncio.sleep(wait_s)
                await talker.close()
                fleet.replicas[0].thaw()
                await all_free(fleet, talker._lent)
                await asyncio.sleep(0.01)
                assert talker.error is None

    run(test)


def test_replies_out_of_order_are_a_fault_of_the_replica() -> None:
    async def test() -> None:
        async with fleet_of(2, memory, slots=2) as fleet:
            talker = await _talks(fleet, Counted(), speech(0, 30))
            first = fleet.replicas[0]
            (holder,) = first.sessions.holders.open.values()
            assert holder.link is not None
            holder.link.send(MessageKind.REPLY, _reply(12))
            await talker.speak(10, 30)
            await talker.answered(30)
            assert [number for number, _ in talker.heard] == list(range(30))
            assert talker.replica == fleet.replicas[1].name
            await used(fleet, 0, 1)
            await talker.close()

    run(test)


def _reply(frame: int) -> bytes:
    from deployments.wire.messages import Reply, pack_reply

    return pack_reply(Reply(frame, np.zeros(1_920, np.float32), np.zeros(17, np.int64), "", 0))


def test_a_frame_whose_sound_is_not_known_shortens_the_kept_sound() -> None:
    async def test() -> None:
        async with fleet_of(1, memory, slots=2) as fleet:
            talker = await _talks(fleet, Counted(), speech(0, 30))
            recorder = talker.upstream.progress.recorder
            assert recorder is not None
            assert recorder.log().frames == len(recorder.log().sound) == 10
            talker.upstream.send_frame(talker.sound[10])
            talker.upstream.progress.unanswered.clear()
            await talker.answered(11)
            with pytest.raises(LogRefused):
                recorder.log()
            await talker.speak(11, 13)
            await talker.answered(13)
            assert (recorder.log().frames, len(recorder.log().sound)) == (13, 2)
            assert len(recorder.sound_since(11)) == 2
            with pytest.raises(LogRefused):
                recorder.sound_since(10)
            await talker.close()

    run(test)
