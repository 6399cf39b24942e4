"""A session's sound in its gateway: how much may wait, what is heard of it, and what is no sound."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any, cast

import numpy as np
import pytest
from conversations import (
    Caller,
    Listener,
    Nothing,
    Slot,
    Spy,
    claim_of,
    converse,
    services_of,
)
from starlette.websockets import WebSocket

from deployments.gateway.audio import UNDECODED_LIMIT, AudioStep
from deployments.gateway.conversation import Conversation
from deployments.gateway.outbox import MESSAGE_LIMIT as UNSENT_LIMIT
from deployments.gateway.progress import STALE_S
from deployments.metrics import Metrics
from deployments.wire.messages import Grant, MessageKind, SlotReady, pack_ready
from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SIZE
from personaplex.errors import PersonaplexError, SessionLost
from personaplex.persona import Persona
from personaplex.session.core import HANDSHAKE_DELAY_S, Limits
from personaplex.session.events import Event, Failed, SendText
from personaplex.session.moshi import Audio, encode


def test_audio_that_waits_to_be_decoded_is_bounded() -> None:
    """More of it than may wait, before the event loop can decode any."""

    async def run() -> Caller:
        spy, caller = Spy(), Caller(*[encode(Audio(bytes(UNDECODED_LIMIT // 8)))] * 9)

        async def connect(grant: Grant, hear: Any, lose: Any) -> Any:
            spy.hear = hear
            return spy

        conversation = Conversation(cast(WebSocket, caller), "s", services_of(connect))
        handler = asyncio.ensure_future(conversation.run(Persona(), claim_of(spy)))
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

    asyncio.run(converse(caller, slot, Limits(burst_s=0.8), during))
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

    asyncio.run(converse(caller, slot, Limits(), during))
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

        services = dataclasses.replace(services_of(link), limits=Limits(burst_s=burst_s))
        conversation = Conversation(cast(WebSocket, caller), "s", services)
        handler = asyncio.ensure_future(conversation.run(Persona(), claim_of(spy)))
        await asyncio.wait_for(spy.connected.wait(), 5)
        spy.hear(spy, MessageKind.READY, pack_ready(SlotReady(0.1)))
        await asyncio.sleep(HANDSHAKE_DELAY_S + 0.1)  # the handshake is on its way, headers and details wait
        for _ in range(limit - 3):
            conversation._do(SendText("a"))
            conversation._check_unsent()
        assert conversation.error is None
        for _ in range(3):
            conversation._do(SendText("a"))
            conversation._check_unsent()
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

    asyncio.run(converse(caller, slot, Limits(), during))
    assert (caller.code, caller.complaint) == (1007, "no Ogg page (raw PCM?); send Ogg Opus")
