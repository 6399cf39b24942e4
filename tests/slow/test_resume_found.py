"""A client that comes back finds its session, whatever the fleet has heard and wherever the session is just
then: at its first frame, on its way to another replica, or taken by a connection that was lost in turn."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Callable

import pytest
from loopback import KEYRING, TOKENS, Counted, Fleet, MemoryEngine, fleet_of, link, services
from test_failover import memory, run, until, used
from test_resume import NAME, Caller, assert_whole, talked

from deployments.gateway.handover import CONTINUED
from deployments.gateway.resumes import LOOK_ELSEWHERE_S, LOOK_EVERY_S, LOOK_FOR_S, Resumes
from deployments.gateway.services import Services
from deployments.wire.messages import Held, LeaseRequest, ReplicaStatus
from deployments.wire.tokens import ResumeClaim
from deployments.wire.whereabouts import Whereabouts
from personaplex.engine.interface import Slot
from personaplex.errors import ResumeRefused, SessionLost, SessionTaken
from personaplex.persona import own_voice
from personaplex.session.events import Ready

VOICE = b"a voice"


class LateFleet:
    """What the fleet says of sessions, of which it has heard only after `looks` questions. `away`: it does
    not answer."""

    away = False

    def __init__(self, fleet: Fleet, looks: float) -> None:
        self._fleet, self._looks = fleet, looks
        self.asked = 0

    async def describe(self) -> list[ReplicaStatus]:
        self.asked += 1
        known = await self._fleet.describe()
        if self.asked > self._looks:
            return known
        return [dataclasses.replace(one, sessions=(), detached=()) for one in known]

    async def look_up(self, session: str) -> Whereabouts | None:
        return None if self.away else await self._fleet.look_up(session)

    def use_tokens(self, session: str, good_from: int, valid_s: float) -> None:
        self._fleet.use_tokens(session, good_from, valid_s)

    def keep_session(self, session: str, held: Held, generation: int, valid_s: float) -> None:
        self._fleet.keep_session(session, held, generation, valid_s)


class Clock:
    """Time that passes in sleep only."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


def gateway(fleet: Fleet, looks: float = 0.0) -> tuple[Services, LateFleet, Clock]:
    """One that asks a late fleet, and its time."""
    late, clock = LateFleet(fleet, looks), Clock()
    resumes = Resumes(30.0, lambda: KEYRING.secrets, late, link, clock=clock, sleep=clock.sleep)
    return dataclasses.replace(services(fleet, Counted(), after_s=5.0), resumes=resumes), late, clock


async def go_on(lent: Services, first: Caller, token: str, frames: int) -> Caller:
    """The session's client comes back to `lent`, and the session is whole."""
    second = Caller(lent)
    await second.come_back(token, frames)
    await second.speak(frames, frames + 10)
    await second.answered(10)
    assert_whole(first, second, frames + 10)
    return second


@pytest.mark.parametrize("lose", ["lose_client", "lose_gateway"])
@pytest.mark.parametrize("same", [True, False], ids=["same gateway", "another gateway"])
def test_a_session_that_is_lost_before_its_first_frame_goes_on(lose: str, same: bool) -> None:
    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            lent, other = (services(fleet, Counted(), after_s=5.0) for _ in range(2))
            first = Caller(lent)
            await first.open()
            getattr(first, lose)()
            second = await go_on(lent if same else other, first, first.token, 0)
            assert second.of(Ready)[0].details["resumed"] == {"frame": 0, "lost_frames": 0, "lost_text": ""}
            await second.close()

    run(test)


def test_before_its_first_frame_a_session_keeps_the_voice_that_it_brought() -> None:
    async def test() -> None:
        async with fleet_of(2, memory) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            first = Caller(lent)
            first.persona = dataclasses.replace(
                first.persona, voice=own_voice(hashlib.sha256(VOICE).hexdigest()), own=VOICE
            )
            await first.open()
            first.lose_gateway()
            second = Caller(lent)
            second.persona = first.persona
            await second.come_back(first.token, 0)
            assert second.upstream.progress.recorder is not None
            assert second.upstream.progress.recorder.persona.own == VOICE
            fleet.kill(next(one for one in fleet.replicas if one.used))  # it is opened once more
            await until(lambda: second.told(CONTINUED) or second.error)
            assert second.error is None
            assert second.upstream.progress.recorder.log().voice == VOICE
            await second.close()

    run(test)


