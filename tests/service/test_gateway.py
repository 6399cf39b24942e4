"""The query a gateway reads, its pages, and its sessions' ends; who gets in is in test_admission.py."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import logging
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import ray
import requests
import websockets
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError, TaskCancelledError
from serving import Heard, Service, connect, running, speech
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route
from starlette.websockets import WebSocket, WebSocketState
from websockets.http11 import Response as Refused

from deployments import metrics
from deployments.application import build
from deployments.gateway import host
from deployments.gateway.app import PAGE, report_failure
from deployments.gateway.audio import UNDECODED_LIMIT, AudioStep
from deployments.gateway.conversation import Conversation
from deployments.gateway.headers import SecurityHeaders
from deployments.gateway.host import SessionHost
from deployments.gateway.leases import Claim, Waiter
from deployments.gateway.outbox import MESSAGE_LIMIT as UNSENT_LIMIT
from deployments.gateway.progress import STALE_S
from deployments.gateway.protocols import moshi
from deployments.gateway.query import SEED_LIMIT, persona_from, read_query, wants_status
from deployments.gateway.services import Services
from deployments.gateway.tokenlogs import TokenLogs
from deployments.gateway.turns import QueuedRequest
from deployments.gateway.waits import Waits
from deployments.metrics import Metrics
from deployments.settings import Settings
from deployments.wire import messages
from deployments.wire.messages import Grant, MessageKind, SlotReady, pack_ready
from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SIZE, Sampling
from personaplex.errors import BadParameter, PersonaplexError, SessionLost, UnknownVoice
from personaplex.persona import PROMPTS, VOICES, Persona
from personaplex.session.core import HANDSHAKE_DELAY_S, IllegalEvent, Limits
from personaplex.session.events import AgentText, Event, Failed
from personaplex.session.moshi import Audio, encode
from personaplex.tokenlog import TokenLog

# The query


def test_an_empty_query_is_the_default_persona_with_a_seed_of_its_own() -> None:
    first, second = persona_from({}), persona_from({})
    assert (first.voice, first.text_prompt) == (Persona().voice, Persona().text_prompt)
    assert first.sampling.text_seed == first.sampling.audio_seed
    assert first.sampling.text_seed != second.sampling.text_seed


def test_the_stock_web_clients_query_is_read() -> None:
    query = (
        b"worker_auth_id=k&email=a%40b&text_temperature=0.7&text_topk=25&audio_temperature=0.8&audio_topk=250"
        b"&pad_mult=0&text_seed=12&audio_seed=34&repetition_penalty_context=64&repetition_penalty=1"
        b"&text_prompt=You%20enjoy+it.%20%E4%BD%A0&voice_prompt=VARM4.pt"
    )
    persona = persona_from(read_query(query, 16_384))
    assert persona == Persona("VARM4", "You enjoy it. 你", Sampling(0.7, 25, 0.8, 250, 12, 34))


def test_one_seed_does_for_both_and_minus_one_is_none() -> None:
    sampling = persona_from({"seed": "5", "audio_seed": "6"}).sampling
    assert (sampling.text_seed, sampling.audio_seed) == (5, 6)
    assert persona_from({"text_seed": "-1", "seed": "9"}).sampling.text_seed == 9
    assert persona_from({"seed": str(SEED_LIMIT)}).sampling.text_seed == 2**63 - 1


def test_an_empty_prompt_is_a_prompt_and_the_first_of_two_names_counts() -> None:
    assert persona_from({"text_prompt": ""}).text_prompt == ""
    assert read_query(b"a=1&a=2", 100) == {"a": "1"}


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        (b"status=1", True),
        (b"text_prompt=a&status=%31", True),
        (b"status=0&status=1", False),
        (b"status=xyz", False),
        (b"status=", False),
        (b"text_prompt=%26status=1", False),
        (b"", False),
    ],
)
def test_status_is_read_like_every_other_name(query: bytes, wanted: bool) -> None:
    assert wants_status(read_query(query, 100)) is wanted


@pytest.mark.parametrize(
    ("text", "value"), [("0.7", 0.7), (".7", 0.7), ("1.", 1.0), ("7e-1", 0.7), (".5e0", 0.5)]
)
def test_numbers_as_programs_write_them(text: str, value: float) -> None:
    assert persona_from({"text_temperature": text}).sampling.text_temperature == value


@pytest.mark.parametrize(
    "text",
    [".", "-.", ".e1", "nan", "inf", "-inf", "1e400", "10.1", "-0.0001", "1,5", "0x1", " 1", "1\n", "٣"],
)
def test_numbers_are_read_strictly(text: str) -> None:
    with pytest.raises(BadParameter, match="text_temperature"):
        persona_from({"text_temperature": text})


@pytest.mark.parametrize("text", ["2.0", "1e3", "-1", "32001", "1_0", "", "x"])
def test_whole_numbers_too(text: str) -> None:
    if not text:
        assert persona_from({"text_topk": text}).sampling.text_topk == Sampling().text_topk
        return
    with pytest.raises(BadParameter, match="text_topk"):
        persona_from({"text_topk": text})


@pytest.mark.parametrize("name", ["../NATF2", "/etc/passwd", "a" * 65, "NATF2\0", "voices/NATF2.pt", "é"])
def test_a_voice_is_a_name_and_never_a_path(name: str) -> None:
    with pytest.raises(UnknownVoice) as caught:
        persona_from({"voice_prompt": name})
    assert name not in str(caught.value)


@pytest.mark.parametrize("query", [b"\xff", b"a=%FF", b"a=%ED%A0%80", b"x" * 101, b"&".join([b"a=1"] * 65)])
def test_a_query_that_cannot_be_read_is_refused(query: bytes) -> None:
    with pytest.raises(BadParameter):
        read_query(query, 200 if query.startswith(b"a=1&") else 100)


# The end of a session


class Silence:
    """A socket whose client says nothing, as Starlette gives it."""

    client_state = application_state = WebSocketState.CONNECTED

    async def receive(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send_bytes(self, data: bytes) -> None:
        pass

    async def close(self, code: int, reason: str = "") -> None:
        self.application_state = WebSocketState.DISCONNECTED


class Spy:
    """A media link and the lease for it; remembers what became of them."""

    grant = Grant("", 0, bytes(16), "", 1)
    dropped = 0

    def __init__(self) -> None:
        self.connected, self.closed, self.released = asyncio.Event(), False, asyncio.Event()
        self.hear: Any = None

    def send(self, kind: Any, payload: bytes) -> None:
        self.connected.set()

    def close(self) -> None:
        self.closed = True

    async def wait_freed(self, timeout_s: float) -> bool:
        await asyncio.sleep(0.05)
        return self.closed

    def release(self) -> None:
        self.released.set()


class Nothing:
    """Metrics, traces, callbacks: it and every method of it may be called."""

    def __call__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return self


class Counted(Nothing):
    """Metrics that keep the causes of sessions that never began."""

    def __init__(self) -> None:
        self.refused: list[str] = []

    def add(self, series: metrics.Series, amount: float = 1.0, **labels: str) -> None:
        if series is metrics.SESSIONS_REFUSED:
            self.refused.append(labels["cause"])


class Caller(Silence):
    """A socket whose client says everything at once, when it may; keeps what it was told at the end."""

    def __init__(self, *said: bytes) -> None:
        self._said = deque(said)
        self.may_speak, self.complaint, self.code = asyncio.Event(), "", 0

    async def receive(self) -> dict[str, Any]:
        await self.may_speak.wait()
        if self._said:
            return {"type": "websocket.receive", "bytes": self._said.popleft()}
        return await super().receive()

    async def close(self, code: int, reason: str = "") -> None:
        if not self.code:
            self.code, self.complaint = code, reason
        await super().close(code, reason)


class Reporter:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.told.append(context.get("exception"))


def test_calls_that_end_with_their_client_are_no_failure() -> None:
    """Serve asks a replica for its queue while a client leaves: each such call was a traceback."""
    cancelled, fault, loop = TaskCancelledError(), ValueError("a fault"), Reporter()
    of_a_task = RayTaskError("f", "", TaskCancelledError()).as_instanceof_cause()
    for context in (
        {"exception": cancelled},
        {"exception": of_a_task},
        {"exception": fault},
        {"message": "m"},
    ):
        report_failure(cast(Any, loop), context)
    assert loop.told == [fault, None]


def test_audio_that_waits_to_be_decoded_is_bounded() -> None:
    """More of it than may wait, before the event loop can decode any."""

    async def run() -> Caller:
        spy, caller = Spy(), Caller(*[encode(Audio(bytes(UNDECODED_LIMIT // 8)))] * 9)

        async def connect(grant: Grant, hear: Any, lose: Any) -> Any:
            spy.hear = hear
            return spy

        conversation = Conversation(cast(WebSocket, caller), "s", _services(connect))
        handler = asyncio.ensure_future(conversation.run(Persona(), _claim(spy)))
        await asyncio.wait_for(spy.connected.wait(), 5)
        spy.hear(spy, MessageKind.READY, pack_ready(SlotReady(0.1)))
        await asyncio.sleep(HANDSHAKE_DELAY_S)
        caller.may_speak.set()
        await asyncio.wait_for(handler, 5)
        return caller

    caller = asyncio.run(run())
    assert caller.code == 1002
    assert "wait to be decoded" in caller.complaint


def test_a_longer_burst_may_wait_to_be_decoded() -> None:
    async def run() -> list[Event]:
        told: list[Event] = []
        step = AudioStep(
            Transcoder(burst_s=60),
            Limits(burst_s=60),
            cast(Metrics, Nothing()),
            told.append,
            lambda frame: None,
        )
        for _ in range(10):
            step.feed(bytes(UNDECODED_LIMIT))
        assert not told
        step.feed(bytes(UNDECODED_LIMIT))
        step.stop()
        return told

    (failed,) = asyncio.run(run())
    assert isinstance(failed, Failed)
    assert "more than 5120 KiB" in str(failed.error)


def test_a_decoder_that_fails_ends_the_session_in_words(caplog: pytest.LogCaptureFixture) -> None:
    """Within a callback of the event loop, where nobody hears of it, nothing was decoded any more."""
    sender = Transcoder()
    pages = [*sender.headers(), *(sender.send(np.zeros(FRAME_SIZE, np.float32)) for _ in range(60))]

    def stumble(frame: Any) -> None:
        raise MemoryError

    async def run() -> list[Event]:
        told: list[Event] = []
        step = AudioStep(Transcoder(), Limits(), cast(Metrics, Nothing()), told.append, stumble)
        step.feed(bytes(Transcoder.feed_bytes) + b"".join(pages))  # what stumbles comes after the first piece
        for _ in range(20):
            await asyncio.sleep(0)
        step.stop()
        return told

    failed = asyncio.run(run())[0]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, SessionLost)
    assert "MemoryError" in caplog.text


class Slot(Spy):
    """A link that keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Any] = []

    def send_frame(self, kind: MessageKind, payload: bytes) -> None:
        assert kind is MessageKind.FRAME
        self.frames.append(messages.unpack_frame(payload)[1])

    def answer(self, frame: int, level: float) -> None:
        pcm = np.full(FRAME_SIZE, level, np.float32)
        self.hear(
            self,
            MessageKind.REPLY,
            messages.pack_reply(messages.Reply(frame, pcm, np.zeros(17, np.int64), "", 0)),
        )


