"""OpenAI's Live protocol: what clients' events mean, and that all that is told back is of the types."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from openai.types.live import ConnectServerEvent
from pydantic import TypeAdapter

from deployments.gateway.protocols.live import CONTEXT_FRAMES, LiveTranslator
from deployments.gateway.protocols.translator import Begin, Read, Reply
from personaplex.errors import NoCapacity, SessionExpired, SessionLost
from personaplex.persona import Persona
from personaplex.session.events import (
    PeerAudio,
    PeerEnds,
    PeerMessage,
    SendAudio,
    SendError,
    SendHandshake,
    SendText,
    SendUserText,
    UserText,
    UserTextLost,
)
from personaplex.words import Segment, Word

SERVER_EVENT: TypeAdapter[Any] = TypeAdapter(ConnectServerEvent)
PAGE = (np.arange(1_920) % 500).astype("<i2").tobytes()


def valid(message: str | bytes) -> dict[str, Any]:
    """One server event as its client sees it, of the package's types."""
    assert isinstance(message, str)
    event = json.loads(message)
    kind = type(SERVER_EVENT.validate_python(event))
    kind.model_validate_json(message, strict=True)
    assert kind.model_fields["type"].annotation.__args__ == (event["type"],)
    return dict(event)


class Talk:
    """A translator, and what it told."""

    def __init__(self, **options: Any) -> None:
        values = {"voices": {}, "expires_at": 1_900_000_000, "clock": lambda: 0.0, "burst_s": 6.0}
        self.translator = LiveTranslator("0123456789abcdef", Persona(), **{**values, **options})
        self.told: list[dict[str, Any]] = []

    def says(self, kind: str, **fields: Any) -> list[Read]:
        return self.reads(json.dumps({"type": kind, **fields}))

    def reads(self, message: str | bytes) -> list[Read]:
        meanings = list(self.translator.read(message))
        self.told += [valid(one.message) for one in meanings if isinstance(one, Reply)]
        assert sum(isinstance(one, (PeerAudio, PeerMessage)) for one in meanings) == 1
        return [one for one in meanings if not isinstance(one, Reply)]

    def is_told(self, *commands: Any) -> list[dict[str, Any]]:
        events = [valid(one) for command in commands for one in self.translator.write(command)]
        self.told += events
        return events

    def started(self, **session: Any) -> Persona:
        _, begin = self.says("session.start", session={"model": "personaplex", **session}, event_id="mine")
        assert isinstance(begin, Begin)
        return begin.persona


