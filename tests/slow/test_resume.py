"""A session whose client or gateway was lost goes on when its client comes back: in one process, with real
links, sessions and engines."""

from __future__ import annotations

import asyncio
import types
from typing import Any, cast

import numpy as np
import pytest
from loopback import TOKENS, Counted, Fleet, fleet_of, services
from numpy.typing import NDArray
from sessions import PERSONAS, speech
from test_failover import PACE_S, Talker, alone, memory, run, until, used

from deployments.gateway.handover import CONTINUED
from deployments.gateway.resumes import Own, Taken
from deployments.gateway.resumption import Resumption
from deployments.gateway.services import Services
from deployments.gateway.stats import SessionStats
from deployments.gateway.upstream import Upstream
from deployments.metrics import Metrics
from deployments.wire.messages import LeaseRequest
from deployments.wire.tokens import ResumeClaim
from personaplex.errors import NoCapacity, ResumeRefused, SessionLost, SessionTaken
from personaplex.persona import Persona
from personaplex.session.events import Ready
from personaplex.sessionlog import SessionLog

NAME = "5e" * 16
SOUND = speech(3, 60)


class Caller(Talker):
    """A talker that can come back."""

    def __init__(self, lent: Services, sound: NDArray[np.float32] = SOUND, name: str = NAME) -> None:
        super().__init__(lent, PERSONAS[0], sound, name)
        stats = SessionStats(name, lent.metrics, None)
        self.upstream = Upstream(name, lent, stats, self.events.append, self._hear, resumable=True)

    @property
    def token(self) -> str:
        """The newest it was given."""
        continued = [notice.data for notice in self.told(CONTINUED)]
        details: list[Any] = [*(event.details for event in self.of(Ready)), *continued]
        return str(details[-1]["resume"])

    def lose_client(self) -> None:
        """As a conversation does whose socket was cut."""
        self.upstream.detach()
        self.upstream.close()

    def lose_gateway(self) -> None:
        """SIGKILL: the link is cut, without a word."""
        self.upstream.stop()
        for slot in self.upstream.handover.slots:
            assert slot._link is not None
            assert slot._link._transport is not None
            slot._link._transport.abort()

    async def come_back(self, token: str, heard: int) -> Taken:
        assert self._lent.resumes is not None
        taken = await self._lent.resumes.take(token)
        claim = await self._lent.leases.claim(LeaseRequest.of(self._name, self.persona))
        await self.upstream.go_on(taken, heard, heard, claim)
        await until(lambda: self.of(Ready) or self.error)
        assert self.error is None
        return taken


async def talked(lent: Services, frames: int, name: str = NAME) -> Caller:
    """A session whose first `frames` frames were answered."""
    caller = Caller(lent, name=name)
    await caller.open()
    await caller.speak(0, frames)
    await caller.answered(frames)
    return caller


def assert_whole(first: Caller, second: Caller, frames: int) -> None:
    """Both together are one uninterrupted session."""
    expected = alone(memory(), first.persona, SOUND[:frames])
    np.testing.assert_array_equal(second.upstream.log.tokens, expected)
    numbers = [number for number, _ in second.heard]
    assert numbers == list(range(numbers[0], frames))


async def both(lent: Services, other: Services, lose: str, *, frames: int = 20) -> tuple[Caller, Caller, Any]:
    """A session that is lost after `frames` frames and goes on at `other`."""
    first = await talked(lent, frames)
    token = first.token
    getattr(first, lose)()
    await first.upstream.release(1.0)
    second = Caller(other)
    await second.come_back(token, frames - 3)
    return first, second, token


@pytest.mark.parametrize("lose", ["lose_client", "lose_gateway"])
def test_a_session_goes_on_at_another_gateway(lose: str) -> None:
    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            lent, other = (services(fleet, Counted(), after_s=5.0) for _ in range(2))
            first, second, token = await both(lent, other, lose)
            details = second.of(Ready)[0].details
            assert details["resumed"] == {"frame": 20, "lost_frames": 3, "lost_text": ""}
            assert details["resume"] != token
            await second.speak(20, 40)
            await second.answered(20)
            assert_whole(first, second, 40)
            await second.close()
            await used(fleet, 0)
            assert len(fleet.replicas[0].sessions.comebacks.kept) == 0

    run(test)