class Listener(Caller):
    """A caller that keeps the pages it is sent, by their numbers, headers first."""

    def __init__(self, *said: bytes) -> None:
        super().__init__(*said)
        self.numbers: list[int] = []

    async def send_bytes(self, data: bytes) -> None:
        if data[0] == 1:
            self.numbers.append(int.from_bytes(data[19:23], "little"))


async def _converse(
    caller: Caller, slot: Slot, limits: Limits, during: Callable[[], Awaitable[None]]
) -> None:
    """Runs `during` once the replica was told the persona, then hangs up."""

    async def link(grant: Grant, hear: Any, lose: Any) -> Any:
        slot.hear = hear
        return slot

    services = dataclasses.replace(_services(link), limits=limits)
    conversation = Conversation(cast(WebSocket, caller), "s", services)
    handler = asyncio.ensure_future(conversation.run(Persona(), _claim(slot)))
    await asyncio.wait_for(slot.connected.wait(), 5)
    await during()
    handler.cancel()
    await asyncio.gather(handler, return_exceptions=True)


def test_of_what_is_said_before_a_slot_is_ready_the_newest_burst_is_heard() -> None:
    sender = Transcoder()
    said = [np.full(FRAME_SIZE, number / 100, np.float32) for number in range(26)]
    pages = [*sender.headers(), *(sender.send(frame) for frame in said)]
    ear = Transcoder()
    frames = [frame for page in pages for frame in ear.receive(page)]
    slot, caller = Slot(), Caller(*(encode(Audio(page)) for page in pages))

    async def during() -> None:
        caller.may_speak.set()
        await asyncio.sleep(0.1)
        assert not slot.frames
        slot.hear(slot, MessageKind.READY, pack_ready(SlotReady(0.1)))

    asyncio.run(_converse(caller, slot, Limits(burst_s=0.8), during))
    np.testing.assert_array_equal(np.stack(slot.frames), np.stack(frames[-10:]))


