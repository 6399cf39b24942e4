"""OpenAI's Realtime protocol, both dialects: configuration, responses, the user's speech, typed text.

Every event told is validated in the openai package's types. The property test runs any sequence of the
agent's frames and of clients' events against a model of what a client keeps.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

import hypothesis.strategies as st
import numpy as np
import openai.types.beta.realtime as beta_types
import openai.types.realtime as ga_types
import pytest
from hypothesis import HealthCheck, given, settings
from pydantic import TypeAdapter

from deployments.gateway.protocols.realtime import RealtimeOptions, RealtimeTranslator
from deployments.gateway.protocols.realtime_dialect import Dialect, dialect_of, key_among
from deployments.gateway.protocols.realtime_items import ITEM_LIMIT
from deployments.gateway.protocols.realtime_responses import WAIT_FRAMES
from deployments.gateway.protocols.translator import Begin, Read, Reply
from personaplex.errors import SessionExpired, SessionIdle, SessionLost
from personaplex.persona import Persona
from personaplex.session.events import (
    PeerAudio,
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

SERVER_EVENTS: dict[Dialect, TypeAdapter[Any]] = {
    Dialect.GA: TypeAdapter(ga_types.RealtimeServerEvent),
    Dialect.BETA: TypeAdapter(beta_types.RealtimeServerEvent),
}
LOUD = np.resize(np.array([9_000, -9_000], "<i2"), 1_920).tobytes()
QUIET = bytes(3_840)
PAUSE = 10  # frames


def valid(message: str | bytes, dialect: Dialect) -> dict[str, Any]:
    """One server event as its client sees it, of the package's types."""
    assert isinstance(message, str)
    event = json.loads(message)
    kind = type(SERVER_EVENTS[dialect].validate_python(event))
    kind.model_validate_json(message, strict=True)
    assert kind.model_fields["type"].annotation.__args__ == (event["type"],)
    return dict(event)


class Talk:
    """A translator, and what it told after `session.created`."""

    def __init__(self, dialect: Dialect = Dialect.GA, **options: Any) -> None:
        self.dialect = dialect
        self.translator = RealtimeTranslator(
            "0123456789abcdef0123456789abcdef",
            Persona(),
            dialect,
            RealtimeOptions(voices={}, **options),
            model="personaplex",
            expires_at=1_900_000_000,
            clock=lambda: 0.0,
            burst_s=6.0,
        )
        self.told: list[dict[str, Any]] = []
        (created,) = [valid(one, dialect) for one in self.translator.open()]
        assert created["type"] == "session.created"

    def says(self, kind: str, **fields: Any) -> list[Read]:
        return self.reads(json.dumps({"type": kind, **fields}))

    def reads(self, message: str | bytes) -> list[Read]:
        meanings = list(self.translator.read(message))
        self.told += [valid(one.message, self.dialect) for one in meanings if isinstance(one, Reply)]
        assert any(isinstance(one, (PeerAudio, PeerMessage)) for one in meanings)
        return [one for one in meanings if not isinstance(one, Reply)]

    def is_told(self, *commands: Any) -> list[str]:
        """Types of the events that came of it."""
        before = len(self.told)
        for command in commands:
            self.told += [valid(one, self.dialect) for one in self.translator.write(command)]
        return [event["type"] for event in self.told[before:]]

    def frames(self, page: bytes, count: int = 1) -> list[str]:
        return self.is_told(*[SendAudio(page)] * count)

    def user(self, page: bytes, count: int = 1) -> list[str]:
        before = len(self.told)
        for _ in range(count):
            self.says("input_audio_buffer.append", audio=base64.b64encode(page).decode())
        return [event["type"] for event in self.told[before:]]

    @property
    def last(self) -> dict[str, Any]:
        return self.told[-1]

    @property
    def error(self) -> str:
        assert self.last["type"] == "error", self.last
        return str(self.last["error"]["code"])

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.told if event["type"] == kind]


# Dialects