def audio(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_a_session_from_start_to_close() -> None:
    talk = Talk()
    talk.started(instructions="You are a baker.", audio={"output": {"voice": "cedar"}})
    (started,) = talk.is_told(SendHandshake())
    assert started["client_event_id"] == "mine"
    assert started["session"]["audio"]["format"] == {"type": "audio/pcm", "rate": 24_000}
    (heard,) = talk.says("session.input_audio.append", audio=audio(PAGE))
    assert isinstance(heard, PeerAudio)
    assert heard.data == PAGE
    assert heard.size > len(audio(PAGE))
    delta, text = talk.is_told(SendAudio(PAGE), SendText(" Hello"))
    assert base64.b64decode(delta["delta"]) == PAGE
    assert (delta["start_ms"], delta["end_ms"]) == (0, 80)
    assert (text["delta"], text["start_ms"], text["end_ms"]) == (" Hello", 0, 80)
    assert talk.says("session.close", event_id="bye")[1:] == [PeerEnds()]
    closed = talk.told[-1]
    assert (closed["type"], closed["reason"], closed["client_event_id"]) == (
        "session.closed",
        "close_requested",
        "bye",
    )
    assert closed["usage"] == {"seconds": 0.08}


def test_who_the_agent_is() -> None:
    assert Talk().started() == Persona()
    assert Talk().started(instructions="", audio={"output": {"voice": {"id": "VARM1"}}}) == Persona(
        "VARM1", ""
    )
    aliases = {"marin": "VARF3"}
    assert Talk(voices=aliases).started(audio={"output": {"voice": "marin"}}).voice == "VARF3"
    assert Talk().started(audio={"output": {"voice": "marin"}}).voice == "NATF2"
    developer = {"role": "developer", "content": [{"type": "input_text", "text": "The shop closes at six."}]}
    persona = Talk().started(instructions="You are a baker.", input=[developer])
    assert persona.text_prompt == "You are a baker.\nThe shop closes at six."
    assert Talk().started(input=[developer]).text_prompt == "The shop closes at six."


def test_what_the_model_cannot_do_is_said_once_and_ends_nothing() -> None:
    talk = Talk()
    tools = {"type": "responses", "responses": {"model": "m", "tools": [{"type": "web_search"}]}}
    user = {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}
    talk.started(delegation=tools, input=[user])
    started, *notes = talk.is_told(SendHandshake())
    assert started["session"]["delegation"]["responses"] == {"model": "m"}
    assert [note["code"] for note in notes] == ["history_not_heard", "tools_not_supported"]
    for kind in ("session.instructions.append", "response.create", "decision.create", "nonsense"):
        talk.says(kind, event_id="e")
        assert talk.told[-1]["error"]["code"] == "unsupported"
        assert talk.told[-1]["error"]["client_event_id"] == "e"


def test_the_first_event_is_session_start_and_there_is_one() -> None:
    talk = Talk()
    talk.says("session.input_audio.append", audio=audio(PAGE))
    assert talk.told[-1]["error"]["code"] == "session_not_started"
    talk.started()
    talk.says("session.start", session={"model": "m"})
    assert talk.told[-1]["error"]["code"] == "session_already_started"


@pytest.mark.parametrize(
    ("session", "code"),
    [
        ({}, "invalid_type"),
        ({"model": 5}, "invalid_type"),
        ({"model": "m", "instructions": 5}, "invalid_type"),
        ({"model": "m", "instructions": "\ud800"}, "invalid_value"),
        ({"model": "m", "audio": []}, "invalid_type"),
        ({"model": "m", "audio": {"format": {"type": "audio/pcm", "rate": 44_100}}}, "unsupported_format"),
        ({"model": "m", "audio": {"format": {"type": "audio/pcm", "rate": [1]}}}, "invalid_type"),
        ({"model": "m", "audio": {"format": {"type": "audio/opus"}}}, "unsupported_format"),
        ({"model": "m", "audio": {"output": {"voice": "../NATF2"}}}, "unknown_voice"),
        ({"model": "m", "audio": {"output": {"voice": 7}}}, "unknown_voice"),
        ({"model": "m", "input": [{"role": "user", "content": []}]}, "invalid_value"),
        ({"model": "m", "input": [{"role": "tool", "content": [{"text": "x"}]}]}, "invalid_value"),
        ({"model": "m", "input": [{}] * 129}, "invalid_value"),
        ({"model": "m", "delegation": "client"}, "invalid_type"),
    ],
)
def test_a_session_that_cannot_be_is_refused_and_may_be_asked_for_again(session: Any, code: str) -> None:
    talk = Talk()
    assert not any(isinstance(one, Begin) for one in talk.says("session.start", session=session))
    assert talk.told[-1]["error"]["code"] == code
    talk.started()


@pytest.mark.parametrize(("kind", "rate", "silence"), [("audio/pcm", 16_000, 0), ("audio/pcmu", 8_000, 0xFF)])
def test_mute_feeds_silence_of_the_format(kind: str, rate: int, silence: int) -> None:
    talk = Talk()
    talk.started(audio={"format": {"type": kind, "rate": rate}})
    frame = bytes([7, 1]) * (rate * 2 // 25) if kind == "audio/pcm" else bytes([7]) * (rate * 2 // 25)
    talk.says("session.input_audio.mute")
    (heard,) = talk.says("session.input_audio.append", audio=audio(frame))
    assert isinstance(heard, PeerAudio)
    assert set(heard.data) == {silence}
    talk.says("session.input_audio.unmute")
    (heard,) = talk.says("session.input_audio.append", audio=audio(frame))
    assert isinstance(heard, PeerAudio)
    assert heard.data == frame
    assert [event["type"] for event in talk.told] == [
        "session.input_audio.muted",
        "session.input_audio.unmuted",
    ]


def test_chunks_of_any_size_become_whole_frames() -> None:
    talk = Talk()
    talk.started()
    sent = np.random.default_rng(0).integers(0, 256, 10 * len(PAGE)).astype(np.uint8).tobytes()
    heard = b""
    for start in range(0, len(sent), 962):
        for one in talk.says("session.input_audio.append", audio=audio(sent[start : start + 962])):
            if isinstance(one, PeerAudio):
                assert len(one.data) % len(PAGE) == 0
                heard += one.data
    assert heard == sent


@pytest.mark.parametrize("text", ["", "x", "AAA", "AA==\n", "é", "AA=", 7, None, ["AAAA"]])
def test_audio_that_is_no_base64_of_whole_samples(text: Any) -> None:
    talk = Talk()
    talk.started()
    (meaning,) = talk.says("session.input_audio.append", audio=text)
    assert isinstance(meaning, PeerMessage)
    assert not talk.told if text == "" else talk.told[-1]["error"]["code"] == "invalid_audio"


@pytest.mark.parametrize(
    "message",
    [
        "",
        "{",
        "[]",
        "5",
        '"x"',
        "{}",
        '{"type": 5}',
        "[" * 100_000,
        '{"a":' * 20_000,
        '{"type":NaN}',
        "9" * 6_000,
    ],
)
def test_messages_that_are_no_events(message: str) -> None:
    talk = Talk()
    (meaning,) = talk.reads(message)
    assert meaning == PeerMessage(len(message), known=False)
    assert talk.told[-1]["error"]["code"] in ("invalid_json", "invalid_event")


def test_binary_messages_and_long_ones_count_and_are_not_read() -> None:
    talk = Talk()
    assert talk.reads(b"\x01abc") == [PeerMessage(4, known=False)]
    assert not talk.told
    talk.reads('{"type": "session.close", "x": "' + "y" * 131_072 + '"}')
    assert talk.told[-1]["error"]["code"] == "message_too_long"


def test_usage_every_ten_seconds() -> None:
    talk = Talk()
    talk.started()
    talk.is_told(*[SendAudio(PAGE)] * 250)
    usage = [event for event in talk.told if event["type"] == "session.usage.updated"]
    assert [event["usage"]["seconds"] for event in usage] == [10.0, 20.0]
    assert usage[1]["context_window"]["usage_ratio"] == 250 / CONTEXT_FRAMES


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (SessionLost("gone"), "session_lost", "connection_lost"),
        (NoCapacity("full"), "no_capacity", "connection_lost"),
        (SessionExpired("over"), None, "expired"),
    ],
)
def test_every_end_is_told(error: Any, code: str | None, reason: str) -> None:
    talk = Talk()
    talk.started()
    events = talk.is_told(SendError(str(error), error))
    assert events[-1]["reason"] == reason
    assert [event["error"]["code"] for event in events[:-1]] == ([] if code is None else [code])


def test_session_update_keeps_what_it_does_not_name() -> None:
    talk = Talk()
    talk.started(delegation={"type": "client"})
    talk.says("session.update", session={"triggers": []}, event_id="u")
    assert talk.told[-1]["session"]["delegation"] == {"type": "client"}
    talk.says("session.update", session={"delegation": {"type": "decisions", "decisions": {}}})
    assert talk.told[-1]["session"]["delegation"] is None


def test_what_the_user_said_is_told_with_its_times() -> None:
    talk = Talk()
    talk.started()
    segment = Segment.of([Word("Two", 0.5, 0.9), Word("rolls.", 0.9, 1.2)])
    (event,) = talk.is_told(SendUserText(UserText(segment)), SendUserText(UserTextLost(2.0, 3.0, "behind")))
    assert event["type"] == "session.input_transcript.delta"
    assert (event["delta"], event["start_ms"], event["end_ms"]) == ("Two rolls.", 500, 1_200)
