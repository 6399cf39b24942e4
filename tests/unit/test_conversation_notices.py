"""What a client that asked for status is told of its session's course, and no other one."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest
from conversations import Caller, Slot, claim_of, services_of
from starlette.websockets import WebSocket

from deployments.gateway.conversation import Conversation
from deployments.gateway.protocols.moshi import MoshiTranslator
from deployments.wire.messages import Grant, MessageKind, SlotReady, pack_ready
from personaplex.persona import Persona
from personaplex.session.moshi import Audio, Handshake, Message, Metadata, decode

WINDOW_FRAME = 3


class Hearing(Caller):
    """A caller that keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Message] = []
        self.changed = asyncio.Event()

    async def send_bytes(self, data: bytes) -> None:
        self.told.append(decode(data))
        self.changed.set()

    async def until(self, kind: type[Message], count: int) -> None:
        while sum(isinstance(message, kind) for message in self.told) < count:
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 5)


@pytest.mark.parametrize("status", [True, False])
def test_a_talk_that_outgrows_the_models_window_is_told_to_who_asked(
    status: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, when the first frame comes that no longer knows the beginning."""

    async def run() -> list[Message]:
        slot, caller = Slot(), Hearing()

        async def link(grant: Grant, hear: Any, lose: Any) -> Any:
            slot.hear = hear
            return slot

        protocol = MoshiTranslator(time.monotonic, 6.0)
        monkeypatch.setattr(protocol, "handshake_delay_s", 0.0)
        conversation = Conversation(
            cast(WebSocket, caller), "5e" * 16, services_of(link), protocol=protocol, status=status
        )
        handler = asyncio.ensure_future(conversation.run(Persona(), claim_of(slot)))
        await asyncio.wait_for(slot.connected.wait(), 5)
        slot.hear(slot, MessageKind.READY, pack_ready(SlotReady(0.1, window=WINDOW_FRAME)))
        await caller.until(Handshake, 1)
        for frame in range(2 * WINDOW_FRAME):
            slot.answer(frame, 0.0)
        await caller.until(Audio, 2 + 2 * WINDOW_FRAME)
        handler.cancel()
        await asyncio.gather(handler, return_exceptions=True)
        return caller.told

    told = asyncio.run(run())
    notices = [message.data for message in told if isinstance(message, Metadata)]
    window = [data for data in notices if data.get("type") == "window"]
    assert window == ([{"type": "window", "frame": WINDOW_FRAME}] if status else [])
    assert status or [data.get("type") for data in notices] == ["session"], "as stock clients always were"