@pytest.mark.parametrize(
    ("headers", "subprotocols", "dialect"),
    [
        ({}, [], Dialect.GA),
        ({}, ["realtime"], Dialect.GA),
        ({"openai-beta": "realtime=v1"}, [], Dialect.BETA),
        ({"openai-beta": "agents=v1, realtime=v1"}, [], Dialect.BETA),
        ({}, ["realtime", "openai-insecure-api-key.k", "openai-beta.realtime-v1"], Dialect.BETA),
    ],
)
def test_the_dialect_is_in_the_upgrade(headers: Any, subprotocols: Any, dialect: Dialect) -> None:
    assert dialect_of(headers, subprotocols) is dialect


def test_a_browsers_key_is_a_subprotocol() -> None:
    assert key_among(["realtime", "openai-insecure-api-key.sk-1"]) == "sk-1"
    assert key_among(["realtime"]) == ""


# Configuration


def ga(**audio_output: Any) -> dict[str, Any]:
    return {"type": "realtime", "audio": {"output": audio_output}}


def test_ga_configures_until_the_first_audio_and_equal_values_stay_welcome() -> None:
    talk = Talk()
    talk.says("session.update", session={**ga(voice="marin"), "instructions": "You are a baker."})
    talk.says("session.update", session={"type": "realtime", "tools": [], "unknown": {"x": 1}})
    shown = talk.last["session"]
    assert (shown["instructions"], shown["audio"]["output"]["voice"]) == ("You are a baker.", "marin")
    assert shown["audio"]["input"]["turn_detection"]["interrupt_response"] is False
    assert (shown["tools"], shown["audio"]["input"]["transcription"]) == ([], None)
    begin, heard = talk.says("input_audio_buffer.append", audio=base64.b64encode(LOUD).decode())
    assert begin == Begin(Persona("NATF2", "You are a baker."))
    assert isinstance(heard, PeerAudio)
    for same in (
        {"type": "realtime", "model": "x", "tracing": "auto"},
        {**ga(voice="marin"), "instructions": "You are a baker.", "tools": []},
    ):
        talk.says("session.update", session=same)
        assert talk.last["type"] == "session.updated"
    for other, code in (
        (ga(voice="cedar"), "cannot_update_voice"),
        ({"type": "realtime", "instructions": "You are a butcher."}, "instructions_immutable"),
        (ga(format={"type": "audio/pcmu"}), "format_immutable"),
    ):
        talk.says("session.update", session=other)
        assert talk.error == code
    talk.says("session.update", session={"type": "realtime"})
    assert talk.last["session"]["instructions"] == "You are a baker."


def test_betas_session_is_flat() -> None:
    talk = Talk(Dialect.BETA)
    session = {"voice": "ash", "input_audio_format": "g711_ulaw", "output_audio_format": "g711_alaw"}
    talk.says("session.update", session={**session, "temperature": 0.6, "modalities": ["text", "audio"]})
    shown = talk.last["session"]
    assert {name: shown[name] for name in session} == session
    begin, _ = talk.says("response.create")[::-1]
    assert isinstance(begin, Begin)
    assert begin.persona.voice == "NATM1"
    assert begin.persona.sampling.text_temperature == begin.persona.sampling.audio_temperature == 0.6
    assert talk.of("response.created")[0]["response"]["output_audio_format"] == "g711_alaw"


