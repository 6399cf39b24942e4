"""A replica dies under sessions of other protocols: their clients hear a gap, and events that stay legal."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import openai.types.realtime as ga_types
import pytest
from loopback import Counted, Fleet, MemoryEngine, fleet_of, services
from openai.types.live import ConnectServerEvent
from pydantic import TypeAdapter
from starlette.websockets import WebSocket, WebSocketState

from deployments.gateway.conversation import Conversation
from deployments.gateway.leases import Claim
from deployments.gateway.protocols.asterisk import AsteriskTranslator
from deployments.gateway.protocols.carriers import TWILIO, CarrierTranslator
from deployments.gateway.protocols.live import LiveTranslator
from deployments.gateway.protocols.realtime import RealtimeOptions, RealtimeTranslator
from deployments.gateway.protocols.realtime_dialect import Dialect
from deployments.gateway.protocols.translator import Begin, Translator
from deployments.metrics import FAILOVERS
from deployments.wire.messages import LeaseRequest
from personaplex.config import FRAME_SIZE
from personaplex.persona import Persona

FRAMES, KILL_AT = 24, 10
FIXED: dict[str, Any] = {"clock": lambda: 0.0, "burst_s": 1e6}
OPENAI: dict[str, Any] = {"expires_at": 1, **FIXED}
SOUND = np.random.default_rng(2).integers(-9_000, 9_000, (FRAMES, FRAME_SIZE)).astype("<i2")
EVENTS: dict[str, TypeAdapter[Any]] = {
    "live": TypeAdapter(ConnectServerEvent),
    "realtime": TypeAdapter(ga_types.RealtimeServerEvent),
}


def translator(name: str) -> Translator:
    match name:
        case "live":
            return LiveTranslator("s" * 32, Persona(), voices={}, **OPENAI)
        case "realtime":
            options = RealtimeOptions({})
            return RealtimeTranslator("s" * 32, Persona(), Dialect.GA, options, model="m", **OPENAI)
        case "twilio":
            return CarrierTranslator(TWILIO, lambda parameters: Begin(Persona()), **FIXED)
        case _:
            return AsteriskTranslator(Persona(), **FIXED)


def opening(name: str) -> list[str]:
    form = {"encoding": "audio/x-mulaw", "sampleRate": 8_000, "channels": 1}
    return {
        "live": ['{"type": "session.start", "session": {"model": "m"}}'],
        "realtime": ['{"type": "response.create"}'],
        "twilio": [json.dumps({"event": "start", "streamSid": "s", "start": {"mediaFormat": form}})],
        "asterisk": ['{"event": "MEDIA_START", "format": "slin24"}'],
    }[name]


def said(name: str, number: int) -> str | bytes:
    frame = SOUND[number].tobytes()
    audio = base64.b64encode(frame).decode()
    payload = base64.b64encode(bytes([number]) * 640).decode()
    return {
        "live": json.dumps({"type": "session.input_audio.append", "audio": audio}),
        "realtime": json.dumps({"type": "input_audio_buffer.append", "audio": audio}),
        "twilio": json.dumps({"event": "media", "media": {"chunk": str(number + 1), "payload": payload}}),
        "asterisk": frame,
    }[name]


class Client:
    """A socket, as Starlette gives it, whose client is a test."""

    client_state = application_state = WebSocketState.CONNECTED

    def __init__(self, name: str) -> None:
        self.name = name
        self.messages: list[str | bytes] = []
        self.code: int | None = None
        self._said: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def say(self, message: str | bytes) -> None:
        kind = "text" if isinstance(message, str) else "bytes"
        self._said.put_nowait({"type": "websocket.receive", kind: message})

    def leave(self) -> None:
        self._said.put_nowait({"type": "websocket.disconnect", "code": 1000})

    async def receive(self) -> dict[str, Any]:
        message = await self._said.get()
        if message["type"] == "websocket.disconnect":
            self.client_state = WebSocketState.DISCONNECTED
        return message

    async def send_text(self, text: str) -> None:
        self.messages.append(text)

    async def send_bytes(self, data: bytes) -> None:
        self.messages.append(data)

    async def close(self, code: int, reason: str = "") -> None:
        self.code = code

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(one) for one in self.messages if isinstance(one, str)]

    @property
    def audio(self) -> list[bytes]:
        if self.name == "asterisk":
            return [one for one in self.messages if isinstance(one, bytes)]
        if self.name == "twilio":
            return [
                base64.b64decode(one["media"]["payload"]) for one in self.events if one["event"] == "media"
            ]
        kind = {"live": "session.output_audio.delta", "realtime": "response.output_audio.delta"}[self.name]
        return [base64.b64decode(one["delta"]) for one in self.events if one["type"] == kind]


def audible(name: str) -> int:
    """Frames that are sent of FRAMES: Realtime leaves the engine's first one out, which is silent."""
    return FRAMES - (name == "realtime")