@pytest.mark.parametrize("frames", [0, 5])
@pytest.mark.parametrize("noticed", [True, False], ids=["the cut was noticed", "it was not"])
def test_a_gateways_own_session_needs_no_fleet_to_be_found(frames: int, noticed: bool) -> None:
    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            lent, late, _ = gateway(fleet, looks=float("inf"))
            first = await talked(lent, frames)
            if noticed:
                first.lose_client()
            second = await go_on(lent, first, first.token, frames)
            assert late.asked == 1
            assert noticed or isinstance(first.error, SessionTaken)
            await second.close()
            await used(fleet, 0)
            assert len(fleet.replicas[0].sessions.comebacks.kept) == 0, "the replica's copy went too"

    run(test)


def test_where_the_fleet_knows_nothing_and_the_replica_is_gone_the_gateways_log_will_do() -> None:
    async def test() -> None:
        async with fleet_of(2, memory) as fleet:
            lent, _, _ = gateway(fleet, looks=float("inf"))
            first = await talked(lent, 5)
            first.lose_client()
            fleet.kill(fleet.replicas[0])
            second = await go_on(lent, first, first.token, 5)
            assert second.error is None
            await second.close()

    run(test)


def test_another_gateway_looks_again_until_the_fleet_has_heard() -> None:
    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            lent, _, _ = gateway(fleet)
            first = await talked(lent, 5)
            first.lose_gateway()
            other, late, clock = gateway(fleet, looks=3)
            second = await go_on(other, first, first.token, 5)
            assert (late.asked, clock.now) == (4, 3 * LOOK_EVERY_S)
            await second.close()

    run(test)


def test_it_looks_for_a_bounded_time_and_not_at_all_for_what_cannot_be_good() -> None:
    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            lent, late, clock = gateway(fleet)
            first = await talked(lent, 5)
            old = first.token
            first.lose_client()
            second = await go_on(lent, first, old, 5)

            async def refused(token: str) -> tuple[int, float]:
                late.asked, clock.now = 0, 0.0
                assert lent.resumes is not None
                with pytest.raises(ResumeRefused, match=r"^expired$"):
                    await lent.resumes.take(token)
                return late.asked, clock.now

            nowhere = TOKENS.make(ResumeClaim("0" * 32, 0))
            assert await refused(nowhere) == (1 + LOOK_FOR_S / LOOK_EVERY_S, LOOK_FOR_S)
            assert await refused(old[:-2] + "AA") == (0, 0.0), "forged"
            assert await refused(old) == (1, 0.0), "used"
            assert second.error is None, "no bad token disturbs it"
            await second.close()

    run(test)


def test_whichever_token_of_two_moves_a_client_has_got_it_is_good() -> None:
    """Each move sends a new one; the connection may be cut before any of them."""

    async def test() -> None:
        for got in range(3):
            async with fleet_of(2, memory) as fleet:
                lent, other = (services(fleet, Counted(), after_s=5.0) for _ in range(2))
                first = await talked(lent, 5)
                tokens = [first.token]
                for _ in range(2):
                    await first.upstream.handover.move()
                    tokens.append(first.token)
                first.lose_gateway()
                second = await go_on(other, first, tokens[got], 5)
                for token in tokens:
                    with pytest.raises(ResumeRefused):
                        await Caller(other).come_back(token, 5)
                await second.close()

    run(test)


def held_up(gate: asyncio.Event) -> Callable[[], MemoryEngine]:
    """Engines whose rebuilds wait for `gate`."""

    class HeldUp(MemoryEngine):
        def prefill(self) -> Slot | None:
            return super().prefill() if gate.is_set() else None

    return lambda: HeldUp(2)


