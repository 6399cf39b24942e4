"""OpenAI's Realtime protocol, `/v1/realtime`, GA and beta: a turnless agent for clients that think in turns.

`session.created` comes at once. The client may configure until its first `input_audio_buffer.append` or
`response.create`; then the persona is settled and the slot is asked for. Every stretch of the agent's speech
is a response (realtime_responses.py). That the user speaks is told only while no response is open, because
clients stop playing at it: the model is interrupted by what it hears, not by an event.

To some clients any `error` is fatal, so one is sent only for what cannot be served. There is no event of our
own: some clients refuse names they do not know.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

from deployments.gateway.protocols import openai_events
from deployments.gateway.protocols.openai_events import Chunks, Event, Refused, object_of, refuse
from deployments.gateway.protocols.realtime_dialect import Dialect
from deployments.gateway.protocols.realtime_items import Items, id_of
from deployments.gateway.protocols.realtime_responses import Responses
from deployments.gateway.protocols.realtime_session import Configuration
from deployments.gateway.protocols.translator import Begin, Message, Read, Reply
from deployments.gateway.protocols.vad import SpeechDetector, Started, Stopped, level_dbfs
from personaplex.audio.pcm import PcmTranscoder
from personaplex.config import FRAME_SECONDS
from personaplex.errors import PersonaplexError, SessionExpired
from personaplex.persona import Persona
from personaplex.session.events import (
    PeerAudio,
    PeerMessage,
    Send,
    SendAudio,
    SendError,
    SendText,
    SendUserText,
    UserText,
    UserTextLost,
)

METADATA_LIMIT = 16  # pairs; longest key 64, longest value 512 characters
_FRAME_MS = round(1_000 * FRAME_SECONDS)


@dataclasses.dataclass(frozen=True)
class RealtimeOptions:
    """What the service's settings say about every session."""

    voices: Mapping[str, str]
    speech_dbfs: float = -45.0  # the agent speaks when it is louder
    pause_s: float = 0.8  # of the agent, that ends a response
    barge_in: Literal["model", "client"] = "model"
    transcribes: bool = False  # whether the service reads what users say