async def until(condition: Callable[[], Any]) -> None:
    async def wait() -> None:
        while not condition():  # noqa: ASYNC110  of sockets, links and timers
            await asyncio.sleep(0.02)

    await asyncio.wait_for(wait(), 30)


async def talk(client: Client, fleet: Fleet, counted: Counted, *, spare: bool) -> None:
    """A whole session whose replica is killed in the middle of the agent's speech."""
    lent = services(fleet, counted, after_s=5.0, queue_timeout_s=0.5 if not spare else 20.0)

    async def claim(persona: Persona, ticket: str) -> tuple[Persona, Claim]:
        return persona, await lent.leases.claim(LeaseRequest.of("s" * 32, persona))

    socket = cast(WebSocket, client)
    conversation = Conversation(socket, "s" * 32, lent, protocol=translator(client.name), begin=claim)
    running = asyncio.ensure_future(conversation.run())
    for message in opening(client.name):
        client.say(message)
    await until(lambda: any(one.used for one in fleet.replicas))
    for number in range(FRAMES):
        client.say(said(client.name, number))
        await asyncio.sleep(0.06)
        if number == KILL_AT:
            await until(lambda: len(client.audio) > KILL_AT // 2)
            fleet.kill(next(one for one in fleet.replicas if one.used))
    if spare:
        await until(lambda: len(client.audio) >= audible(client.name))
    else:
        await until(lambda: client.code is not None)
    client.leave()
    await asyncio.wait_for(running, 20)


def session(name: str, *, spare: bool) -> tuple[Client, Counted]:
    client, counted = Client(name), Counted()

    async def run() -> None:
        async with fleet_of(2 if spare else 1, lambda: MemoryEngine(2), slots=2) as fleet:
            await talk(client, fleet, counted, spare=spare)

    asyncio.run(asyncio.wait_for(run(), 60))
    return client, counted


@pytest.mark.parametrize("name", ["live", "realtime", "twilio", "asterisk"])
def test_a_dead_replica_is_a_gap_and_nothing_else(name: str) -> None:
    client, counted = session(name, spare=True)
    assert counted.totals[FAILOVERS.name, "continued"] == 1
    assert client.code is None
    assert len(client.audio) == audible(name)
    if name in EVENTS:
        for event in client.events:
            EVENTS[name].validate_python(event)
        assert not [event for event in client.events if event["type"] == "error"]
    if name != "twilio":  # the engine answers with the frame before, across the failover too
        assert b"".join(client.audio[1 - FRAMES :]) == SOUND[: FRAMES - 1].tobytes()
    if name == "live":
        starts = [one["start_ms"] for one in client.events if one["type"] == "session.output_audio.delta"]
        assert starts == [80 * number for number in range(FRAMES)]
    if name == "realtime":
        kinds = [event["type"] for event in client.events]
        assert kinds.count("response.created") == kinds.count("conversation.item.added") == 1
        assert kinds.count("response.done") == 0  # the same stretch of speech goes on


@pytest.mark.parametrize("name", ["live", "realtime", "twilio", "asterisk"])
def test_a_replica_that_nobody_can_replace_ends_in_order(name: str) -> None:
    client, counted = session(name, spare=False)
    assert client.code in (1012, 1013)
    assert (FAILOVERS.name, "continued") not in counted.totals
    if name == "live":
        assert [event["type"] for event in client.events][-2:] == ["error", "session.closed"]
        assert client.events[-1]["reason"] == "connection_lost"
    elif name == "realtime":
        kinds = [event["type"] for event in client.events]
        assert kinds.count("response.created") == kinds.count("response.done") == 1
        (done,) = [one["response"] for one in client.events if one["type"] == "response.done"]
        assert (done["status"], kinds[-1]) == ("failed", "error")
    elif name == "twilio":
        assert client.events[-1] == {"event": "clear", "streamSid": "s"}
    else:
        assert client.messages[-1] == '{"command":"FLUSH_MEDIA"}'