def test_time_that_a_slot_took_is_made_up_for_in_silence_only() -> None:
    """Answers to what was said meanwhile are late through no fault of the client: quiet ones are left out."""
    sender = Transcoder()
    pages = [*sender.headers(), *(sender.send(np.zeros(FRAME_SIZE, np.float32)) for _ in range(9))]
    slot, caller = Slot(), Listener(*(encode(Audio(page)) for page in pages))

    async def during() -> None:
        caller.may_speak.set()
        await asyncio.sleep(STALE_S + 0.1)
        slot.hear(slot, MessageKind.READY, pack_ready(SlotReady(0.1)))
        assert len(slot.frames) == 8
        for number in range(10):
            slot.answer(number, 0.1 if number == 3 else 0.0)
        await asyncio.sleep(0.5)

    asyncio.run(_converse(caller, slot, Limits(), during))
    assert caller.numbers == [0, 1, 2 + 3, 2 + 8, 2 + 9]


@pytest.mark.parametrize(("burst_s", "limit"), [(1.0, UNSENT_LIMIT), (12.0, 2 * UNSENT_LIMIT)])
def test_what_a_client_may_leave_unread_grows_with_its_bursts(burst_s: float, limit: int) -> None:
    class Stalled(Caller):
        async def send_bytes(self, data: bytes) -> None:
            await asyncio.Event().wait()

    async def run() -> PersonaplexError | None:
        spy, caller = Slot(), Stalled()

        async def link(grant: Grant, hear: Any, lose: Any) -> Any:
            spy.hear = hear
            return spy

        services = dataclasses.replace(_services(link), limits=Limits(burst_s=burst_s))
        conversation = Conversation(cast(WebSocket, caller), "s", services)
        handler = asyncio.ensure_future(conversation.run(Persona(), _claim(spy)))
        await asyncio.wait_for(spy.connected.wait(), 5)
        spy.hear(spy, MessageKind.READY, pack_ready(SlotReady(0.1)))
        await asyncio.sleep(HANDSHAKE_DELAY_S + 0.1)  # the handshake is on its way, headers and details wait
        for _ in range(limit - 3):
            conversation._on(AgentText("a"))
        assert conversation.error is None
        for _ in range(3):
            conversation._on(AgentText("a"))
        handler.cancel()
        await asyncio.gather(handler, return_exceptions=True)
        return conversation.error

    assert "does not read" in str(asyncio.run(run()))