@pytest.mark.parametrize(
    ("session", "code"),
    [
        ({"type": "transcription"}, "invalid_value"),
        ({"type": "realtime", "tools": [{"type": "function", "name": "f"}]}, "tools_not_supported"),
        ({"type": "realtime", "output_modalities": ["text"]}, "modality_not_supported"),
        ({"type": "realtime", "instructions": ["x"]}, "invalid_type"),
        ({"type": "realtime", "audio": 5}, "invalid_type"),
        (ga(voice="a/b"), "unknown_voice"),
        (ga(voice=["marin"]), "unknown_voice"),
        (ga(format={"type": "audio/pcm", "rate": 16_000}), "unsupported_format"),
        (ga(format={"type": ["audio/pcm"]}), "unsupported_format"),
        ({"type": "realtime", "audio": {"input": {"turn_detection": {"type": "none"}}}}, "invalid_value"),
        (
            {"type": "realtime", "audio": {"input": {"turn_detection": {"silence_duration_ms": 10**400}}}},
            "invalid_value",
        ),
    ],
)
def test_what_cannot_be_is_refused_whole(session: Any, code: str) -> None:
    talk = Talk()
    talk.says("session.update", session={"instructions": "kept out", **session}, event_id="e1")
    assert (talk.error, talk.last["error"]["event_id"]) == (code, "e1")
    talk.says("session.update", session={"type": "realtime"})
    assert talk.last["session"]["instructions"] == Persona().text_prompt


@pytest.mark.parametrize("value", [-0.1, 2.1, "0.7", True, [1]])
def test_betas_temperature_is_a_number(value: Any) -> None:
    talk = Talk(Dialect.BETA)
    talk.says("session.update", session={"temperature": value})
    assert talk.error == "invalid_value"


# Responses

BEGIN = [
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
]
END = [
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "conversation.item.done",
    "response.output_item.done",
    "response.done",
    "rate_limits.updated",
]
DELTA = "response.output_audio.delta"
TRANSCRIPT = "response.output_audio_transcript.delta"


def test_one_stretch_of_speech_is_one_response() -> None:
    talk = Talk()
    assert talk.frames(QUIET, 30) == []
    assert talk.is_told(SendAudio(LOUD), SendText(" Hello")) == [*BEGIN, DELTA, TRANSCRIPT]
    assert talk.frames(QUIET, PAUSE - 1) == [DELTA] * (PAUSE - 1)
    assert talk.is_told(SendAudio(LOUD), SendText(" there.")) == [DELTA, TRANSCRIPT]
    assert talk.frames(QUIET, PAUSE) == [DELTA] * PAUSE
    assert talk.frames(QUIET, 5) == END
    assert talk.frames(LOUD) == [*BEGIN, DELTA]
    done = talk.of("response.done")[0]["response"]
    assert done["output"][0]["content"] == [{"type": "output_audio", "transcript": " Hello there."}]
    assert done["usage"]["output_tokens"] == 1 + (PAUSE - 1) + 1 + PAUSE
    heard = b"".join(base64.b64decode(event["delta"]) for event in talk.of(DELTA))
    assert heard == LOUD + QUIET * (PAUSE - 1) + LOUD + QUIET * PAUSE + LOUD
    items = [event["previous_item_id"] for event in talk.of("conversation.item.added")]
    assert items == [None, done["output"][0]["id"]]


def test_beta_has_its_own_names() -> None:
    talk = Talk(Dialect.BETA)
    assert talk.is_told(SendAudio(LOUD), SendText("Hi")) == [
        "response.created",
        "response.output_item.added",
        "conversation.item.created",
        "response.content_part.added",
        "response.audio.delta",
        "response.audio_transcript.delta",
    ]
    assert talk.frames(QUIET, PAUSE + 1)[PAUSE:] == [
        "response.audio.done",
        "response.audio_transcript.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.done",
        "rate_limits.updated",
    ]
    assert talk.of("response.done")[0]["response"]["output"][0]["content"][0]["type"] == "audio"


def test_a_quiet_frame_with_text_is_speech_and_its_audio_is_not_lost() -> None:
    talk = Talk()
    talk.frames(QUIET, 3)
    assert talk.is_told(SendAudio(QUIET), SendText(" "), SendText("So")) == [*BEGIN, TRANSCRIPT, DELTA]
    assert talk.of(TRANSCRIPT)[0]["delta"] == " So"
    talk.frames(QUIET, PAUSE - 1)
    assert talk.is_told(SendAudio(QUIET), SendText(" well")) == [DELTA, TRANSCRIPT]  # the last frame it may
    assert talk.frames(QUIET, PAUSE) == [DELTA] * PAUSE
    assert talk.frames(QUIET) == END


