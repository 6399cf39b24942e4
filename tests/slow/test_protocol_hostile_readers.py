"""Clients that do not read what they are sent, of every protocol, over real sockets: what waits for them is
bounded in bytes, by two guards each of which suffices alone.

    reading   a gateway reads nothing from a client that does not read (deployments/ingress.py)
    outbox    a session ends when more waits for its client than one may leave unread (outbox.py)

Each attack also runs with both guards taken out, and must exceed the bound then: a measurement that cannot
fail would prove nothing. What the kernel buffers is not counted; where a test has no patience for filling it,
its buffers are small.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import json
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import websockets
from clients import carrier, telephone
from protocol_service import ProtocolService, ScriptedReplica, utterance
from rawsocket import CLOSE, TEXT, Raw, Target, frame
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from deployments import connections, ingress
from deployments.gateway import outbox
from personaplex.audio.g711 import MU_LAW
from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SECONDS

SMALL = 4_096  # bytes of a kernel's buffer, and of what a transport keeps before it says stop, for talkers
IDLE_S = 2.0
LINGER_S = 0.5
TALKERS: dict[str, Any] = {"send_buffer": SMALL, "idle_limit_s": IDLE_S}
ADDRESSES = map("127.0.0.{}".format, range(2, 255))  # each is one caller: some may not come again at once


@pytest.fixture(scope="module")
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ProtocolService]:
    """By its parameter, options of the service's."""
    settings = telephone.settings(tmp_path_factory.mktemp("twilio"))
    protocols = ("live", "realtime", "twilio", "telnyx", "asterisk")
    with pytest.MonkeyPatch.context() as patch:
        made = ingress.WebSocket.connection_made

        def connection_made(self: Any, transport: Any) -> None:
            if "send_buffer" in request.param:
                transport.set_write_buffer_limits(high=SMALL)
            made(self, transport)

        patch.setattr(ingress.WebSocket, "connection_made", connection_made)
        patch.setattr(connections.PromptHttp, "linger_s", LINGER_S)
        options = {"protocols": protocols, "sessions_per_address": 0, **settings, **request.param}
        with ProtocolService(**options) as running:
            yield running


@pytest.fixture(autouse=True)
def unharmed(service: ProtocolService) -> Iterator[None]:
    """After each attack no session, slot or socket is left."""
    service.metrics.totals.clear()
    yield
    wait_for(lambda: not (service.gateway._room.open or service.connections or ScriptedReplica.held), 8.0)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def without(patch: pytest.MonkeyPatch, *guards: str) -> None:
    if "reading" in guards:
        patch.setattr(ingress.WebSocket, "pause_writing", WebSocketsSansIOProtocol.pause_writing)
    if "outbox" in guards:
        patch.setattr(outbox, "BYTE_LIMIT", 1 << 40)
        patch.setattr(outbox, "MESSAGE_LIMIT", 1 << 40)


# Short questions with long answers

QUESTIONS = 1_500
LONG = "x" * 30_000
OPENING = {
    "v1/live/sessions": {"type": "session.start", "session": {"model": "m", "instructions": LONG}},
    "v1/realtime": {
        "type": "conversation.item.create",
        "item": {"id": "i", "role": "user", "content": [{"type": "input_text", "text": LONG}]},
    },
}
QUESTION = {
    "v1/live/sessions": {"type": "session.update", "session": {}},
    "v1/realtime": {"type": "conversation.item.retrieve", "item_id": "i"},
}
ANSWER = {"v1/live/sessions": "session.updated", "v1/realtime": "conversation.item.retrieved"}
# Beside the limit: questions that were read and not parsed, an answer as text, as bytes and as a frame, and
# what a transport takes before it says stop.
BOUND = outbox.BYTE_LIMIT + (1 << 19)


def ask(service: ProtocolService, path: str) -> tuple[int, int, int | None]:
    """Asks without reading; then reads all. The most bytes that this process came to hold, how many answers
    there were, and the close code, if we were closed."""
    text = frame(TEXT, json.dumps(OPENING[path]).encode())
    many = frame(TEXT, json.dumps(QUESTION[path]).encode()) * QUESTIONS
    with Raw(Target("127.0.0.1", service.port, f"/{path}")) as raw:
        raw.upgrade()
        raw.socket.settimeout(0.5)
        gc.collect()
        tracemalloc.start()
        try:
            with contextlib.suppress(TimeoutError):
                raw.pour(text)
                raw.pour(many)
            time.sleep(0.7)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        raw.socket.settimeout(2.0)
        answers, code = 0, None
        for opcode, data in raw.frames():
            if opcode == CLOSE:
                code = int.from_bytes(data[:2])
                break
            answers += ANSWER[path].encode() in data[:100]
            if answers == QUESTIONS:
                break
    return peak, answers, code


@pytest.mark.parametrize("service", [{}], indirect=True, ids=["usual"])
@pytest.mark.parametrize("path", list(QUESTION))
@pytest.mark.parametrize("missing", [(), ("reading",), ("outbox",), ("reading", "outbox")], ids=str)
def test_answers_that_nobody_reads_are_bounded_in_bytes(
    service: ProtocolService, path: str, missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, *missing)
    peak, answers, code = ask(service, path)
    if len(missing) == 2:
        assert peak > 5 * BOUND, "what was asked for is far more than the bound, or this test proves nothing"
        return
    assert peak < BOUND
    if missing == ("reading",):
        assert code == 1008
        assert answers < QUESTIONS
    else:
        assert (answers, code) == (QUESTIONS, None), "who reads at last gets everything"


# Talkers

FRAMES = 56
LIMIT = 10  # messages that may wait, instead of 256: so that a test is over in seconds
TONE = [utterance(number) for number in range(FRAMES)]


