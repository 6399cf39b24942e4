"""Hostile clients of every protocol, over real sockets: bounded, typed, and nobody else's trouble. Those that
do not read are in test_protocol_hostile_readers.py."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import websockets
from clients import carrier, telephone
from protocol_service import ProtocolService, ScriptedReplica

PATHS = ("v1/live/sessions", "v1/realtime", "twilio/media", "telnyx/media", "asterisk/media")
FORM = {"encoding": "PCMU", "sample_rate": 8_000, "channels": 1}
OPENING = {
    "v1/live/sessions": '{"type": "session.start", "session": {"model": "m"}}',
    "v1/realtime": '{"type": "session.update", "session": {"type": "realtime"}}',
    "telnyx/media": json.dumps({"event": "start", "stream_id": "s", "start": {"media_format": FORM}}),
    "asterisk/media": '{"event": "MEDIA_START", "format": "slin24"}',
}
SPOKEN = {
    "v1/live/sessions": lambda data: json.dumps({"type": "session.input_audio.append", "audio": data}),
    "v1/realtime": lambda data: json.dumps({"type": "input_audio_buffer.append", "audio": data}),
    "twilio/media": lambda data: json.dumps({"event": "media", "media": {"chunk": "1", "payload": data}}),
    "telnyx/media": lambda data: json.dumps({"event": "media", "media": {"chunk": "1", "payload": data}}),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProtocolService]:
    protocols = ("live", "realtime", "twilio", "telnyx", "asterisk")
    settings = telephone.settings(tmp_path_factory.mktemp("twilio"))
    with ProtocolService(protocols=protocols, sessions_per_address=0, **settings) as running:
        yield running


@pytest.fixture(autouse=True)
def unharmed(service: ProtocolService) -> Iterator[None]:
    """After each attack nothing is held, and a session begins at once."""
    yield
    deadline = time.monotonic() + 10
    while service.gateway._room.open and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.gateway._room.open == 0
    assert not ScriptedReplica.held

    async def begin() -> None:
        async with websockets.connect(f"ws://{service.base}/v1/live/sessions") as socket:
            await socket.send(OPENING["v1/live/sessions"])
            assert json.loads(await asyncio.wait_for(socket.recv(), 5))["type"] == "session.started"

    asyncio.run(begin())


def codes(heard: list[Any]) -> set[str]:
    events = [json.loads(one) for one in heard if isinstance(one, str)]
    return {event["error"]["code"] for event in events if event.get("type") == "error"}


async def attack(service: ProtocolService, path: str, *messages: str | bytes) -> tuple[int | None, list[Any]]:
    """Sends everything at once and reads until the end or for a second; the close code, None where the
    session went on, and what came."""
    heard: list[Any] = []
    headers: dict[str, str] = {}
    opening = OPENING.get(path, "")
    if path.startswith("twilio"):
        headers, parameters = await asyncio.to_thread(telephone.ring, service.base)
        opening = carrier.Call(carrier.TWILIO).start(parameters)
    async with websockets.connect(f"ws://{service.base}/{path}", additional_headers=headers) as socket:
        try:
            for message in (opening, *messages):
                await socket.send(message)
        except websockets.ConnectionClosed:
            pass
        deadline = time.monotonic() + 2.0
        try:
            while True:
                heard.append(await asyncio.wait_for(socket.recv(), max(0.01, deadline - time.monotonic())))
                if codes(heard) and codes(heard) != {"protocol_error"}:
                    return None, heard  # it was said, and the session goes on
        except websockets.ConnectionClosed as closed:
            return closed.rcvd.code if closed.rcvd is not None else 1006, heard
        except asyncio.TimeoutError:
            return None, heard


@pytest.mark.parametrize(
    "path", ["twilio/media", "telnyx/media", "asterisk/media"]
)  # OpenAI's answer, so are throttled before
def test_a_flood_of_messages_is_ended(service: ProtocolService, path: str) -> None:
    code, heard = asyncio.run(attack(service, path, *["{}"] * 6_000))
    assert code in (1002, 1006, 1008), (code, codes(heard))  # 1006: reset, with more of it on its way


@pytest.mark.parametrize("path", PATHS)
def test_a_message_that_is_too_long_is_not_read(service: ProtocolService, path: str) -> None:
    assert asyncio.run(attack(service, path, "x" * 140_000))[0] in (1006, 1009)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 20_000, '{"type": NaN}', '{"event": 5, "type": []}', "9" * 5_000]
)
def test_json_that_is_none_is_refused_or_ends_the_call(
    service: ProtocolService, path: str, text: str
) -> None:
    code, heard = asyncio.run(attack(service, path, text))
    if path.startswith("v1"):
        assert (code, codes(heard) & {"invalid_json", "invalid_event"} != set()) == (None, True)
    else:
        ignored = text.startswith('{"type": NaN') or "event" in text  # JSON to a carrier, of no kind it has
        plain = path.startswith("asterisk") and text.startswith("9")  # a control message of older versions
        assert code == (None if ignored or plain else 1002)


@pytest.mark.parametrize("path", list(SPOKEN))
@pytest.mark.parametrize("data", ["!!!!", "AAA", "A" * 99_999, "\u0000", "éééé"])
def test_base64_that_is_none_is_refused_or_ends_the_call(
    service: ProtocolService, path: str, data: str
) -> None:
    code, heard = asyncio.run(attack(service, path, SPOKEN[path](data)))
    if path.startswith("v1"):
        assert (code, codes(heard)) == (None, {"invalid_audio"})
    else:
        assert code == 1007


@pytest.mark.parametrize("path", list(SPOKEN))
def test_audio_faster_than_real_time_is_ended(service: ProtocolService, path: str) -> None:
    second = base64.b64encode(bytes(48_000 if path.startswith("v1") else 8_000)).decode()
    said = [SPOKEN[path](second).replace('"chunk": "1"', f'"chunk": "{n}"') for n in range(1, 15)]
    code, heard = asyncio.run(attack(service, path, *said))
    assert code == 1002
    assert not path.startswith("v1") or codes(heard) == {"protocol_error"}