class RealtimeTranslator:
    """One client of `/v1/realtime`."""

    name = "realtime"
    handshake_delay_s = 0.0
    user_text = True
    byte_share = 1.5  # as of Live

    def __init__(
        self,
        session: str,
        base: Persona,
        dialect: Dialect,
        options: RealtimeOptions,
        *,
        model: str,
        expires_at: int,
        clock: Callable[[], float],
        burst_s: float,
    ) -> None:
        """`base` is the persona of clients that configure nothing, `model` the name they asked for."""
        self.transcoder = PcmTranscoder(clock=clock, burst_s=burst_s)
        self._session, self._dialect, self._options = session, dialect, options
        self._expires_at = expires_at
        self._configuration = Configuration(
            base, voice_name=base.voice, model=model, transcribes=options.transcribes
        )
        self._begun = False
        self._chunks = Chunks()
        self._events = 0
        self._items = Items(session, dialect)
        self._user_item = ""  # of speech that was announced, "" for none
        self._heard_item = ""  # of speech that no transcript was told of
        self._onset_ms: int | None = None  # of speech that was not announced yet
        self._detector = SpeechDetector(500)
        self._responses = Responses(
            session,
            dialect,
            max(1, round(options.pause_s / FRAME_SECONDS)),
            self._emit,
            lambda: self._configuration.in_response(dialect),
            self._items.keep,
            self._items.append,
        )

    def configure(self, session: Mapping[str, Any]) -> None:
        """Applies what a client secret was made for, before `open`. Raises Refused."""
        self._configuration = self._configuration.updated(session, Dialect.GA, self._options.voices)

    # The client's side

    def open(self) -> Sequence[Message]:
        return list(self._emit("session.created", session=self._shown()))

    def read(self, message: Message) -> Iterator[Read]:
        size = len(message) if isinstance(message, bytes) or message.isascii() else len(message.encode())
        if isinstance(message, bytes):
            yield PeerMessage(size, known=False)
            return
        try:
            event = openai_events.parse(message)
        except Refused as error:
            yield PeerMessage(size, known=False)
            yield from self._refusal(error, None)
            return
        client_id = openai_events.event_id_of(event)
        try:
            if event["type"] == "input_audio_buffer.append":
                yield from self._append(event, size)
            else:
                yield PeerMessage(size, known=event["type"] in _HANDLERS)
                yield from self._handle(event)
        except Refused as error:
            if event["type"] == "input_audio_buffer.append":
                yield PeerMessage(size)
            yield from self._refusal(error, client_id)

    def _handle(self, event: Event) -> Iterator[Read]:
        handler = _HANDLERS.get(event["type"])
        if handler is None:
            refuse("unknown_event", "there is no such event here", "type")
        yield from handler(self, event)

    def _update(self, event: Event) -> Iterator[Read]:
        session = object_of(event.get("session"), "session")
        new = self._configuration.updated(session, self._dialect, self._options.voices)
        if self._begun:
            self._configuration.check_frozen(new)
        self._configuration = new
        if new.turn_detection is not None:
            self._detector.silence_ms = new.turn_detection.silence_ms
        yield from self._replies("session.updated", session=self._shown())

    def _begin(self) -> Iterator[Read]:
        if not self._begun:
            self._begun = True
            self.transcoder.set_formats(self._configuration.heard, self._configuration.said)
            yield Begin(self._configuration.role)

    def _append(self, event: Event, size: int) -> Iterator[Read]:
        data = openai_events.audio_of(event, self._configuration.heard)
        yield from self._begin()
        frames = self._chunks.push(data, self._configuration.heard)
        yield PeerAudio(frames, size) if frames else PeerMessage(size)
        yield from self._listen(frames)

    def _commit(self, event: Event) -> Iterator[Read]:
        """Pads a begun frame and makes an item of what was said; begins nothing, since the model has heard
        all of it already."""
        if self._begun and (frame := self._chunks.pad(self._configuration.heard)):
            yield PeerAudio(frame, 0)
        self._detector.stop()
        self._onset_ms = None
        yield from map(Reply, self._end_of_speech())

    def _clear(self, event: Event) -> Iterator[Read]:
        self._chunks.clear()
        yield from self._replies("input_audio_buffer.cleared")

    def _create_response(self, event: Event) -> Iterator[Read]:
        if self._responses.open:
            words = "Conversation already has an active response: the agent is speaking"
            refuse("conversation_already_has_active_response", words)
        wanted = object_of(event.get("response"), "response")
        metadata = _metadata(wanted.get("metadata"))
        yield from self._begin()
        yield from map(Reply, self._responses.create(metadata))

    def _cancel_response(self, event: Event) -> Iterator[Read]:
        if not self._responses.is_open(event.get("response_id")):
            refuse("response_cancel_not_active", "Cancellation failed: no active response found")
        yield from map(Reply, self._responses.cancel())
        yield from map(Reply, self._announce())

    def _truncate(self, event: Event) -> Iterator[Read]:
        numbers = {}
        for name in ("content_index", "audio_end_ms"):
            value = event.get(name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
                refuse("invalid_value", f"{name} is a whole number, at least 0", name)
            numbers[name] = value
        item_id = id_of(event.get("item_id"), "item_id")
        yield from self._replies("conversation.item.truncated", item_id=item_id, **numbers)

    def _create_item(self, event: Event) -> Iterator[Read]:
        item = self._items.typed(object_of(event.get("item"), "item"))
        if item["role"] == "system" and not self._begun:
            text = "\n".join(part["text"] for part in item["content"])
            system = (*self._configuration.system, text)
            configuration = dataclasses.replace(self._configuration, system=system)
            openai_events.check_role(configuration.role.text_prompt, "item.content")
            self._configuration = configuration
            item["status"] = "completed"
        previous = self._items.append(item["id"])
        self._items.keep(item)
        yield from self._replies("conversation.item.added", item=item, previous_item_id=previous)
        yield from self._replies("conversation.item.done", item=item, previous_item_id=previous)

    def _retrieve_item(self, event: Event) -> Iterator[Read]:
        item = self._items.get(id_of(event.get("item_id"), "item_id"))
        yield from self._replies("conversation.item.retrieved", item=item)

    def _delete_item(self, event: Event) -> Iterator[Read]:
        item_id = id_of(event.get("item_id"), "item_id")
        self._items.remove(item_id)
        yield from self._replies("conversation.item.deleted", item_id=item_id)

    # The user's speech

    def _listen(self, frames: bytes) -> Iterator[Read]:
        """Counts whole frames of the user and tells what began or ended with them."""
        form = self._configuration.heard
        for start in range(0, len(frames), form.frame_bytes):
            self._responses.heard += 1
            found = self._detector.push(level_dbfs(form.samples(frames[start : start + form.frame_bytes])))
            if self._configuration.turn_detection is None:
                self._onset_ms, self._user_item = None, ""
                continue
            if isinstance(found, Started):
                self._onset_ms = found.at_ms
                yield from map(Reply, self._announce())
            elif isinstance(found, Stopped):
                if self._user_item:
                    yield from self._replies(
                        "input_audio_buffer.speech_stopped", item_id=self._user_item, audio_end_ms=found.at_ms
                    )
                    yield from map(Reply, self._end_of_speech())
                self._onset_ms = None

    def _announce(self) -> Iterator[str]:
        """Tells that the user speaks, if that is so, was not told and does no harm."""
        if self._onset_ms is None or (self._responses.open and self._options.barge_in == "model"):
            return
        self._user_item = self._items.spoken_id()
        onset, self._onset_ms = self._onset_ms, None
        place = {"item_id": self._user_item, "audio_start_ms": onset}
        yield from self._emit("input_audio_buffer.speech_started", **place)

    def _end_of_speech(self) -> Iterator[str]:
        item_id = self._user_item or self._items.spoken_id()
        self._user_item = ""
        self._heard_item = item_id
        previous = self._items.append(item_id)
        content: list[dict[str, Any]] = [{"type": "input_audio", "transcript": None}]
        item: dict[str, Any] = {"id": item_id, "object": "realtime.item", "type": "message", "role": "user"}
        item.update(status="completed", content=content)
        self._items.keep(item)
        yield from self._emit("input_audio_buffer.committed", item_id=item_id, previous_item_id=previous)
        yield from self._emit("conversation.item.added", item=item, previous_item_id=previous)
        yield from self._emit("conversation.item.done", item=item, previous_item_id=previous)

    def _transcribed(self, heard: UserText | UserTextLost) -> Iterator[str]:
        """What the user said belongs to the newest item of its speech; to one of its own where none was told,
        as of a murmur while the agent spoke."""
        if not self._heard_item:
            yield from self._end_of_speech()
        place = {"item_id": self._heard_item, "content_index": 0}
        self._heard_item = ""
        name = "conversation.item.input_audio_transcription."
        if isinstance(heard, UserTextLost):
            error = {"type": "transcription_error", "code": heard.reason, "message": "there is no transcript"}
            yield from self._emit(name + "failed", **place, error=error)
            return
        segment = heard.segment
        usage = {"type": "duration", "seconds": round(segment.end - segment.start, 3)}
        yield from self._emit(name + "completed", **place, transcript=segment.text, usage=usage)

    # The service's side

    def write(self, command: Send) -> Sequence[Message]:
        return list(self._write(command))

    def _write(self, command: Send) -> Iterator[str]:
        was_open = self._responses.open
        match command:
            case SendAudio(page):
                level = level_dbfs(self._configuration.said.samples(page))
                yield from self._responses.audio(page, level > self._options.speech_dbfs)
            case SendText(text):
                yield from self._responses.text(text)
            case SendUserText(heard):
                if self._configuration.transcription is not None:
                    yield from self._transcribed(heard)
            case SendError(message, error):
                yield from self._fail(message, error)
                return
            case _:
                return
        if was_open and not self._responses.open:
            yield from self._announce()

    def _fail(self, message: str, error: PersonaplexError | None) -> Iterator[str]:
        told = {**openai_events.describe(error, message), "event_id": None}
        if isinstance(error, SessionExpired):
            yield from self._responses.close("incomplete")
        else:
            cause = {name: told[name] for name in ("type", "code", "message")}
            yield from self._responses.close("failed", error=cause)
        yield from self._emit("error", error=told)

    # Events

    def _shown(self) -> dict[str, Any]:
        return self._configuration.shown(self._dialect, f"sess_{self._session}", self._expires_at)

    def _emit(self, kind: str, **fields: Any) -> Iterator[str]:
        name = self._dialect.name_of(kind)
        if name is not None:
            self._events += 1
            event = {"type": name, "event_id": f"event_{self._session[:12]}_{self._events}"}
            yield openai_events.dump({**event, **fields})

    def _replies(self, kind: str, **fields: Any) -> Iterator[Reply]:
        yield from map(Reply, self._emit(kind, **fields))

    def _refusal(self, error: Refused, client_id: str | None) -> Iterator[Reply]:
        told = {"type": openai_events.INVALID, "code": error.code, "message": error.message}
        yield from self._replies("error", error={**told, "param": error.param, "event_id": client_id})


_HANDLERS: Mapping[str, Callable[[RealtimeTranslator, Event], Iterator[Read]]] = {
    "session.update": RealtimeTranslator._update,
    "input_audio_buffer.commit": RealtimeTranslator._commit,
    "input_audio_buffer.clear": RealtimeTranslator._clear,
    "response.create": RealtimeTranslator._create_response,
    "response.cancel": RealtimeTranslator._cancel_response,
    "conversation.item.truncate": RealtimeTranslator._truncate,
    "conversation.item.create": RealtimeTranslator._create_item,
    "conversation.item.retrieve": RealtimeTranslator._retrieve_item,
    "conversation.item.delete": RealtimeTranslator._delete_item,
}


def _metadata(value: Any) -> dict[str, str] | None:
    """What a client wants to find its response by, to be told back."""
    if value is None:
        return None
    pairs = object_of(value, "response.metadata")
    fits = all(isinstance(text, str) and len(key) <= 64 and len(text) <= 512 for key, text in pairs.items())
    if len(pairs) > METADATA_LIMIT or not fits:
        words = "metadata is at most 16 pairs of text, keys of 64 characters, values of 512"
        refuse("invalid_value", words, "response.metadata")
    return dict(pairs)
