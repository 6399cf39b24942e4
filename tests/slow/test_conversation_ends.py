"""However a session ends, everything it held is given back, and its client is told why."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from typing import Any, cast

import pytest
from clients import carrier
from conversations import (
    Caller,
    Silence,
    Slot,
    Spy,
    claim_of,
    converse,
    services_of,
)
from ray.exceptions import ActorDiedError, ActorUnavailableError
from starlette.websockets import WebSocket

from deployments.gateway import conversation as conversation_module
from deployments.gateway.conversation import Conversation
from deployments.gateway.leases import Claim
from deployments.gateway.protocols import moshi
from deployments.gateway.protocols.carriers import TWILIO, CarrierTranslator
from deployments.gateway.protocols.translator import Begin
from deployments.gateway.upstream import Upstream
from deployments.wire.messages import Grant
from personaplex.errors import (
    ClientError,
    EngineFault,
    NoCapacity,
    PersonaplexError,
    RepeatedlyLost,
    SessionExpired,
    SessionLost,
    SessionTaken,
)
from personaplex.persona import Persona
from personaplex.session.core import IllegalEvent, Limits


def test_a_replica_that_does_not_answer_costs_a_lease_and_not_the_session() -> None:
    async def run() -> None:
        deaf, good = Spy(), Spy()
        tries = [deaf, good]

        async def connect(*_: Any) -> Any:
            if tries.pop(0) is deaf:
                await asyncio.Event().wait()
            return good

        conversation = Conversation(cast(WebSocket, Silence()), "s", services_of(connect, good))
        handler = asyncio.ensure_future(conversation.run(Persona(), claim_of(deaf)))
        await asyncio.wait_for(good.connected.wait(), 5)
        assert deaf.released.is_set()
        assert not good.released.is_set()
        handler.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handler
        await asyncio.wait_for(good.released.wait(), 5)

    asyncio.run(run())


def test_replicas_that_do_not_answer_are_a_lost_session() -> None:
    async def run() -> None:
        spies, caller = [Spy(), Spy()], Caller()

        async def connect(*_: Any) -> Any:
            await asyncio.Event().wait()

        conversation = Conversation(cast(WebSocket, caller), "s", services_of(connect, spies[1]))
        handler = asyncio.ensure_future(conversation.run(Persona(), claim_of(spies[0])))
        await asyncio.wait_for(handler, 5)
        assert caller.code == 1012
        assert all(spy.released.is_set() for spy in spies)

    asyncio.run(run())


def test_tokens_that_cannot_be_kept_cost_no_slot() -> None:
    async def run() -> None:
        spy = Spy()

        async def find(*_: Any) -> Any:
            return spy

        async def keep(*_: Any) -> None:
            raise MemoryError

        services = dataclasses.replace(services_of(find), keep=keep)
        conversation = Conversation(cast(WebSocket, Silence()), "s", services)
        handler = asyncio.ensure_future(conversation.run(Persona(), claim_of(spy)))
        await asyncio.wait_for(spy.connected.wait(), 5)
        handler.cancel()
        with pytest.raises(MemoryError):
            await handler
        assert spy.released.is_set()

    asyncio.run(run())


def test_a_handler_cancelled_again_and_again_gives_everything_back() -> None:
    """As Serve's direct ingress does when a client goes; the slot was kept for ever once."""

    async def run() -> None:
        spy = Spy()

        async def connect(*_: Any) -> Any:
            return spy

        services = services_of(connect)
        conversation = Conversation(cast(WebSocket, Silence()), "s", services)
        handler = asyncio.ensure_future(conversation.run(Persona(), claim_of(spy)))
        await asyncio.wait_for(spy.connected.wait(), 5)
        for _ in range(4):
            handler.cancel()
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await handler
        assert spy.closed
        assert not services.live
        await asyncio.wait_for(spy.released.wait(), 5)
        await asyncio.sleep(0.01)
        assert not services.ending
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