@pytest.mark.parametrize("same", [True, False], ids=["same gateway", "another gateway"])
def test_a_client_that_is_back_while_its_session_is_moved_loses_nothing(same: bool) -> None:
    """The new slot is of a newer generation, but knows only what was said when the move began."""

    async def test() -> None:
        gate = asyncio.Event()
        async with fleet_of(1, memory) as fleet:
            lent, other = (services(fleet, Counted(), after_s=5.0) for _ in range(2))
            first = await talked(lent, 5)
            await fleet.add(held_up(gate))
            moving = asyncio.ensure_future(first.upstream.handover.move())
            await until(lambda: fleet.replicas[1].sessions.holders.open)
            await first.speak(5, 20)
            await first.answered(20)
            second = await go_on(lent if same else other, first, first.token, 20)
            await until(lambda: first.error)
            assert isinstance(first.error, SessionTaken)
            await moving
            await first.close()
            gate.set()
            await used(fleet, 1, 0)
            await second.close()

    run(test)


def test_a_client_that_is_back_while_its_session_has_no_replica_loses_nothing() -> None:
    """A machine has died with the replica and with what held the client's socket."""

    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            first = await talked(lent, 5)
            fleet.kill(fleet.replicas[0])
            await until(lambda: first.upstream.handover._failover is not None)
            second = Caller(lent)
            coming = asyncio.ensure_future(second.come_back(first.token, 5))
            await until(lambda: first.error)
            await fleet.add()
            await coming
            await second.speak(5, 15)
            await second.answered(10)
            assert_whole(first, second, 15)
            await second.close()
            await used(fleet, 0)

    run(test)


def test_a_session_that_is_being_brought_back_is_not_refused_for_good() -> None:
    """Another gateway holds its client's old connection, and has only the new slot, which is not ready."""

    async def test() -> None:
        gate = asyncio.Event()
        async with fleet_of(1, memory) as fleet:
            lent, other = (services(fleet, Counted(), after_s=5.0) for _ in range(2))
            first = await talked(lent, 5)
            await fleet.add(held_up(gate))
            rebuilds = fleet.replicas[1].sessions._rebuilds
            rebuilds._limit = 0  # others are before it
            fleet.kill(fleet.replicas[0])
            await until(lambda: rebuilds._waiting)
            assert other.resumes is not None
            with pytest.raises(SessionLost):
                await other.resumes.take(first.token)
            rebuilds._limit = 1
            rebuilds._start_next()
            second = Caller(other)
            coming = asyncio.ensure_future(second.come_back(first.token, 5))
            await until(lambda: first.error)
            gate.set()
            await coming
            await second.speak(5, 15)
            await second.answered(10)
            assert_whole(first, second, 15)
            await second.close()
            await first.close()
            await used(fleet, 0)

    run(test)


@pytest.mark.parametrize("noticed", [True, False], ids=["the second cut was noticed", "it was not"])
@pytest.mark.parametrize("same", [True, False], ids=["same gateway", "another gateway"])
def test_a_client_that_is_lost_again_while_it_comes_back_may_show_the_same_token(
    noticed: bool, same: bool
) -> None:
    async def test() -> None:
        gate = asyncio.Event()
        async with fleet_of(1, memory) as fleet:
            lent, other = (services(fleet, Counted(), after_s=5.0) for _ in range(2))
            first = await talked(lent, 20)
            token = first.token
            first.lose_gateway()
            await until(lambda: len(fleet.replicas[0].sessions.comebacks.kept))
            fleet.replicas[0].sessions.accepting = False
            await fleet.add(held_up(gate))
            second = Caller(lent)
            assert lent.resumes is not None
            taken = await lent.resumes.take(token)
            claim = await lent.leases.claim(LeaseRequest.of(NAME, second.persona))
            await second.upstream.go_on(taken, 20, 20, claim)
            await until(lambda: fleet.replicas[1].sessions.holders.open)
            if noticed:
                second.lose_client()
            third = Caller(lent if same else other)
            coming = asyncio.ensure_future(third.come_back(token, 20))
            if not noticed:
                await until(lambda: second.error)
                assert isinstance(second.error, SessionTaken)
            gate.set()
            await coming
            await third.speak(20, 30)
            await third.answered(10)
            assert_whole(first, third, 30)
            with pytest.raises(ResumeRefused):
                await Caller(other).come_back(token, 20)
            assert third.error is None
            await second.close()
            await third.close()
            await used(fleet, 0, 0)

    run(test)