@pytest.mark.parametrize("ready", [True, False])
def test_what_is_no_ogg_is_named_within_a_second_even_by_who_waits(ready: bool) -> None:
    slot, caller = Slot(), Caller(encode(Audio(bytes(1_920))))

    async def during() -> None:
        if ready:
            slot.hear(slot, MessageKind.READY, pack_ready(SlotReady(0.1)))
        caller.may_speak.set()
        began = time.monotonic()
        while not caller.code:
            await asyncio.sleep(0.01)
            assert time.monotonic() - began < 5
        assert time.monotonic() - began < 1.5, "a second, and a busy machine"

    asyncio.run(_converse(caller, slot, Limits(), during))
    assert (caller.code, caller.complaint) == (1007, "no Ogg page (raw PCM?); send Ogg Opus")


def test_a_replica_that_does_not_answer_costs_a_lease_and_not_the_session() -> None:
    async def run() -> None:
        deaf, good = Spy(), Spy()
        tries = [deaf, good]

        async def connect(*_: Any) -> Any:
            if tries.pop(0) is deaf:
                await asyncio.Event().wait()
            return good

        conversation = Conversation(cast(WebSocket, Silence()), "s", _services(connect, good))
        handler = asyncio.ensure_future(conversation.run(Persona(), _claim(deaf)))
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

        conversation = Conversation(cast(WebSocket, caller), "s", _services(connect, spies[1]))
        handler = asyncio.ensure_future(conversation.run(Persona(), _claim(spies[0])))
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

        services = dataclasses.replace(_services(find), keep=keep)
        conversation = Conversation(cast(WebSocket, Silence()), "s", services)
        handler = asyncio.ensure_future(conversation.run(Persona(), _claim(spy)))
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

        services = _services(connect)
        conversation = Conversation(cast(WebSocket, Silence()), "s", services)
        handler = asyncio.ensure_future(conversation.run(Persona(), _claim(spy)))
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
        conversation = Conversation(cast(WebSocket, socket), "s", _services(connect))
        running = asyncio.ensure_future(conversation.run(Persona(), _claim(spy)))
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

        conversation = Conversation(cast(WebSocket, Silence()), "s", _services(connect))
        handler = asyncio.ensure_future(conversation.run(Persona(), _claim(spy)))
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

        services = dataclasses.replace(_services(connect), keep=keep, limits=Limits(first_audio_s=0.2))
        conversation = Conversation(cast(WebSocket, Silence()), "s", services)
        handler = asyncio.ensure_future(conversation.run(Persona(), _claim(spy)))
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

    asyncio.run(_converse(caller, slot, Limits(), during))
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

        conversation = Conversation(cast(WebSocket, Silence()), "s", _services(connect, good))
        handler = asyncio.ensure_future(conversation.run(Persona(), _claim(late)))
        await asyncio.wait_for(good.connected.wait(), 5)
        assert late.closed
        losers[0](late)
        assert conversation.error is None
        handler.cancel()
        await asyncio.gather(handler, return_exceptions=True)

    asyncio.run(run())