class DeadProxy(Silence):
    """A socket whose process was killed: what Serve raises then is no disconnect."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error, self.dead = error, asyncio.Event()

    async def receive(self) -> Any:
        await self.dead.wait()
        raise self._error


@pytest.mark.parametrize(
    "error", [ActorDiedError(), ActorUnavailableError("gone", None), OSError(), KeyError("x"), ValueError()]
)
def test_whatever_the_connection_raises_ends_the_session_at_once(error: Exception) -> None:
    """Only a disconnect did once: four sessions of a dead proxy kept their slots for a minute."""

    async def run() -> None:
        spy = Spy()

        async def connect(*_: Any) -> Any:
            return spy

        socket = DeadProxy(error)
        conversation = Conversation(cast(WebSocket, socket), "s", services_of(connect))
        running = asyncio.ensure_future(conversation.run(Persona(), claim_of(spy)))
        await asyncio.wait_for(spy.connected.wait(), 5)
        socket.dead.set()
        await asyncio.wait_for(running, 2)
        assert spy.closed
        await asyncio.wait_for(spy.released.wait(), 2)

    asyncio.run(run())


@pytest.mark.parametrize("turns", range(4))
def test_a_session_that_ends_before_it_takes_its_slot_gives_it_back(turns: int) -> None:
    """Cancelled after each of the first turns of the event loop."""

    async def run() -> None:
        spy = Spy()

        async def connect(*_: Any) -> Any:
            return spy

        conversation = Conversation(cast(WebSocket, Silence()), "s", services_of(connect))
        handler = asyncio.ensure_future(conversation.run(Persona(), claim_of(spy)))
        for _ in range(turns + 1):
            await asyncio.sleep(0)
        handler.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handler
        await asyncio.wait_for(spy.released.wait(), 5)

    asyncio.run(run())


def test_what_comes_after_a_cancelled_handler_is_not_why_the_session_ended() -> None:
    """The link that closes with the session told it that its engine was lost, and its timer went on."""

    async def run() -> None:
        spy, ended = Spy(), asyncio.Event()
        lost: Any = None

        async def connect(grant: Grant, hear: Any, lose: Any) -> Any:
            nonlocal lost
            lost = lose
            return spy

        async def keep(*_: Any) -> None:
            await ended.wait()

        services = dataclasses.replace(services_of(connect), keep=keep, limits=Limits(first_audio_s=0.2))
        conversation = Conversation(cast(WebSocket, Silence()), "s", services)
        handler = asyncio.ensure_future(conversation.run(Persona(), claim_of(spy)))
        await asyncio.wait_for(spy.connected.wait(), 5)
        handler.cancel()
        await asyncio.sleep(0)
        lost(spy)
        ended.set()
        with pytest.raises(asyncio.CancelledError):
            await handler
        assert conversation.error is None

    asyncio.run(run())


def test_a_fault_of_ours_is_told_and_logged(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader took it for a client that had left, since an IllegalEvent is a RuntimeError."""

    class Told(Caller):
        closed = asyncio.Event()

        async def close(self, code: int, reason: str = "") -> None:
            await super().close(code, reason)
            self.closed.set()

    caller, slot = Told(b"\x06"), Slot()

    def stumble(data: bytes) -> Any:
        raise IllegalEvent("no such thing")

    monkeypatch.setattr(moshi, "event_of", stumble)

    async def during() -> None:
        caller.may_speak.set()
        await asyncio.wait_for(caller.closed.wait(), 5)

    asyncio.run(converse(caller, slot, Limits(), during))
    assert caller.code == 1012
    assert "IllegalEvent" in caplog.text


def test_a_link_that_is_there_too_late_is_closed_and_of_no_account() -> None:
    async def run() -> None:
        late, good = Spy(), Spy()
        tries, losers = [late, good], []

        async def connect(grant: Grant, hear: Any, lose: Any) -> Any:
            losers.append(lose)
            spy = tries.pop(0)
            if spy is late:
                with contextlib.suppress(asyncio.CancelledError):  # there just as it was given up
                    await asyncio.Event().wait()
            return spy

        conversation = Conversation(cast(WebSocket, Silence()), "s", services_of(connect, good))
        handler = asyncio.ensure_future(conversation.run(Persona(), claim_of(late)))
        await asyncio.wait_for(good.connected.wait(), 5)
        assert late.closed
        losers[0](late)
        assert conversation.error is None
        handler.cancel()
        await asyncio.gather(handler, return_exceptions=True)

    asyncio.run(run())