def test_a_client_may_ask_for_a_response_and_find_it_again() -> None:
    talk = Talk()
    talk.frames(QUIET)
    talk.says("response.create", response={"metadata": {"client_event_id": "x"}, "instructions": "ignored"})
    assert talk.last["response"]["metadata"] == {"client_event_id": "x"}
    talk.says("response.create")
    assert talk.error == "conversation_already_has_active_response"
    assert talk.frames(LOUD) == [*BEGIN[1:], DELTA]
    talk.frames(QUIET, PAUSE + 1)
    assert talk.of("response.done")[0]["response"]["metadata"] == {"client_event_id": "x"}


def test_a_response_that_nobody_speaks_in_is_completed_empty() -> None:
    talk = Talk()
    talk.says("response.create")
    assert talk.frames(QUIET, WAIT_FRAMES - 1) == []
    assert talk.frames(QUIET) == ["response.done", "rate_limits.updated"]
    done = talk.of("response.done")[0]["response"]
    assert (done["status"], done["output"]) == ("completed", [])


def test_cancel_withholds_the_rest_until_the_next_pause() -> None:
    talk = Talk()
    talk.says("response.cancel", event_id="c")
    assert talk.error == "response_cancel_not_active"
    assert talk.last["error"]["message"].startswith("Cancellation failed")
    talk.is_told(SendAudio(LOUD), SendText("Once"))
    talk.says("response.cancel", response_id="resp_other")
    assert talk.error == "response_cancel_not_active"
    talk.says("response.cancel")
    done = talk.of("response.done")[0]["response"]
    assert (done["status"], done["status_details"]["reason"]) == ("cancelled", "client_cancelled")
    assert done["output"][0]["status"] == "incomplete"
    talk.says("response.create")
    assert talk.is_told(SendAudio(LOUD), SendText(" upon")) == []
    talk.frames(QUIET, PAUSE)
    assert talk.is_told(SendAudio(LOUD), SendText("Yes?")) == [*BEGIN[1:], DELTA, TRANSCRIPT]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (SessionLost("gone"), "failed", "session_lost"),
        (SessionExpired("over"), "incomplete", "session_expired"),
        (SessionIdle("quiet"), "incomplete", "session_expired"),
    ],
)
def test_an_end_closes_what_is_open(error: Any, status: str, code: str) -> None:
    talk = Talk()
    talk.frames(LOUD)
    assert talk.is_told(SendError(str(error), error)) == [*END, "error"]
    assert talk.of("response.done")[0]["response"]["status"] == status
    assert talk.error == code
    assert talk.is_told(SendHandshake()) == []


# The user's speech

USER_ITEM = ["input_audio_buffer.committed", "conversation.item.added", "conversation.item.done"]
STOPPED = ["input_audio_buffer.speech_stopped", *USER_ITEM]


def test_the_users_speech_is_told_while_the_agent_is_silent() -> None:
    talk = Talk()
    talk.user(QUIET, 10)
    assert talk.user(LOUD, 5) == ["input_audio_buffer.speech_started"]
    assert talk.last["audio_start_ms"] == 800
    assert talk.user(QUIET, 7) == STOPPED
    (stopped,) = talk.of("input_audio_buffer.speech_stopped")
    assert stopped["audio_end_ms"] == 1_200
    assert len({event.get("item_id") or event["item"]["id"] for event in talk.told}) == 1


def test_a_murmur_while_the_agent_speaks_is_not_told() -> None:
    talk = Talk()
    talk.frames(LOUD)
    assert talk.user(LOUD, 5) + talk.user(QUIET, 10) == []
    assert talk.frames(QUIET, PAUSE + 1)[PAUSE:] == END