class Unwelcome(Silence):
    """A socket whose client goes while it is accepted; Starlette takes it for connected by then."""

    scope: ClassVar[dict[str, Any]] = {"query_string": b""}

    def __init__(self, error: BaseException | None) -> None:
        self._error, self.accepting = error, asyncio.Event()

    async def accept(self) -> None:
        self.accepting.set()
        if self._error is None:
            await asyncio.Event().wait()
        else:
            raise self._error


def _host(records: Any = None, describe: Any = None) -> Any:
    """Hosts sessions that need no slot any more."""
    services: Any = SimpleNamespace(metrics=Counted(), ending=set())
    nothing: Any = Nothing()
    accounts: Any = SimpleNamespace(attach=lambda *_: None, close=lambda *_: None)
    return SessionHost(
        services,
        fleet=SimpleNamespace(describe=describe),  # type: ignore[arg-type]
        access=nothing,
        accounts=accounts,
        room=nothing,
        waits=Waits(),
        voices=nothing,
        records=records,
        query_limit=16_384,
    )


@pytest.mark.parametrize(
    ("error", "cause"),
    [(None, "left"), (OSError(), "left"), (RuntimeError(), "left"), (ValueError(), "failed")],
)
def test_a_client_that_goes_while_it_is_accepted_gives_its_slot_back(
    error: Exception | None, cause: str
) -> None:
    async def run() -> None:
        spy, socket, hosting = Spy(), Unwelcome(error), _host()
        handler = asyncio.ensure_future(hosting._converse(socket, "s", Persona(), "caller", _claim(spy)))
        await asyncio.wait_for(socket.accepting.wait(), 5)
        handler.cancel()
        await asyncio.gather(handler, return_exceptions=True)
        assert spy.released.is_set()
        assert hosting._metrics.refused == [cause]

    asyncio.run(run())