def test_a_detached_session_holds_no_slot_and_is_gone_after_the_grace() -> None:
    async def test() -> None:
        async with fleet_of(1, memory, resume_grace_s=0.5) as fleet:
            lent = services(fleet, Counted(), after_s=5.0, grace_s=0.5)
            caller = await talked(lent, 5)
            caller.lose_client()
            await caller.upstream.release(1.0)
            await used(fleet, 0)
            (status,) = fleet.replicas[0].sessions.comebacks.kept.statuses
            assert status.session == NAME
            others = [Caller(lent, name=f"{number:032x}") for number in range(2)]
            for one in others:
                await one.open()
            await used(fleet, 2)
            await until(lambda: not len(fleet.replicas[0].sessions.comebacks.kept))
            with pytest.raises(ResumeRefused):
                await Caller(lent).come_back(caller.token, 5)
            for one in others:
                await one.close()

    run(test)


def test_who_hangs_up_is_not_kept() -> None:
    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            caller = await talked(lent, 5)
            await caller.close()
            stranger = Talker(lent, Persona(), SOUND, "ab" * 16)  # it never asked
            await stranger.open()
            await stranger.speak(0, 5)
            await stranger.answered(5)
            assert "resume" not in stranger.of(Ready)[0].details
            assert stranger.upstream.handover.current is not None
            assert stranger.upstream.handover.current._link is not None
            assert stranger.upstream.handover.current._link._transport is not None
            stranger.upstream.stop()
            stranger.upstream.handover.current._link._transport.abort()
            await used(fleet, 0)
            assert len(fleet.replicas[0].sessions.comebacks.kept) == 0
            with pytest.raises(ResumeRefused):
                await Caller(lent).come_back(caller.token, 5)

    run(test)


def test_a_session_that_looks_alive_is_taken_over() -> None:
    async def test() -> None:
        async with fleet_of(2, memory) as fleet:
            lent, other = (services(fleet, Counted(), after_s=5.0) for _ in range(2))
            first = await talked(lent, 20)
            second = Caller(other)
            await second.come_back(first.token, 20)
            await until(lambda: first.error)
            assert isinstance(first.error, SessionTaken)
            await first.close()
            await second.speak(20, 40)
            await second.answered(20)
            assert_whole(first, second, 40)
            await second.close()

    run(test)


def test_a_token_is_good_for_one_resume() -> None:
    async def test() -> None:
        async with fleet_of(2, memory) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            first, second, token = await both(lent, lent, "lose_client")
            await second.speak(20, 25)  # it has its new one
            await second.answered(5)
            forged = TOKENS.make(ResumeClaim(NAME, 7))
            foreign = TOKENS.make(ResumeClaim("0" * 32, 1))
            for bad in (token, forged, foreign, "x", token[:-2] + "AA"):
                with pytest.raises(ResumeRefused, match=r"^expired$"):
                    await Caller(lent).come_back(bad, 0)
            assert second.error is None, "no bad token disturbs it"
            third = Caller(lent)
            second.lose_gateway()
            await third.come_back(second.token, 25)
            await third.speak(25, 30)
            await third.answered(5)
            assert_whole(first, third, 30)
            await third.close()

    run(test)


def test_until_a_client_is_heard_its_old_token_is_good() -> None:
    """Its connection was lost again before it got the new one."""

    async def test() -> None:
        async with fleet_of(2, memory) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            first, second, token = await both(lent, lent, "lose_client")
            second.lose_client()
            await second.upstream.release(1.0)
            third = Caller(lent)
            await third.come_back(token, 20)
            await third.speak(20, 30)
            await third.answered(10)
            assert_whole(first, third, 30)
            await third.close()

    run(test)


def test_a_gateway_that_is_lost_while_it_takes_a_session_costs_nothing() -> None:
    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            first = await talked(lent, 20)
            first.lose_gateway()
            assert lent.resumes is not None
            await until(lambda: len(fleet.replicas[0].sessions.comebacks.kept))
            await lent.resumes.take(first.token)  # nothing comes of it
            (await lent.resumes.take(first.token)).give_back()
            second = Caller(lent)
            await second.come_back(first.token, 20)
            await second.speak(20, 30)
            await second.answered(10)
            assert_whole(first, second, 30)
            await second.close()

    run(test)


def test_where_the_replica_is_gone_too_the_gateways_own_log_will_do() -> None:
    async def test() -> None:
        async with fleet_of(2, memory) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            first = await talked(lent, 20)
            first.lose_client()
            await first.upstream.release(1.0)
            fleet.kill(fleet.replicas[0])
            second = Caller(lent)
            await second.come_back(first.token, 20)
            await second.speak(20, 30)
            await second.answered(10)
            assert_whole(first, second, 30)
            with pytest.raises(ResumeRefused):
                await Caller(lent).come_back(first.token, 20)
            await second.close()

    run(test)