def test_speech_that_goes_on_is_told_when_the_agent_ends_with_its_onset() -> None:
    talk = Talk()
    talk.frames(LOUD)
    talk.user(QUIET, 5)
    assert talk.user(LOUD, 5) == []
    told = talk.frames(QUIET, PAUSE + 1)
    assert told[PAUSE:] == [*END, "input_audio_buffer.speech_started"]
    assert talk.last["audio_start_ms"] == 400
    talk.frames(LOUD)
    assert talk.user(QUIET, 7) == STOPPED  # what was begun is ended, whoever speaks


def test_a_client_that_wants_to_interrupt_is_told_at_once() -> None:
    talk = Talk(barge_in="client")
    talk.frames(LOUD)
    assert talk.user(LOUD, 3) == ["input_audio_buffer.speech_started"]


def test_without_turn_detection_only_a_commit_makes_an_item() -> None:
    talk = Talk()
    talk.says("session.update", session={"type": "realtime", "audio": {"input": {"turn_detection": None}}})
    assert talk.user(LOUD, 20) + talk.user(QUIET, 20) == []
    half = base64.b64encode(LOUD[:1_000]).decode()
    talk.says("input_audio_buffer.append", audio=half)
    _, padded = talk.says("input_audio_buffer.commit")
    assert padded == PeerAudio(LOUD[:1_000] + bytes(2_840), 0)
    assert [event["type"] for event in talk.told[-3:]] == USER_ITEM
    talk.says("input_audio_buffer.append", audio=half)
    talk.says("input_audio_buffer.clear")
    assert talk.last["type"] == "input_audio_buffer.cleared"
    talk.says("input_audio_buffer.commit")
    assert [event["type"] for event in talk.told[-3:]] == USER_ITEM


def test_a_steady_noise_is_no_speech_for_long() -> None:
    noise = np.random.default_rng(5).normal(0, 600, (400, 1_920)).astype("<i2")
    talk = Talk()
    for frame in noise:
        talk.user(frame.tobytes())
    assert len(talk.of("input_audio_buffer.speech_started")) <= 1
    before = len(talk.told)
    assert talk.user(LOUD, 5) == ["input_audio_buffer.speech_started"], talk.told[before:]


SAID = SendUserText(UserText(Segment.of([Word("Two", 0.5, 0.9), Word("rolls.", 0.9, 1.2)])))


@pytest.mark.parametrize("dialect", list(Dialect))
def test_a_transcript_of_the_user_belongs_to_its_item(dialect: Dialect) -> None:
    talk = Talk(dialect, transcribes=True)
    assert talk.is_told(SAID) == []  # nobody asked
    wanted = {"model": "whisper-1"}
    session = (
        {"type": "realtime", "audio": {"input": {"transcription": wanted}}}
        if dialect is Dialect.GA
        else {"input_audio_transcription": wanted}
    )
    talk.says("session.update", session=session)
    shown = talk.last["session"]
    assert (
        shown["audio"]["input"]["transcription"] if "audio" in shown else shown["input_audio_transcription"]
    ) == wanted
    talk.user(LOUD, 5)
    talk.user(QUIET, 7)
    (committed,) = talk.of("input_audio_buffer.committed")
    assert talk.is_told(SAID) == ["conversation.item.input_audio_transcription.completed"]
    assert (talk.last["item_id"], talk.last["transcript"]) == (committed["item_id"], "Two rolls.")
    talk.is_told(SendUserText(UserTextLost(2.0, 3.0, "behind")))
    assert talk.last["type"] == "conversation.item.input_audio_transcription.failed"
    assert (
        talk.last["item_id"] == talk.of("input_audio_buffer.committed")[-1]["item_id"] != committed["item_id"]
    )


def test_a_service_without_transcripts_says_so() -> None:
    talk = Talk()
    asked = {"type": "realtime", "audio": {"input": {"transcription": {"model": "whisper-1"}}}}
    talk.says("session.update", session=asked)
    assert talk.last["session"]["audio"]["input"]["transcription"] is None


# Items


def message(role: str, text: Any = "Hi", **fields: Any) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text}], **fields}