def test_a_session_that_cannot_be_made_ends_its_record_and_gives_its_slot_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Welcome(Unwelcome):
        async def accept(self) -> None:
            pass

    class Records:
        open = 0
        causes: ClassVar[list[str]] = []

        def wanted(self, query: Any) -> bool:
            return True

        def begin(self, *_: Any) -> Any:
            return SimpleNamespace(over=lambda: None)

        def finish(self, recording: Any, cause: str) -> None:
            self.causes.append(cause)

    def stumble(*_: Any, **__: Any) -> Any:
        raise MemoryError

    async def nobody() -> list[Any]:
        return []

    monkeypatch.setattr(host, "Conversation", stumble)

    async def run() -> None:
        spy, hosting = Spy(), _host(Records(), nobody)
        with pytest.raises(MemoryError):
            await hosting._converse(Welcome(None), "s", Persona(), "caller", _claim(spy))
        assert spy.released.is_set()
        await asyncio.gather(*hosting._services.ending)
        assert Records.causes == ["SessionLost"]
        assert hosting._metrics.refused == ["SessionLost"]

    asyncio.run(run())


def test_who_is_not_recorded_does_not_wait_for_the_fleet() -> None:
    class Records:
        def wanted(self, query: Any) -> bool:
            return "record" in query

    async def describe() -> list[Any]:
        return [SimpleNamespace(engine={"model": "tiny"})]

    assert asyncio.run(_host(Records(), describe)._engine({"record": "1"})) == {"model": "tiny"}
    assert asyncio.run(_host(Records())._engine({})) == {}


async def _forget(*_: Any) -> None:
    pass


def _claim(lease: Any) -> Claim:
    """A claim that has its slot."""
    loop = asyncio.get_running_loop()
    turn = loop.create_future()
    turn.set_result(lease)
    return Claim(Waiter(QueuedRequest("s", ""), loop.create_future()), turn, time.monotonic())


def _services(connect: Any, *leases: Any) -> Services:
    """What a conversation is lent; `leases` are the ones it gets if its own does not do."""
    further = list(leases)

    async def claim(*_: Any) -> Claim:
        return _claim(further.pop(0))

    values: dict[str, Any] = {
        "leases": SimpleNamespace(claim=claim),
        "connect": connect,
        "limits": Limits(),
        "keep": _forget,
        "connect_timeout_s": 0.1,
    }
    for field in dataclasses.fields(Services):
        if field.name not in values and field.default_factory is dataclasses.MISSING:
            values[field.name] = Nothing()
    return Services(**values)


# Headers of pages


def _headers(host: str = "talk.example", **options: Any) -> Any:
    chosen = {"policy": Settings().content_security_policy, "hsts_s": 0, **options}
    app = Starlette(
        routes=[Route("/", lambda _: Response("x"))], middleware=[Middleware(SecurityHeaders, **chosen)]
    )
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    async def run(path: str) -> Headers:
        sent.clear()
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "root_path": ""}
        await app({**scope, "headers": [(b"host", host.encode())]}, receive, send)
        return Headers(raw=sent[0]["headers"])

    found, missing = asyncio.run(run("/")), asyncio.run(run("/nowhere"))
    assert {name: missing[name] for name in found if name not in ("content-length", "content-type")} == {
        name: found[name] for name in found if name not in ("content-length", "content-type")
    }, "an error is a page too"
    return found


def test_every_answer_has_security_headers() -> None:
    headers = _headers()
    policy = headers["content-security-policy"]
    assert "unsafe" not in policy.replace("'wasm-unsafe-eval'", ""), "WebAssembly is no text that is run"
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert "microphone=(self)" in headers["permissions-policy"]
    assert "strict-transport-security" not in headers
    assert "content-security-policy" not in _headers(policy="")


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("localhost:8998", True),
        ("app.localhost:1", True),
        ("127.0.0.5", True),
        ("[::1]:8998", True),
        ("talk.example", False),
        ("localhost.example:443", False),
        ("[2001:db8::1]:1", False),
        ("192.0.2.1", False),
    ],
)
def test_strict_transport_is_asked_for_by_a_setting_and_never_of_this_machine(host: str, local: bool) -> None:
    headers = _headers(host, hsts_s=60)
    assert headers.get("strict-transport-security") == (None if local else "max-age=60")