def test_of_two_who_take_a_session_at_the_same_time_one_goes_on() -> None:
    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            lent, other = (services(fleet, Counted(), after_s=5.0) for _ in range(2))
            first = await talked(lent, 5)
            first.lose_client()
            assert lent.resumes is not None
            taken = await lent.resumes.take(first.token)
            second = await go_on(other, first, first.token, 5)
            await until(lambda: taken.lost)
            late = Caller(lent)
            claim = await lent.leases.claim(LeaseRequest.of(NAME, late.persona))
            with pytest.raises(SessionTaken):
                await late.upstream.go_on(taken, 5, 5, claim)
            claim.give_up()
            assert second.error is None
            await second.close()
            await used(fleet, 0)

    run(test)


def test_a_gateway_ends_its_session_at_the_word_of_who_may_and_of_nobody_else() -> None:
    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            first = await talked(lent, 5)
            assert lent.resumes is not None
            for other in ("x", TOKENS.make(ResumeClaim(NAME, 1)), TOKENS.make(ResumeClaim("0" * 32, 0))):
                lent.resumes.free(other)
            assert first.error is None
            lent.resumes.free(first.token)
            assert isinstance(first.error, SessionTaken)
            second = await go_on(lent, first, first.token, 5)
            assert second.error is None
            await second.close()

    run(test)


@pytest.mark.parametrize("over", [False, True], ids=["while it goes on", "after its end"])
@pytest.mark.parametrize("copy", ["gateway", "replica"])
def test_a_copy_that_was_left_behind_takes_no_used_token(copy: str, over: bool) -> None:
    """Whatever the fleet has heard of the session, which goes on at another replica by another gateway."""

    async def test() -> None:
        async with fleet_of(2, memory) as fleet:
            lent, _, _ = gateway(fleet, looks=float("inf") if copy == "gateway" else 0)
            other, _, _ = gateway(fleet)
            first = await talked(lent, 5)
            token = first.token
            first.lose_client()
            kept = fleet.replicas[0].sessions.comebacks
            await until(lambda: len(kept.kept))
            if copy == "replica":  # it never hears that the session goes on elsewhere
                kept.answer = lambda link, kind: None  # type: ignore[method-assign]
            fleet.replicas[0].sessions.accepting = False
            second = await go_on(other, first, token, 5)
            await until(lambda: (copy == "replica") == bool(len(kept.kept)))
            if over:
                await second.close()
                await used(fleet, 0, 0)
            assert lent.resumes is not None
            assert (len(lent.resumes._kept) == 1) is (copy == "gateway" or len(kept.kept) == 1)
            for gate in (lent, other):
                assert gate.resumes is not None
                with pytest.raises(ResumeRefused, match=r"^expired$"):
                    await gate.resumes.take(token)
            if not over:
                await second.speak(15, 20)
                await second.answered(15)
                assert_whole(first, second, 20)
                await second.close()

    run(test)


def test_while_the_fleet_is_away_only_a_replica_gives_a_session() -> None:
    """Whether our own copy is the newest, nobody can tell."""

    async def test() -> None:
        async with fleet_of(2, memory) as fleet:
            lent, late, _ = gateway(fleet, looks=float("inf"))
            first = await talked(lent, 5)
            first.lose_client()
            late.away = True
            assert lent.resumes is not None
            taken = await lent.resumes.take(first.token)
            taken.give_back()
            fleet.kill(fleet.replicas[0])
            with pytest.raises(SessionLost):
                await lent.resumes.take(first.token)
            late.away = False
            second = await go_on(lent, first, first.token, 5)
            await second.close()

    run(test)


def test_a_session_that_another_gateway_keeps_is_not_looked_for_long() -> None:
    async def test() -> None:
        async with fleet_of(2, memory) as fleet:
            lent, _, _ = gateway(fleet)
            first = await talked(lent, 5)
            first.lose_client()
            fleet.kill(fleet.replicas[0])
            other, _, clock = gateway(fleet)
            assert other.resumes is not None
            with pytest.raises(SessionLost):
                await other.resumes.take(first.token)
            assert clock.now == LOOK_ELSEWHERE_S
            second = await go_on(lent, first, first.token, 5)
            await second.close()

    run(test)
