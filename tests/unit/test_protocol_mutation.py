"""Every protocol's reader against damaged messages: wrong types at every field, and bytes out of place.

What must hold whatever comes: nothing is raised, every message is counted once, at most one session begins,
answers are valid events of a bounded length, and little is kept.
"""

from __future__ import annotations

import base64
import copy
import json
import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mutation import memory_within, mutants
from openai.types.beta.realtime import RealtimeServerEvent as BetaEvent
from openai.types.live import ConnectServerEvent
from openai.types.realtime import RealtimeServerEvent
from pydantic import TypeAdapter

from deployments.gateway.protocols.asterisk import AsteriskTranslator
from deployments.gateway.protocols.carriers import TELNYX, TWILIO, CarrierTranslator
from deployments.gateway.protocols.live import LiveTranslator
from deployments.gateway.protocols.realtime import RealtimeOptions, RealtimeTranslator
from deployments.gateway.protocols.realtime_dialect import Dialect
from deployments.gateway.protocols.realtime_items import TEXT_LIMIT
from deployments.gateway.protocols.translator import Begin, Reply, Translator
from personaplex.errors import PersonaplexError
from personaplex.persona import Persona
from personaplex.session.events import (
    Failed,
    PeerAudio,
    PeerEnds,
    PeerMessage,
    SendAudio,
    SendError,
    SendText,
)
from personaplex.session.moshi import MESSAGE_LIMIT

ANSWER_LIMIT = 6 * 65_536  # characters: a whole session told back, with every character escaped
AUDIO = base64.b64encode(bytes(4_800)).decode()

WRONG: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 2**53, 10**300, 0.5, -0.0, 1e308, "", "x", "é" * 40, "\ud800", "1" * 60),
    *([], {}, [[]], [{}], [None], {"a": 1}, {"type": {}}, ["audio"], "x" * 40_000, [0] * 2_000),
    *({"type": "x", "rate": []}, {"id": {"id": "x"}}, "__class__", "../../x", "null", "NaN", "\x00", "١٢"),
)

SAMPLE = 5  # of WRONG, at each field

SESSION = {
    "type": "realtime",
    "model": "m",
    "instructions": "You sell bread.",
    "output_modalities": ["audio"],
    "tools": [],
    "audio": {
        "input": {
            "format": {"type": "audio/pcm", "rate": 24_000},
            "turn_detection": {
                "type": "server_vad",
                "threshold": 0.5,
                "silence_duration_ms": 400,
                "prefix_padding_ms": 300,
                "eagerness": "auto",
            },
            "transcription": {"model": "w"},
        },
        "output": {"format": {"type": "audio/pcmu"}, "voice": {"id": "NATF2"}, "speed": 1.0},
    },
}
BETA = {
    "modalities": ["audio", "text"],
    "model": "m",
    "voice": "ash",
    "instructions": "You sell bread.",
    "temperature": 0.8,
    "input_audio_format": "pcm16",
    "output_audio_format": "g711_ulaw",
    "turn_detection": {"type": "semantic_vad", "eagerness": "low"},
    "input_audio_transcription": {"model": "w"},
}
ITEM = {"id": "i1", "type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}


def realtime(session: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "session.update", "event_id": "e1", "session": session},
        {"type": "conversation.item.create", "item": {**ITEM, "role": "system"}},
        {"type": "input_audio_buffer.append", "audio": AUDIO},
        {"type": "input_audio_buffer.commit", "event_id": "e2"},
        {"type": "input_audio_buffer.clear"},
        {"type": "response.create", "response": {"metadata": {"key": "value"}, "instructions": "x"}},
        {"type": "response.cancel", "response_id": "r"},
        {"type": "conversation.item.create", "item": {**ITEM, "id": "i2"}},
        {"type": "conversation.item.retrieve", "item_id": "i2"},
        {"type": "conversation.item.truncate", "item_id": "i2", "content_index": 0, "audio_end_ms": 5},
        {"type": "conversation.item.delete", "item_id": "i2"},
    ]