def test_after_a_failover_both_tokens_are_good_and_the_newest_slot_is_asked() -> None:
    async def test() -> None:
        async with fleet_of(2, memory) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            first = await talked(lent, 20)
            old = first.token
            fleet.kill(fleet.replicas[0])
            await until(lambda: first.told(CONTINUED) or first.error)
            assert first.token != old
            await first.speak(20, 30)
            await first.answered(30)
            first.lose_gateway()
            await until(lambda: len(fleet.replicas[0].sessions.comebacks.kept))
            second = Caller(lent)
            await second.come_back(old, 30)
            await second.speak(30, 40)
            await second.answered(10)
            assert_whole(first, second, 40)
            await second.close()

    run(test)


@pytest.mark.parametrize("missing", ["secret", "replicas"])
def test_while_nobody_can_tell_a_client_is_asked_to_come_again(missing: str) -> None:
    """A gateway that took a dead one's place, before it has heard from the fleet: 410 would be the end."""

    class Empty(Fleet):
        async def describe(self) -> list[Any]:
            return []

    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            first = await talked(lent, 5)
            first.lose_gateway()
            await until(lambda: len(fleet.replicas[0].sessions.comebacks.kept))
            young = services(fleet, Counted(), after_s=5.0)
            assert young.resumes is not None
            if missing == "secret":
                young.resumes._secrets = tuple
            else:
                young.resumes._fleet = Empty(memory)
            with pytest.raises(SessionLost):
                await young.resumes.take(first.token)
            second = Caller(lent)
            await second.come_back(first.token, 5)
            await second.close()

    run(test)


def test_what_the_agent_said_and_nobody_heard_is_told() -> None:
    class Speaking(type(memory())):  # type: ignore[misc]
        def step(self) -> Any:
            import dataclasses

            return [dataclasses.replace(out, text=f" {out.frame}") for out in super().step()]

    async def test() -> None:
        async with fleet_of(1, lambda: Speaking(2)) as fleet:
            lent = services(fleet, Counted(), after_s=5.0)
            for lose in ("lose_client", "lose_gateway"):
                _, second, _ = await both(lent, lent, lose)
                assert second.of(Ready)[0].details["resumed"]["lost_text"] == " 17 18 19"
                await second.close()
                await asyncio.sleep(PACE_S)

    run(test)


@pytest.mark.parametrize(("read", "told"), [(17, " 17 18"), (16, " 16 17 18")])
def test_text_that_was_lost_without_its_page_is_told(read: int, told: str) -> None:
    """A frame's text follows its page; a connection may be cut between the two."""
    texts = [(n, f" {n}") for n in range(19)]
    log = cast(SessionLog, types.SimpleNamespace(frames=20))
    taken = Taken("s", 1, log, 1, texts, confirm=lambda: None, give_back=lambda: None)
    resumption = Resumption("s", None, cast(Metrics, Counted()), cast(Own, None))
    details = resumption.go_on(taken, heard=17, read=read)
    assert details == {"frame": 20, "lost_frames": 3, "lost_text": told}


def test_a_session_that_finds_no_slot_after_its_replica_was_lost_is_there_for_its_client() -> None:
    """Its gateway holds the only copy. Before a slot is free, a try that waits in vain costs nothing."""

    async def test() -> None:
        async with fleet_of(1, memory) as fleet:
            lent, other = (services(fleet, Counted(), after_s=5.0, queue_timeout_s=0.6) for _ in range(2))
            first = await talked(lent, 20)
            fleet.kill(fleet.replicas[0])
            await until(lambda: first.error)
            assert isinstance(first.error, NoCapacity)
            first.lose_client()  # as its conversation does after such an end
            await first.upstream.release(1.0)
            second = Caller(lent)
            assert lent.resumes is not None
            taken = await lent.resumes.take(first.token)
            claim = await lent.leases.claim(LeaseRequest.of(NAME, second.persona))
            with pytest.raises(NoCapacity):
                await second.upstream.go_on(taken, 20, 20, claim)
            second.lose_client()
            await fleet.add()
            assert other.resumes is not None
            with pytest.raises(SessionLost):  # not 410: its own gateway may be tried next
                await other.resumes.take(first.token)
            third = Caller(lent)
            await third.come_back(first.token, 20)
            await third.speak(20, 30)
            await third.answered(10)
            assert_whole(first, third, 30)
            with pytest.raises(ResumeRefused):
                await Caller(lent).come_back(first.token, 20)
            await third.close()
            await used(fleet, 0)

    run(test)
