"""Typed text is the same on every protocol: before the start it makes the role, later it changes nothing and
the client is told that nobody hears it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
from clients import carrier

from deployments.gateway.protocols.asterisk import AsteriskTranslator
from deployments.gateway.protocols.carriers import TELNYX, TWILIO, CarrierTranslator
from deployments.gateway.protocols.live import LiveTranslator
from deployments.gateway.protocols.moshi import MoshiTranslator
from deployments.gateway.protocols.realtime import RealtimeOptions, RealtimeTranslator
from deployments.gateway.protocols.realtime_dialect import Dialect
from deployments.gateway.protocols.translator import Begin, Reply, Translator
from deployments.gateway.query import persona_from
from personaplex.persona import Persona
from personaplex.session.events import Failed, PeerAudio, PeerMessage

DEFAULT = Persona().text_prompt
Told = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Typing:
    """How a client of a protocol types. `start(role, before)` are the messages that begin a session with that
    role, None for one that asks for none, and with text typed before; `later` types when the session runs;
    `unheard` is whether what the client is told of that says so."""

    make: Callable[[Persona], Translator]
    start: Callable[[str | None, list[str]], list[str]]
    later: tuple[str | bytes, ...]
    unheard: Callable[[list[Told]], bool]


def text(role: str, words: str) -> Told:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": words}]}


def live(persona: Persona) -> Translator:
    return LiveTranslator("s", persona, voices={}, expires_at=0, clock=lambda: 0.0, burst_s=6.0)


def live_start(role: str | None, before: list[str]) -> list[str]:
    session: Told = {"model": "m", "input": [text("developer", words) for words in before]}
    return [
        json.dumps(
            {
                "type": "session.start",
                "session": session | ({"instructions": role} if role is not None else {}),
            }
        )
    ]


def realtime(dialect: Dialect) -> Callable[[Persona], Translator]:
    options: dict[str, Any] = {"model": "m", "expires_at": 0, "clock": lambda: 0.0, "burst_s": 6.0}
    return lambda persona: RealtimeTranslator("s", persona, dialect, RealtimeOptions({}), **options)


def realtime_start(role: str | None, before: list[str]) -> list[str]:
    events: list[Told] = [
        {"type": "conversation.item.create", "item": text("system", words)} for words in before
    ]
    if role is not None:
        events.append({"type": "session.update", "session": {"instructions": role}})
    return [json.dumps(event) for event in [*events, {"type": "response.create"}]]


def kept_and_incomplete(told: list[Told]) -> bool:
    items = [event["item"] for event in told if "item" in event]
    return bool(items) and all(item["status"] == "incomplete" for item in items)


TYPED_LIVE = ("session.instructions.append", "session.thinking.append", "session.commentary.append")
TYPED_REALTIME = tuple(
    json.dumps({"type": "conversation.item.create", "item": text(role, "Cake is sold out.")})
    for role in ("system", "user", "assistant")
)
PROTOCOLS = {
    "live": Typing(
        live,
        live_start,
        tuple(json.dumps({"type": kind, "text": "Cake is sold out."}) for kind in TYPED_LIVE),
        lambda told: [event["error"]["code"] for event in told] == ["unsupported"] * len(TYPED_LIVE),
    ),
    "realtime": Typing(realtime(Dialect.GA), realtime_start, TYPED_REALTIME, kept_and_incomplete),
    "beta": Typing(realtime(Dialect.BETA), realtime_start, TYPED_REALTIME, kept_and_incomplete),
}


def role_of(typing: Typing, base: Persona, role: str | None, before: list[str]) -> str:
    translator = typing.make(base)
    begun = [one for message in typing.start(role, before) for one in translator.read(message)]
    (begin,) = [one for one in begun if isinstance(one, Begin)]
    return begin.persona.text_prompt


@pytest.mark.parametrize("name", list(PROTOCOLS))
@pytest.mark.parametrize(
    ("queried", "asked", "typed", "role"),
    [
        (None, None, [], DEFAULT),
        (None, None, ["Bread is sold out."], "Bread is sold out."),
        (None, None, ["Bread is sold out.", "So is cake."], "Bread is sold out.\nSo is cake."),
        (None, None, [""], DEFAULT),
        (None, "You are a baker.", [], "You are a baker."),
        (None, "You are a baker.", ["Bread is sold out."], "You are a baker.\nBread is sold out."),
        (None, DEFAULT, ["Bread is sold out."], "Bread is sold out."),  # told back what it was told
        (None, "", [], ""),
        (None, "", ["Bread is sold out."], "Bread is sold out."),
        ("You sell tea.", None, [], "You sell tea."),
        ("You sell tea.", None, ["Tea is sold out."], "You sell tea.\nTea is sold out."),
        ("You sell tea.", "You are a baker.", ["Bread is sold out."], "You are a baker.\nBread is sold out."),
    ],
)
def test_text_before_the_start_makes_the_role(
    name: str, queried: str | None, asked: str | None, typed: list[str], role: str
) -> None:
    base = persona_from({} if queried is None else {"text_prompt": queried})
    assert role_of(PROTOCOLS[name], base, asked, typed) == role


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_text_after_the_start_is_said_to_be_unheard(name: str) -> None:
    typing = PROTOCOLS[name]
    translator = typing.make(Persona())
    for message in typing.start("You are a baker.", []):
        list(translator.read(message))
    meanings = [one for message in typing.later for one in translator.read(message)]
    assert sum(isinstance(one, PeerMessage) for one in meanings) == len(typing.later)
    assert not any(isinstance(one, (Begin, PeerAudio, Failed)) for one in meanings)
    assert typing.unheard([json.loads(one.message) for one in meanings if isinstance(one, Reply)])


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_a_role_that_grows_too_long_is_refused_and_the_session_can_still_begin(name: str) -> None:
    typing = PROTOCOLS[name]
    translator = typing.make(Persona())
    messages = typing.start("You are a baker.", ["x" * 20_000, "y" * 20_000])
    replies = [one for message in messages for one in translator.read(message)]
    told = [json.loads(one.message) for one in replies if isinstance(one, Reply)]
    assert [event["error"]["code"] for event in told if event["type"] == "error"] == ["instructions_too_long"]
    if not any(isinstance(one, Begin) for one in replies):
        replies = [
            one for message in typing.start("You are a baker.", []) for one in translator.read(message)
        ]
    (begin,) = [one for one in replies if isinstance(one, Begin)]
    assert "yy" not in begin.persona.text_prompt


def call(dialect: Any) -> Translator:
    return CarrierTranslator(dialect, lambda _: Begin(Persona()), clock=lambda: 0.0, burst_s=6.0)


@pytest.mark.parametrize(
    ("translator", "messages"),
    [
        (MoshiTranslator(lambda: 0.0, 6.0), [b"\x02Cake is sold out.", "Cake is sold out."]),
        (call(TWILIO), [carrier.Call(carrier.TWILIO).start({"text": "Cake is sold out."})]),
        (call(TWILIO), [carrier.Call(carrier.TWILIO).dtmf("5")]),
        (call(TELNYX), [carrier.Call(carrier.TELNYX).dtmf("5")]),
        (
            AsteriskTranslator(Persona(), clock=lambda: 0.0, burst_s=6.0),
            ['{"event": "DTMF_END", "digit": "5"}', "DTMF_END digit:5"],
        ),
    ],
    ids=["chat", "twilio", "twilio keys", "telnyx keys", "asterisk keys"],
)
def test_protocols_without_typed_text_count_it_and_no_more(
    translator: Translator, messages: list[str | bytes]
) -> None:
    """Who the agent is they say in a query; keys that are pressed are no text."""
    for message in messages:
        kept = [one for one in translator.read(message) if not isinstance(one, Begin)]
        assert [type(one) for one in kept] == [PeerMessage]