LIVE = [
    {
        "type": "session.start",
        "event_id": "e1",
        "session": {
            "model": "m",
            "instructions": "You sell bread.",
            "audio": {"format": {"type": "audio/pcm", "rate": 16_000}, "output": {"voice": "ash"}},
            "input": [{"role": "developer", "content": [{"type": "input_text", "text": "Be kind."}]}],
            "delegation": {"type": "responses", "responses": {"model": "m", "tools": []}},
        },
    },
    {"type": "session.input_audio.append", "audio": AUDIO},
    {"type": "session.input_audio.mute", "event_id": "e2"},
    {"type": "session.update", "session": {"delegation": {"type": "client"}}},
    {"type": "session.close"},
]


def carrier(stream: str, form: str, rate: str) -> list[dict[str, Any]]:
    start = {form: {"encoding": "PCMU", rate: 8_000, "channels": 1}, "customParameters": {"token0": "t"}}
    return [
        {"event": "connected", "protocol": "Call", "version": "1.0.0"},
        {"event": "start", stream: "s", "start": {stream: "s", "tracks": ["inbound"], **start}},
        *(
            {"event": "media", stream: "s", "media": {"track": "inbound", "chunk": str(n), "payload": "fn5+"}}
            for n in (1, 2, 4)
        ),
        {"event": "dtmf", "dtmf": {"digit": "1"}},
        {"event": "stop", stream: "s"},
    ]


ASTERISK = [
    {"event": "MEDIA_START", "connection_id": "c", "format": "slin24", "optimal_frame_size": 960},
    {"event": "MEDIA_XOFF"},
]

FIXED: dict[str, Any] = {"clock": lambda: 0.0, "burst_s": 1e6}
OPENAI: dict[str, Any] = {"expires_at": 1, **FIXED}


def ticketed(parameters: Any) -> Begin:
    assert all(isinstance(one, str) for pair in parameters.items() for one in pair)
    return Begin(Persona(), ticket="t")


Make = Callable[[], Translator]
PROTOCOLS: dict[str, tuple[Make, list[dict[str, Any]], TypeAdapter[Any] | None]] = {
    "live": (
        lambda: LiveTranslator("s" * 32, Persona(), voices={}, **OPENAI),
        LIVE,
        TypeAdapter(ConnectServerEvent),
    ),
    "realtime": (
        lambda: RealtimeTranslator(
            "s" * 32, Persona(), Dialect.GA, RealtimeOptions({}, transcribes=True), model="m", **OPENAI
        ),
        realtime(SESSION),
        TypeAdapter(RealtimeServerEvent),
    ),
    "realtime-beta": (
        lambda: RealtimeTranslator(
            "s" * 32, Persona(), Dialect.BETA, RealtimeOptions({}, transcribes=True), model="m", **OPENAI
        ),
        realtime(BETA),
        TypeAdapter(BetaEvent),
    ),
    "twilio": (
        lambda: CarrierTranslator(TWILIO, ticketed, **FIXED),
        carrier("streamSid", "mediaFormat", "sampleRate"),
        None,
    ),
    "telnyx": (
        lambda: CarrierTranslator(TELNYX, ticketed, **FIXED),
        carrier("stream_id", "media_format", "sample_rate"),
        None,
    ),
    "asterisk": (lambda: AsteriskTranslator(Persona(), **FIXED), ASTERISK, None),
}