class Starting(Silence):
    """A client that says after the upgrade which session it wants, and then breaks the protocol."""

    def __init__(self) -> None:
        self.code = 0
        self._said = [carrier.Call(carrier.TWILIO).start(), "no JSON"]

    async def receive(self) -> dict[str, Any]:
        if self._said:
            return {"type": "websocket.receive", "text": self._said.pop(0)}
        return await super().receive()

    async def send_text(self, text: str) -> None:
        pass

    async def close(self, code: int, reason: str = "") -> None:
        self.code = self.code or code
        await super().close(code, reason)


def test_a_slot_that_is_claimed_after_the_end_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that was cancelled may still come: before Python 3.12 asyncio.wait_for swallows that."""
    monkeypatch.setattr(conversation_module, "CLOSE_TIMEOUT_S", 0.05)

    async def run() -> None:
        spy, caller, connected = Spy(), Starting(), []

        async def connect(*_: Any) -> Any:
            connected.append(spy)
            return spy

        async def begin(persona: Persona, ticket: str) -> tuple[Persona, Claim]:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            return persona, claim_of(spy)

        protocol = CarrierTranslator(TWILIO, lambda _: Begin(Persona()), clock=time.monotonic, burst_s=6.0)
        conversation = Conversation(
            cast(WebSocket, caller), "s", services_of(connect), protocol=protocol, begin=begin
        )
        await asyncio.wait_for(conversation.run(), 5)
        assert caller.code == 1002
        assert spy.released.is_set()
        assert not connected

    asyncio.run(run())


def test_a_client_that_takes_its_close_late_is_told_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was told 1011, whatever the reason, and came again."""
    monkeypatch.setattr(conversation_module, "CLOSE_TIMEOUT_S", 0.05)

    class Stalled(Caller):
        async def send_bytes(self, data: bytes) -> None:
            await asyncio.Event().wait()

    async def run() -> None:
        spy, caller = Spy(), Stalled()

        async def connect(*_: Any) -> Any:
            return spy

        conversation = Conversation(cast(WebSocket, caller), "s", services_of(connect))
        running = asyncio.ensure_future(conversation.run(Persona(), claim_of(spy)))
        await asyncio.wait_for(spy.connected.wait(), 5)
        conversation.end(ClientError("the client does not read what it is sent"))
        await asyncio.wait_for(running, 5)
        assert (caller.code, caller.complaint) == (1008, "the client does not read what it is sent")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (SessionLost("its replica is gone"), True),
        (NoCapacity("no slot became free in time"), True),
        (RepeatedlyLost("it kills its replicas"), False),
        (SessionTaken(), False),
        (SessionExpired("its time is over"), False),
        (ClientError("it breaks the protocol"), False),
        (EngineFault("the engine failed"), False),
    ],
)
@pytest.mark.parametrize("resumable", [True, False])
def test_after_which_ends_a_client_may_come_back(
    error: PersonaplexError, kept: bool, resumable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    detached: list[Upstream] = []
    monkeypatch.setattr(Upstream, "detach", lambda upstream: detached.append(upstream))
    monkeypatch.setattr(conversation_module, "CLOSE_TIMEOUT_S", 0.05)

    async def run() -> None:
        spy, caller = Spy(), Caller()

        async def connect(*_: Any) -> Any:
            return spy

        services = services_of(connect)
        conversation = Conversation(cast(WebSocket, caller), "s", services, resumable=resumable)
        running = asyncio.ensure_future(conversation.run(Persona(), claim_of(spy)))
        await asyncio.wait_for(spy.connected.wait(), 5)
        conversation.end(error)
        await asyncio.wait_for(running, 5)
        assert caller.code == error.close_code
        assert spy.released.is_set(), "no slot is kept"

    asyncio.run(run())
    assert len(detached) == (kept and resumable)