def test_the_page_has_nothing_inline() -> None:
    """What the policy would block in silence."""
    text = (PAGE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", text)
    assert not any("data:" in sheet.read_text() for sheet in PAGE.glob("*.css"))


# A running gateway


@pytest.fixture(scope="module")
def service(cluster: str) -> Iterator[Service]:
    with running(
        cluster,
        model="echo",
        slots=2,
        api_keys="right",
        allowed_origins="https://a.example",
        sessions_per_key=1,
        session_limit_s=2.0,
        log_level="info",
    ) as service:
        yield service


def _refused(service: Service, headers: dict[str, str] | None = None, **query: Any) -> Refused:
    """The answer to an upgrade that is refused."""

    async def run() -> Refused:
        with pytest.raises(websockets.InvalidStatus) as caught:
            async with connect(service, headers, **query):
                pass
        return caught.value.response

    return asyncio.run(run())


def test_a_session_without_a_key_is_refused_in_words(service: Service) -> None:
    for answer in (_refused(service), _refused(service, {"X-API-Key": "wrong"}, worker_auth_id="right")):
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert b"key" in answer.body


def test_a_page_of_another_origin_is_refused(service: Service) -> None:
    answer = _refused(service, {"X-API-Key": "right", "Origin": "https://b.example"})
    assert answer.status_code == 403


def test_a_key_holds_as_many_sessions_as_it_may_and_a_session_its_time(service: Service) -> None:
    async def run() -> Heard:
        async with connect(service, {"Authorization": "Bearer right"}) as client:
            await client.headers()
            await client.until(lambda heard: heard.live)
            second = await asyncio.to_thread(_refused, service, {"X-API-Key": "right"})
            assert second.status_code == 429
            assert int(second.headers["retry-after"]) > 0
            talking = asyncio.ensure_future(client.speak(speech(4.0)))
            heard = await client.until_closed(4.0)
            await asyncio.wait({talking})
            talking.exception()
            return heard

    heard = asyncio.run(run())
    assert heard.code == 1000
    assert "limit" in heard.reason


def test_a_page_can_ask_why_it_was_refused(service: Service) -> None:
    """Browsers tell scripts nothing of an upgrade that failed."""
    for query, status in (("", 401), ("worker_auth_id=right", 204), ("worker_auth_id=right&seed=x", 400)):
        answer = service.get(f"api/admission?{query}")
        assert answer.status_code == status
        assert bool(answer.text) == (status != 204)


def test_pages_and_lists_are_served(service: Service) -> None:
    assert service.get("healthz").json() == {"status": "ok", "proxy_limits": True}
    info = service.info()
    assert (info["model"], info["slots"], info["replicas"], info["key_needed"]) == ("echo", 2, 1, True)
    voices = service.get("api/voices").json()
    assert [voice["name"] for voice in voices["voices"]] == list(VOICES)
    prompts = service.get("api/prompts").json()["prompts"]
    assert {prompt["id"]: prompt["text"] for prompt in prompts} == {p.id: p.text for p in PROMPTS.values()}
    page = service.get("")
    assert page.headers["content-type"].startswith("text/html")
    assert service.get("app.js").status_code == 200


@pytest.mark.parametrize("path", ["../settings.py", "..%2f..%2fpyproject.toml", "%2e%2e/app.py", "api/none"])
def test_no_path_leads_out_of_the_page(service: Service, path: str) -> None:
    url = f"http://{service.base}/{path}"
    prepared = requests.Request("GET", url).prepare()
    prepared.url = url  # as it stands: requests would tidy it up
    with requests.Session() as session:
        assert session.send(prepared, timeout=5).status_code == 404


def test_plain_http_on_the_chat_path_is_not_served(service: Service) -> None:
    answer = service.get("api/chat")
    assert answer.status_code == 426
    assert answer.headers["upgrade"] == "websocket"
    for path in ("api/other", "app.js", "api/info"):
        with pytest.raises(websockets.InvalidStatus) as caught:
            asyncio.run(_open(f"ws://{service.base}/{path}"))
        assert caught.value.response.status_code == 404


async def _open(url: str) -> None:
    async with websockets.connect(url):
        pass


async def _end(service: Service, headers: dict[str, str], **query: Any) -> Heard:
    async with connect(service, headers, **query) as client:
        return await client.until_closed()


def test_nothing_a_client_says_is_logged(service: Service) -> None:
    marker = "Zanzibar-4711"
    query = {"text_prompt": marker, "email": marker, "voice_prompt": marker, "text_temperature": marker}
    before = _logs()
    _refused(service, {"X-API-Key": marker, "Origin": f"https://{marker}"}, **query)
    _refused(service, {"X-API-Key": "right"}, **query)
    asyncio.run(_end(service, {"X-API-Key": "right"}, voice_prompt="Zanzibar"))
    after = _logs()
    forbidden = [sum(text.count("refused: Forbidden") for text in logs.values()) for logs in (before, after)]
    assert forbidden[1] == forbidden[0] + 1, "the gateway's own lines are among them"
    assert not [path for path, text in after.items() if "Zanzibar" in text]


def _logs() -> dict[Path, str]:
    """What all processes of the cluster have logged, whichever services they belong to."""
    folder = Path("/tmp/ray", ray.get_runtime_context().get_session_name(), "logs")
    return {
        path: path.read_text(encoding="utf-8", errors="replace")
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_gateway_runs_without_torch(service: Service) -> None:
    """In the live process, and by import."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            title = (entry / "cmdline").read_bytes() if (entry / "cmdline").exists() else b""
            if title.startswith(f"ray::ServeReplica:{service.name}:gateway".encode()):
                assert "libtorch" not in (entry / "maps").read_text()
                break
    else:
        raise AssertionError("no gateway process")
    code = "import sys, deployments.application, deployments.gateway.app; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"


def test_settings_are_printed_without_keys(caplog: pytest.LogCaptureFixture) -> None:
    from deployments.application import build
    from deployments.settings import Settings

    with caplog.at_level(logging.INFO, logger="deployments"):
        logging.getLogger("deployments").propagate = True
        build(Settings(model="echo", api_keys="do-not-show"))
        build(Settings(model="echo"))
    assert re.search(r'"slots": 4', caplog.text)
    assert "do-not-show" not in caplog.text
    assert "whoever reaches this service may use it" in caplog.text


@pytest.mark.parametrize("trouble", [errno.ENOSPC, errno.EROFS])
def test_a_token_log_that_cannot_be_written_ends_no_session(
    trouble: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, one that may only be read: said, and nothing half written stays."""

    def save(log: TokenLog, path: Path) -> None:
        raise OSError(trouble, os.strerror(trouble))

    logs = TokenLogs(tmp_path / "logs")
    log = TokenLog()
    log.append(range(17), forced=False)
    asyncio.run(logs.keep("whole", log))
    monkeypatch.setattr(TokenLog, "save", save)
    asyncio.run(logs.keep("lost", log))
    assert "tokens of session lost could not be saved" in caplog.text
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["whole.npz"]


def test_what_was_said_is_readable_by_its_owner_only(tmp_path: Path) -> None:
    """The folder as well, where it is ours; one that was there keeps its rights."""
    log = TokenLog()
    log.append(range(17), forced=False)
    mask = os.umask(0)
    try:
        (tmp_path / "theirs").mkdir(0o755)
        for folder, mode in (("ours", 0o700), ("theirs", 0o755)):
            asyncio.run(TokenLogs(tmp_path / folder).keep("said", log))
            assert (tmp_path / folder).stat().st_mode & 0o7777 == mode
            assert (tmp_path / folder / "said.npz").stat().st_mode & 0o7777 == 0o600
    finally:
        os.umask(mask)


def test_slots_no_gateway_has_room_for_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build(Settings(model="echo", slots=80, sessions_per_gateway=40, gateways_max=2))
        assert "gateways hold" not in caplog.text
        build(Settings(model="echo", slots=81, sessions_per_gateway=40, gateways_max=2))
    assert "gateways hold 80 sessions at most, replicas 81" in caplog.text
