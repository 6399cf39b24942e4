"""OpenAI's Live protocol, `/v1/live/sessions`: full duplex without turns, one event for each of ours.

The first event is `session.start`; until then, and for as long as the session is queued or prefilled, nothing
is heard from us but errors. From `session.started` on every frame of the agent is a `session.output_audio
.delta`, silence too, and its text a `session.output_transcript.delta`. The model reads no text once it
speaks and calls no tools: what asks for that is refused, and what merely brings it along is told so (`info`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deployments.gateway.protocols import openai_events
from deployments.gateway.protocols.openai_events import (
    Chunks,
    Event,
    Refused,
    name_of,
    object_of,
    refuse,
    text_of,
)
from deployments.gateway.protocols.translator import Begin, Message, Read, Reply
from deployments.gateway.protocols.voices import our_voice
from personaplex.audio.pcm import PcmFormat, PcmTranscoder
from personaplex.config import FRAME_SECONDS
from personaplex.errors import PersonaplexError, SessionExpired, UnknownVoice
from personaplex.persona import Persona
from personaplex.session.events import (
    PeerAudio,
    PeerEnds,
    PeerMessage,
    Send,
    SendAudio,
    SendError,
    SendHandshake,
    SendText,
    SendUserText,
    UserText,
)
from personaplex.words import milliseconds

INPUT_LIMIT = 128  # messages of history
USAGE_EVERY = 125  # frames: 10 s
CONTEXT_FRAMES = 3_000
_FRAME_MS = round(1_000 * FRAME_SECONDS)
_FORMATS = {
    ("audio/pcm", 24_000): PcmFormat("pcm16", 24_000),
    ("audio/pcm", 16_000): PcmFormat("pcm16", 16_000),
    ("audio/pcmu", 8_000): PcmFormat("mulaw", 8_000),
    ("audio/pcma", 8_000): PcmFormat("alaw", 8_000),
}


@dataclasses.dataclass
class _Wanted:
    """What `session.start` asked for, as it is told back."""

    model: str
    persona: Persona
    format_key: tuple[str, int] = ("audio/pcm", 24_000)
    voice: str = ""  # in the client's words
    delegation: Mapping[str, Any] | None = None
    notes: tuple[tuple[str, str], ...] = ()  # code and message of each `info`


class LiveTranslator:
    """One client of `/v1/live/sessions`."""

    name = "live"
    handshake_delay_s = 0.0
    user_text = True
    byte_share = 1.5  # base64 of 24 kHz, 16 bits, with JSON around every 10 ms

    def __init__(
        self,
        session: str,
        base: Persona,
        *,
        voices: Mapping[str, str],
        expires_at: int,
        clock: Callable[[], float],
        burst_s: float,
    ) -> None:
        """`base` is the persona where `session.start` says nothing else, `voices` names for our voices and
        `expires_at` the end of the longest session, in seconds since 1970."""
        self.transcoder = PcmTranscoder(clock=clock, burst_s=burst_s)
        self._session, self._base, self._voices, self._expires_at = session, base, voices, expires_at
        self._format = PcmFormat()
        self._wanted: _Wanted | None = None
        self._start_id: str | None = None  # the client's name of its session.start
        self._chunks = Chunks()
        self._muted = False
        self._frames = 0  # sent
        self._events = 0

    # The client's side

    def open(self) -> Sequence[Message]:
        return ()

    def read(self, message: Message) -> Iterator[Read]:
        size = len(message) if isinstance(message, bytes) or message.isascii() else len(message.encode())
        if isinstance(message, bytes):
            yield PeerMessage(size, known=False)
            return
        try:
            event = openai_events.parse(message)
        except Refused as error:
            yield PeerMessage(size, known=False)
            yield self._refusal(error, None)
            return
        client_id = openai_events.event_id_of(event)
        try:
            yield from self._handle(event, client_id, size)
        except Refused as error:
            yield PeerMessage(size, known=error.code != "unsupported")
            yield self._refusal(error, client_id)

    def _handle(self, event: Event, client_id: str | None, size: int) -> Iterator[Read]:
        kind = event["type"]
        if kind == "session.start":
            yield from self._start(event, client_id, size)
        elif kind == "session.close":
            yield PeerMessage(size)
            yield self._reply("session.closed", client_id, **self._closing("close_requested"))
            yield PeerEnds()
        elif self._wanted is None:
            refuse("session_not_started", "the first event is session.start")
        elif kind == "session.input_audio.append":
            yield from self._hear(openai_events.audio_of(event, self._format), size)
        elif kind in ("session.input_audio.mute", "session.input_audio.unmute"):
            yield PeerMessage(size)
            self._muted = kind.endswith(".mute")
            yield self._reply(f"session.input_audio.{'muted' if self._muted else 'unmuted'}", client_id)
        elif kind == "session.update":
            update = object_of(event.get("session"), "session")
            if "delegation" in update:
                self._wanted.delegation = _delegation(update["delegation"])
            yield PeerMessage(size)
            yield self._reply("session.updated", client_id, session=self._resource())
        else:
            refuse("unsupported", "the model hears speech only: this event is not supported", "type")

    def _start(self, event: Event, client_id: str | None, size: int) -> Iterator[Read]:
        if self._wanted is not None:
            refuse("session_already_started", "the session has been started")
        self._wanted = wanted = self._read_session(object_of(event.get("session"), "session"))
        self._format = _FORMATS[wanted.format_key]
        self._start_id = client_id
        self.transcoder.set_formats(self._format, self._format)
        yield PeerMessage(size)
        yield Begin(wanted.persona)

    def _read_session(self, session: Mapping[str, Any]) -> _Wanted:
        audio = object_of(session.get("audio"), "session.audio")
        output = object_of(audio.get("output"), "session.audio.output")
        notes, roles = _read_input(session.get("input"))
        persona = self._base
        if session.get("instructions") is not None:
            text = text_of(session["instructions"], "session.instructions")
            persona = dataclasses.replace(persona, text_prompt=text)
        role = openai_events.role_with(persona.text_prompt, roles)
        persona = dataclasses.replace(persona, text_prompt=role)
        openai_events.check_role(persona.text_prompt, "session.instructions")
        voice = output.get("voice")
        if voice is not None:
            try:
                persona = dataclasses.replace(persona, voice=our_voice(voice, self._voices))
            except UnknownVoice as error:
                refuse("unknown_voice", str(error), "session.audio.output.voice")
        delegation = _delegation(session.get("delegation"))
        if _has_tools(session.get("delegation")):
            notes.append(("tools_not_supported", "the model calls no tools: it answers by itself"))
        return _Wanted(
            model=name_of(session.get("model"), "session.model"),
            persona=persona,
            format_key=_format_key(object_of(audio.get("format"), "session.audio.format")),
            voice=persona.voice,
            delegation=delegation,
            notes=tuple(notes),
        )

    def _hear(self, data: bytes, size: int) -> Iterator[Read]:
        if self._muted:
            data = self._format.silence(len(data))
        frames = self._chunks.push(data, self._format)
        yield PeerAudio(frames, size) if frames else PeerMessage(size)

    # The service's side

    def write(self, command: Send) -> Sequence[Message]:
        match command:
            case SendHandshake():
                return self._started()
            case SendAudio(page):
                return self._audio(page)
            case SendText(text):
                return [self._text(text)]
            case SendUserText(UserText(segment)):
                times = {"start_ms": milliseconds(segment.start), "end_ms": milliseconds(segment.end)}
                return [self._event("session.input_transcript.delta", None, delta=segment.text, **times)]
            case SendError(message, error):
                return self._failed(message, error)
            case _:
                return ()

    def _started(self) -> Sequence[Message]:
        assert self._wanted is not None
        started = self._event("session.started", self._start_id, session=self._resource())
        notes = [self._event("info", None, code=code, message=text) for code, text in self._wanted.notes]
        return [started, *notes]

    def _audio(self, page: bytes) -> Sequence[Message]:
        start = self._frames * _FRAME_MS
        self._frames += 1
        delta = {
            "type": "session.output_audio.delta",
            "delta": openai_events.audio_text(page),
            "start_ms": start,
            "end_ms": start + _FRAME_MS,
        }
        messages = [openai_events.dump(delta)]
        if self._frames % USAGE_EVERY == 0:
            ratio = min(self._frames / CONTEXT_FRAMES, 1.0)
            usage = {"usage": self._usage(), "context_window": {"usage_ratio": ratio}}
            messages.append(self._event("session.usage.updated", None, **usage))
        return messages

    def _text(self, text: str) -> str:
        """Text follows the page of its frame."""
        end = self._frames * _FRAME_MS
        fields = {"delta": text, "start_ms": max(0, end - _FRAME_MS), "end_ms": end}
        return self._event("session.output_transcript.delta", None, **fields)

    def _failed(self, message: str, error: PersonaplexError | None) -> Sequence[Message]:
        if isinstance(error, SessionExpired):
            return [self._event("session.closed", None, **self._closing("expired"))]
        told = self._event("error", None, error=openai_events.describe(error, message))
        return [told, self._event("session.closed", None, **self._closing("connection_lost"))]

    # Events

    def _resource(self) -> dict[str, Any]:
        wanted = self._wanted or _Wanted("", self._base, voice=self._base.voice)
        kind, rate = wanted.format_key
        return {
            "id": f"sess_{self._session}",
            "expires_at": self._expires_at,
            "model": wanted.model,
            "status": "active",
            "audio": {"format": {"type": kind, "rate": rate}, "output": {"voice": wanted.voice}},
            "instructions": wanted.persona.text_prompt,
            "delegation": wanted.delegation,
        }

    def _usage(self) -> dict[str, float]:
        return {"seconds": round(self._frames * FRAME_SECONDS, 2)}

    def _closing(self, reason: str) -> dict[str, Any]:
        return {"reason": reason, "session": self._resource(), "usage": self._usage()}

    def _event(self, kind: str, client_id: str | None, **fields: Any) -> str:
        self._events += 1
        event: dict[str, Any] = {"type": kind, "event_id": f"event_{self._session[:12]}_{self._events}"}
        if client_id is not None:
            event["client_event_id"] = client_id
        return openai_events.dump({**event, **fields})

    def _reply(self, kind: str, client_id: str | None, **fields: Any) -> Reply:
        return Reply(self._event(kind, client_id, **fields))

    def _refusal(self, error: Refused, client_id: str | None) -> Reply:
        told: dict[str, Any] = {"type": openai_events.INVALID, "code": error.code, "message": error.message}
        if error.param is not None:
            told["param"] = error.param
        if client_id is not None:
            told["client_event_id"] = client_id
        return self._reply("error", client_id, error=told)


def _format_key(form: Mapping[str, Any]) -> tuple[str, int]:
    kind = form.get("type", "audio/pcm")
    rate = form.get("rate", 24_000 if kind == "audio/pcm" else 8_000)
    if not isinstance(kind, str) or isinstance(rate, bool) or not isinstance(rate, int):
        refuse("invalid_type", "a format has a type and a rate", "session.audio.format")
    if (kind, rate) not in _FORMATS:
        words = "formats are audio/pcm at 24000 or 16000, audio/pcmu and audio/pcma at 8000"
        refuse("unsupported_format", words, "session.audio.format")
    return kind, rate


def _read_input(items: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """Notes for the client about its history, and the texts of developer messages, which join the role."""
    if items is None:
        return [], []
    if not isinstance(items, list) or len(items) > INPUT_LIMIT:
        refuse("invalid_value", f"input is a list of at most {INPUT_LIMIT} messages", "session.input")
    roles: list[str] = []
    heard = True
    for item in items:
        message = object_of(item, "session.input")
        parts = message.get("content")
        if not isinstance(parts, list) or len(parts) != 1:
            refuse("invalid_value", "a message has one part of text", "session.input")
        text = text_of(object_of(parts[0], "session.input").get("text"), "session.input")
        if message.get("role") == "developer":
            roles.append(text)
        elif message.get("role") in ("user", "assistant"):
            heard = False
        else:
            refuse("invalid_value", "roles are developer, user and assistant", "session.input")
    if heard:
        return [], roles
    return [("history_not_heard", "the model hears speech only: earlier messages are not heard")], roles


def _delegation(wanted: Any) -> Mapping[str, Any] | None:
    """What is told back of a delegation: any is accepted, and the model never delegates."""
    kind = object_of(wanted, "session.delegation").get("type")
    if kind == "responses":
        model = object_of(wanted.get("responses"), "session.delegation.responses").get("model")
        name = name_of(model, "session.delegation.responses.model") if isinstance(model, str) else ""
        return {"type": "responses", "responses": {"model": name}}
    return {"type": "client"} if kind == "client" else None


def _has_tools(delegation: Any) -> bool:
    responses = delegation.get("responses") if isinstance(delegation, dict) else None
    return isinstance(responses, dict) and bool(responses.get("tools"))