class Reader:
    """A session's reader with what must hold of every message."""

    def __init__(self, name: str) -> None:
        make, self.messages, self._type = PROTOCOLS[name]
        self.translator = make()
        self.begun = 0
        self.ended = False
        for message in self.translator.open():
            self._check_answer(message)

    def read(self, message: str | bytes) -> None:
        if self.ended:
            return
        counted = 0
        for meaning in self.translator.read(message):
            match meaning:
                case PeerAudio(data, size):
                    counted += size > 0
                    assert len(data) < 60 * MESSAGE_LIMIT
                    self._hear(data)
                case PeerMessage():
                    counted += 1
                case Reply(answer):
                    self._check_answer(answer)
                case Begin():
                    self.begun += 1
                case Failed(error):
                    assert isinstance(error, PersonaplexError)
                    self.ended = True
                case PeerEnds():
                    self.ended = True
                case _:
                    raise AssertionError(meaning)
        assert counted == 1
        assert self.begun <= 1

    def _hear(self, data: bytes) -> None:
        assert self.begun == 1
        for frame in self.translator.transcoder.receive(data):
            page = self.translator.transcoder.send(frame)
            for command in (SendAudio(page), SendText(" so")):
                for message in self.translator.write(command):
                    self._check_answer(message)

    def _check_answer(self, answer: str | bytes) -> None:
        assert len(answer) < ANSWER_LIMIT
        if self._type is not None:
            self._type.validate_python(json.loads(answer))

    def end(self) -> None:
        for message in self.translator.write(SendError("gone", None)):
            self._check_answer(message)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of every value within a JSON value, but not itself."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(message: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy with another value there; without it where that is `...`."""
    told = copy.deepcopy(message)
    at: Any = told
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return told


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_wrong_types_at_every_field(name: str) -> None:
    """Each change alone, in its place among good messages."""
    messages = PROTOCOLS[name][1]
    chance = random.Random(zlib.crc32(name.encode()))
    with memory_within(48):
        for number, message in enumerate(messages):
            for path in places(message):
                for value in (..., *chance.sample(WRONG, SAMPLE)):
                    reader = Reader(name)
                    for good in messages[:number] if chance.random() < 0.5 else messages[:1]:
                        reader.read(json.dumps(good))
                    reader.read(json.dumps(changed(message, path, value)))
                    reader.read(json.dumps(message))
                    reader.end()


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_bytes_out_of_place(name: str) -> None:
    """A whole session with each message damaged or not, as text and as bytes."""
    messages = [json.dumps(one).encode() for one in PROTOCOLS[name][1]]
    chance = random.Random(zlib.crc32(name.encode()) + 1)
    with memory_within(48):
        for _ in range(50):
            reader = Reader(name)
            for good in messages:
                (damaged,) = mutants(good, 1, chance)
                reader.read(good.decode() if chance.random() < 0.5 else damaged.decode(errors="replace"))
                if chance.random() < 0.1:
                    reader.read(damaged)
            reader.end()


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name.startswith(("live", "realtime"))])
def test_deep_and_huge_json_is_one_refusal(name: str) -> None:
    reader = Reader(name)
    with memory_within(64):
        for text in ("[" * 130_000, '{"a":' * 25_000, "1" * 131_000, '"' + "\\u0000" * 20_000, "{" * 131_073):
            reader.read(text)
        reader.read(json.dumps({"type": "x", "a": [[[]] * 20_000]}))
    assert not reader.ended


@pytest.mark.parametrize("name", ["realtime", "realtime-beta"])
def test_what_a_client_makes_us_keep_is_bounded(name: str) -> None:
    reader = Reader(name)
    text = {"type": "input_text", "text": "x" * 120_000}
    with memory_within(12):
        for number in range(40):
            item = {**ITEM, "id": f"i{number}", "content": [text]}
            reader.read(json.dumps({"type": "conversation.item.create", "item": item}))
    items = reader.translator._items._kept.values()  # type: ignore[attr-defined]
    kept = sum(len(part["text"]) for item in items for part in item["content"])
    assert 0 < kept <= TEXT_LIMIT
    reader.read(json.dumps({"type": "conversation.item.delete", "item_id": "i39"}))
    assert reader.translator._items._text == kept - 120_000  # type: ignore[attr-defined]


def error_of(name: str, message: dict[str, Any]) -> str | None:
    make, _, _ = PROTOCOLS[name]
    told = [json.loads(one.message) for one in make().read(json.dumps(message)) if isinstance(one, Reply)]
    return next((event["error"]["code"] for event in told if event["type"] == "error"), None)


def test_names_and_roles_that_are_too_long_are_refused() -> None:
    long, name = "x" * 33_000, "m" * 257
    developer = {"role": "developer", "content": [{"text": long}]}
    for session, code in (
        ({"model": "m", "instructions": long}, "instructions_too_long"),
        ({"model": "m", "input": [developer]}, "instructions_too_long"),
        ({"model": name}, "invalid_value"),
        ({"model": "m", "delegation": {"type": "responses", "responses": {"model": name}}}, "invalid_value"),
    ):
        assert error_of("live", {"type": "session.start", "session": session}) == code
    for update, code in (
        ({"instructions": long}, "instructions_too_long"),
        ({"model": name}, "invalid_value"),
        ({"audio": {"input": {"transcription": {"model": name}}}}, "invalid_value"),
    ):
        told = {"type": "session.update", "session": {"type": "realtime", **update}}
        assert error_of("realtime", told) == code
    system = {**ITEM, "role": "system", "content": [{"text": long}]}
    told = {"type": "conversation.item.create", "item": system}
    assert error_of("realtime", told) == "instructions_too_long"