def speech(path: str) -> tuple[list[bytes | str], list[list[bytes | str]]]:
    """What opens a session of this protocol, and what says each frame."""
    pcm = [(tone * 32_767).astype("<i2").tobytes() for tone in TONE]
    if path == "api/chat":
        sender = Transcoder()
        pages = [b"\x01" + page for page in sender.headers()]
        return [*pages], [[b"\x01" + sender.send(tone)] for tone in TONE]
    if path == "asterisk/media":
        return ['{"event": "MEDIA_START", "format": "slin24"}'], [[data] for data in pcm]
    if path.startswith("v1"):
        kind = f"{'session.input_audio' if 'live' in path else 'input_audio_buffer'}.append"
        first = '{"type": "session.start", "session": {"model": "m"}}' if "live" in path else None
        said = [json.dumps({"type": kind, "audio": base64.b64encode(data).decode()}) for data in pcm]
        return [first] if first else [], [[one] for one in said]
    call = carrier.Call(carrier.DIALECTS[path.partition("/")[0]])
    sound = [MU_LAW.encode((tone[::3] * 32_767).astype(np.int16)) for tone in TONE]
    said = [[call.media(piece) for piece in carrier.pieces(data)] for data in sound]
    return [call.connected(), call.start()], said


PATHS = ("api/chat", "v1/live/sessions", "v1/realtime", "twilio/media", "telnyx/media", "asterisk/media")
NAMES = ("chat", "live", "realtime", "twilio", "telnyx", "asterisk")


def upgrade(service: ProtocolService, path: str) -> tuple[dict[str, str], dict[str, str]]:
    """Headers of the upgrade, and parameters of the call."""
    return telephone.ring(service.base) if path.startswith("twilio") else ({}, {})


async def talk(service: ProtocolService, path: str, read: Callable[[Any], Any]) -> None:
    """Speaks in real time for as long as the connection lasts; `read` does what the client does besides."""
    headers, parameters = await asyncio.to_thread(upgrade, service, path)
    opening, frames = speech(path)
    if parameters:
        opening[-1] = carrier.Call(carrier.TWILIO).start(parameters)
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1_400)  # a window of less than one is none
    plain.bind((next(ADDRESSES), 0))
    plain.connect(("127.0.0.1", service.port))
    plain.setblocking(False)
    url = f"ws://{service.base}/{path}"
    options: Any = {"sock": plain, "additional_headers": headers, "max_queue": 1, "ping_interval": None}
    async with websockets.connect(url, compression=None, close_timeout=0.2, **options) as ws:
        reading = asyncio.ensure_future(read(ws))
        began = time.monotonic()
        with contextlib.suppress(websockets.ConnectionClosed, TimeoutError):
            for message in opening:
                await ws.send(message)
            for number, messages in enumerate(frames):
                await asyncio.sleep(max(0.0, began + number * FRAME_SECONDS - time.monotonic()))
                for message in messages:
                    await asyncio.wait_for(ws.send(message), 1.0)
        await reading
        ws.transport.abort()


@pytest.fixture
def unsent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many messages waited for any client, each time one was added."""
    counts, put = [0], outbox.Outbox.put

    def counted(self: outbox.Outbox, message: Any) -> None:
        put(self, message)
        counts.append(len(self))

    monkeypatch.setattr(outbox.Outbox, "put", counted)
    return counts


@pytest.mark.parametrize("service", [TALKERS], indirect=True, ids=["small"])
@pytest.mark.parametrize("missing", [(), ("reading",), ("reading", "outbox")], ids=str)
def test_a_talker_that_reads_nothing_is_not_waited_for(
    service: ProtocolService, missing: tuple[str, ...], unsent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of each protocol at once. Where nothing is read from it, its time without audio ends it; where it
    is read from, what waits for it does."""
    monkeypatch.setattr(outbox, "MESSAGE_LIMIT", LIMIT)
    without(monkeypatch, *missing)

    async def nothing(ws: Any) -> None:
        return

    async def run() -> None:
        await asyncio.gather(*(talk(service, path, nothing) for path in PATHS))

    def ended() -> dict[str, str]:
        totals = list(service.metrics.totals)
        return {key[2]: key[1] for key in totals if key[0] == "personaplex_sessions_ended"}

    asyncio.run(run())
    if len(missing) == 2:
        assert max(unsent) > LIMIT + 2, "or this test proves nothing"
    else:
        wait_for(lambda: set(ended()) >= set(NAMES), 30.0)  # the client is told before it is counted
        assert max(unsent) <= LIMIT + 2
        assert ended() == dict.fromkeys(NAMES, "ClientError" if missing else "SessionIdle")


@pytest.mark.parametrize("service", [TALKERS], indirect=True, ids=["small"])
def test_a_talker_that_reads_late_misses_nothing(service: ProtocolService) -> None:
    """A second without reading, as of a page in the background."""
    heard: dict[str, int] = {}

    async def run(path: str) -> None:
        async def late(ws: Any) -> None:
            await ws.recv()
            await asyncio.sleep(1.0)
            heard[path] = 1
            with contextlib.suppress(TimeoutError, websockets.ConnectionClosed):
                while True:
                    message = await asyncio.wait_for(ws.recv(), 1.0)
                    heard[path] += is_audio(message)

        await talk(service, path, late)

    def is_audio(message: bytes | str) -> bool:
        if isinstance(message, bytes):
            return message[:1] == b"\x01" or len(message) == 3_840
        event = json.loads(message)
        return event.get("event") == "media" or "audio.delta" in event.get("type", "")

    async def all_of_them() -> None:
        await asyncio.gather(*map(run, PATHS))

    asyncio.run(all_of_them())
    assert set(heard) == set(PATHS)
    assert all(count >= FRAMES - 2 for count in heard.values()), heard