def test_typed_text_is_kept_and_said_to_be_unheard() -> None:
    talk = Talk()
    talk.says("conversation.item.create", item=message("user", id="mine"))
    added, done = talk.told[-2:]
    assert (added["item"]["id"], added["item"]["status"]) == ("mine", "incomplete")
    assert done["item"] == added["item"]
    talk.says("conversation.item.retrieve", item_id="mine")
    assert talk.last["item"] == added["item"]
    talk.says("conversation.item.create", item=message("user", id="mine"))
    assert talk.error == "item_exists"
    talk.says("conversation.item.delete", item_id="mine")
    talk.says("conversation.item.retrieve", item_id="mine")
    assert talk.error == "item_not_found"


def test_system_text_joins_the_role_until_the_start() -> None:
    talk = Talk()
    talk.says("session.update", session={"type": "realtime", "instructions": "You are a baker."})
    talk.says("conversation.item.create", item=message("system", "Bread is sold out."))
    assert talk.last["item"]["status"] == "completed"
    _, begin = talk.says("response.create")
    assert isinstance(begin, Begin)
    assert begin.persona.text_prompt == "You are a baker.\nBread is sold out."
    talk.says("conversation.item.create", item=message("system", "Cake too."))
    assert talk.last["item"]["status"] == "incomplete"


@pytest.mark.parametrize(
    ("item", "code"),
    [
        (None, "invalid_value"),
        ({"type": "function_call_output", "call_id": "c", "output": "o"}, "unsupported_item"),
        (message("tool"), "invalid_value"),
        (message("user", 5), "invalid_type"),
        (message("user", id="x" * 129), "invalid_value"),
        ({"type": "message", "role": "user", "content": [{"type": "input_audio"}]}, "unsupported_content"),
        ({"type": "message", "role": "user", "content": []}, "invalid_value"),
    ],
)
def test_items_the_model_has_no_use_for(item: Any, code: str) -> None:
    talk = Talk()
    talk.says("conversation.item.create", item=item)
    assert talk.error == code


def test_items_are_bounded_and_the_agents_own_can_be_retrieved() -> None:
    talk = Talk()
    talk.is_told(SendAudio(LOUD), SendText("Hi"))
    talk.frames(QUIET, PAUSE + 1)
    agents = talk.of("response.done")[0]["response"]["output"][0]["id"]
    talk.says("conversation.item.truncate", item_id=agents, content_index=0, audio_end_ms=80)
    assert talk.last["type"] == "conversation.item.truncated"
    talk.says("conversation.item.retrieve", item_id=agents)
    assert talk.last["item"]["content"][0]["transcript"] == "Hi"
    for _ in range(ITEM_LIMIT):
        talk.says("conversation.item.create", item=message("user"))
    talk.says("conversation.item.retrieve", item_id=agents)
    assert talk.error == "item_not_found"


@pytest.mark.parametrize("bad", [-1, 1.5, True, "1", None, 2**60])
def test_truncate_takes_whole_numbers(bad: Any) -> None:
    talk = Talk()
    talk.says("conversation.item.truncate", item_id="i", content_index=0, audio_end_ms=bad)
    assert talk.error == "invalid_value"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"type": {}}', "[" * 100_000, '{"a":' * 20_000, '{"type": "x", "v": -Infinity}'],
)
def test_messages_that_are_no_events(text: str) -> None:
    talk = Talk()
    assert talk.reads(text) == [PeerMessage(len(text), known=False)]
    assert talk.error in ("invalid_json", "invalid_event")


def test_events_of_no_kind_and_audio_of_none() -> None:
    talk = Talk()
    (meaning,) = talk.says("output_audio_buffer.clear", event_id="e")
    assert isinstance(meaning, PeerMessage)
    assert not meaning.known
    assert (talk.error, talk.last["error"]["event_id"]) == ("unknown_event", "e")
    talk.says("input_audio_buffer.append", audio="AAA")
    assert talk.error == "invalid_audio"
    talk.says("input_audio_buffer.append", audio=base64.b64encode(b"abc").decode())
    assert talk.error == "invalid_audio"


# Any sequence


@dataclasses.dataclass
class Client:
    """What a strict client keeps: the open response and item, and where each delta belongs."""

    response: str | None = None
    item: str | None = None
    part: bool = False
    speaking: str | None = None
    transcript: str = ""
    audio: bytes = b""
    transcripts: tuple[str, ...] = ()

    def hear(self, event: dict[str, Any]) -> None:
        kind = event["type"].replace("output_audio", "audio")
        if kind == "response.created":
            assert self.response is None
            self.response = event["response"]["id"]
        elif kind == "response.output_item.added":
            assert (self.response, self.item) == (event["response_id"], None)
            self.item, self.transcript = event["item"]["id"], ""
        elif kind == "response.content_part.added":
            assert (self.item, self.part) == (event["item_id"], False)
            self.part = True
        elif kind in ("response.audio.delta", "response.audio_transcript.delta"):
            assert (self.response, self.item, self.part) == (event["response_id"], event["item_id"], True)
            if kind == "response.audio.delta":
                self.audio += base64.b64decode(event["delta"])
            else:
                self.transcript += event["delta"]
        elif kind == "response.audio_transcript.done":
            assert event["transcript"] == self.transcript
        elif kind == "response.content_part.done":
            assert (self.item, self.part) == (event["item_id"], True)
            self.part = False
        elif kind == "response.output_item.done":
            assert (self.item, self.part) == (event["item"]["id"], False)
            self.item = None
            self.transcripts += (self.transcript,)
        elif kind == "response.done":
            assert (self.response, self.item) == (event["response"]["id"], None)
            self.response = None
        elif kind == "input_audio_buffer.speech_started":
            assert (self.speaking, self.response) == (None, None)
            self.speaking = event["item_id"]
        elif kind == "input_audio_buffer.speech_stopped":
            assert self.speaking == event["item_id"]
        elif kind == "input_audio_buffer.committed":
            assert self.speaking in (None, event["item_id"])
            self.speaking = None


RUN = st.integers(1, 14)
STEPS = st.one_of(
    st.tuples(st.just("loud"), RUN, st.sampled_from(["", " ", "Oh", " é"])),
    st.tuples(st.just("quiet"), RUN, st.sampled_from(["", "", " ", "mm"])),
    st.tuples(st.sampled_from(["user loud", "user quiet"]), RUN, st.just("")),
    st.tuples(
        st.sampled_from(
            [
                "response.create",
                "response.cancel",
                "input_audio_buffer.commit",
                "input_audio_buffer.clear",
                "session.update",
                "conversation.item.create",
                "nonsense",
            ]
        ),
        st.just(1),
        st.just(""),
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.sampled_from(list(Dialect)), st.lists(STEPS, max_size=25))
def test_any_sequence_is_balanced_and_in_order(dialect: Dialect, steps: list[tuple[str, int, str]]) -> None:
    talk, client = Talk(dialect), Client()
    cancelled, spoken = False, ""
    for kind, count, text in steps:
        if kind in ("loud", "quiet"):
            for _ in range(count):
                talk.is_told(
                    SendAudio(LOUD if kind == "loud" else QUIET), *([SendText(text)] if text else [])
                )
                spoken += text
        elif kind.startswith("user"):
            talk.user(LOUD if kind == "user loud" else QUIET, count)
        elif kind == "conversation.item.create":
            talk.says(kind, item=message("user"))
        else:
            cancelled |= kind == "response.cancel"
            talk.says(kind, **({"session": {"type": "realtime"}} if kind == "session.update" else {}))
    talk.is_told(SendError("gone", SessionLost("gone")))
    for event in talk.told:
        client.hear(event)
    assert (client.response, client.item, client.part) == (None, None, False)
    assert len({event["event_id"] for event in talk.told}) == len(talk.told)
    if not cancelled:
        assert "".join(client.transcripts).split() == spoken.split()
        assert client.audio.count(LOUD) == sum(n for kind, n, _ in steps if kind == "loud")
