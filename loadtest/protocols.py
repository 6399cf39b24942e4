"""The client's side of every protocol: what the load test sends and what it hears, without a socket.

The session itself is `ClientCore`'s, whose messages are those of /api/chat. A dialect stands between them and
the protocol: `read` makes of a server's message what the core hears, `write` makes messages of what the core
sends. One is made for each session. Who the agent is travels in the address's query, as for /api/chat.

`continuous` protocols answer every frame of ours with one of theirs. Realtime sends audio only while the
agent speaks: nothing can be said there about frames without an answer. Realtime and the telephone do not say
when a session has its slot: such a session counts as live as soon as it may send audio, and its wait for the
slot is part of the time to the first audio.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from personaplex.audio.pcm import PcmFormat
from personaplex.errors import ProtocolError
from personaplex.session.moshi import Audio, Error, Handshake, Text, encode
from personaplex.session.peer import PATIENCE_S, Received, ReceivedText

Message = str | bytes
PIECES = 4  # of a frame that telephones send: 20 ms each


@dataclass(frozen=True)
class Pause:
    """The agent has stopped speaking: the next frame is not late."""


class Dialect(Protocol):
    """One session's protocol."""

    path: str
    headers: Mapping[str, str]  # of the upgrade
    audio: PcmFormat | None  # of a frame, None for pages of Ogg and Opus
    continuous: bool
    says_live: bool  # the server, when audio may be sent
    patience_s: float  # longest silence of a server that lives

    def open(self) -> Sequence[Message]:
        """Sent right after the upgrade."""
        ...

    def read(self, message: Message) -> Iterator[Received | ReceivedText | Pause]:
        """What a message of the server means. Raises ProtocolError for what is no message."""
        ...

    def write(self, data: bytes) -> Sequence[Message]:
        """The messages that say what the core's message `data` says."""
        ...

    def close(self) -> Sequence[Message]:
        """Sent before the close."""
        ...


class Chat:
    """/api/chat: the core's own messages."""

    path = "/api/chat"
    headers: Mapping[str, str] = {}
    audio: PcmFormat | None = None
    continuous = True
    says_live = True
    patience_s = PATIENCE_S

    def open(self) -> Sequence[Message]:
        return ()

    def read(self, message: Message) -> Iterator[Received | ReceivedText | Pause]:
        yield ReceivedText(message) if isinstance(message, str) else Received(message)

    def write(self, data: bytes) -> Sequence[Message]:
        return (data,)

    def close(self) -> Sequence[Message]:
        return ()


class Live:
    """/v1/live/sessions."""

    path = "/v1/live/sessions"
    headers: Mapping[str, str] = {}
    audio: PcmFormat | None = PcmFormat()
    continuous = True
    says_live = True
    patience_s = PATIENCE_S

    def open(self) -> Sequence[Message]:
        return (_dump({"type": "session.start", "session": {"model": "personaplex"}}),)

    def read(self, message: Message) -> Iterator[Received | ReceivedText | Pause]:
        event = _event(message, "type")
        match event["type"]:
            case "session.output_audio.delta":
                yield _heard(event.get("delta"))
            case "session.output_transcript.delta":
                yield _told(event)
            case "session.started":
                yield Received(encode(Handshake()))
            case "error":
                yield _error(event)

    def write(self, data: bytes) -> Sequence[Message]:
        return (_dump({"type": "session.input_audio.append", "audio": _base64(data[1:])}),)

    def close(self) -> Sequence[Message]:
        return ('{"type":"session.close"}',)


class Realtime:
    """/v1/realtime in one of its two dialects."""

    path = "/v1/realtime"
    audio: PcmFormat | None = PcmFormat()
    continuous = False
    says_live = True
    patience_s = math.inf

    def __init__(self, *, beta: bool) -> None:
        self.headers: Mapping[str, str] = {"OpenAI-Beta": "realtime=v1"} if beta else {}
        self._audio = "response.audio" if beta else "response.output_audio"

    def open(self) -> Sequence[Message]:
        return ()

    def read(self, message: Message) -> Iterator[Received | ReceivedText | Pause]:
        event = _event(message, "type")
        kind = event["type"]
        if kind == f"{self._audio}.delta":
            yield _heard(event.get("delta"))
        elif kind == f"{self._audio}_transcript.delta":
            yield _told(event)
        elif kind == "response.done":
            yield Pause()
        elif kind == "session.created":
            yield Received(encode(Handshake()))
        elif kind == "error":
            yield _error(event)

    def write(self, data: bytes) -> Sequence[Message]:
        return (_dump({"type": "input_audio_buffer.append", "audio": _base64(data[1:])}),)

    def close(self) -> Sequence[Message]:
        return ()


class Carrier:
    """A call through Twilio or Telnyx: mu-law at 8 kHz in pieces of 20 ms."""

    audio: PcmFormat | None = PcmFormat("mulaw", 8_000)
    headers: Mapping[str, str] = {}
    continuous = True
    says_live = False
    patience_s = math.inf  # a queued call hears nothing

    def __init__(self, *, twilio: bool, parameters: Mapping[str, str] | None = None) -> None:
        """`parameters`: those of Twilio's TwiML."""
        self.path = "/twilio/media" if twilio else "/telnyx/media"
        self._twilio, self._parameters = twilio, dict(parameters or {})
        self._chunk = 0

    def open(self) -> Sequence[Message]:
        if self._twilio:
            form = {"encoding": "audio/x-mulaw", "sampleRate": 8_000, "channels": 1}
            start = {"streamSid": "MZ1", "mediaFormat": form, "customParameters": self._parameters}
            return (_dump({"event": "start", "streamSid": "MZ1", "start": start}),)
        telnyx = {"encoding": "PCMU", "sample_rate": 8_000, "channels": 1}
        return (_dump({"event": "start", "stream_id": "s1", "start": {"media_format": telnyx}}),)

    def read(self, message: Message) -> Iterator[Received | ReceivedText | Pause]:
        event = _event(message, "event")
        if event["event"] == "media":
            media = event.get("media")
            yield _heard(media.get("payload") if isinstance(media, dict) else None)

    def write(self, data: bytes) -> Sequence[Message]:
        return [self._media(piece) for piece in _pieces(data[1:])]

    def close(self) -> Sequence[Message]:
        return ('{"event":"stop"}',)

    def _media(self, piece: bytes) -> str:
        self._chunk += 1
        media = {"track": "inbound", "chunk": str(self._chunk), "payload": _base64(piece)}
        return _dump({"event": "media", "media": media})


class Asterisk:
    """A call through Asterisk's chan_websocket with slin24."""

    path = "/asterisk/media"
    headers: Mapping[str, str] = {}
    audio: PcmFormat | None = PcmFormat()
    continuous = True
    says_live = False
    patience_s = math.inf

    def open(self) -> Sequence[Message]:
        return ('{"event":"MEDIA_START","format":"slin24"}',)

    def read(self, message: Message) -> Iterator[Received | ReceivedText | Pause]:
        if isinstance(message, bytes):
            yield Received(encode(Audio(message)))

    def write(self, data: bytes) -> Sequence[Message]:
        return _pieces(data[1:])

    def close(self) -> Sequence[Message]:
        return ()


PROTOCOLS: Mapping[str, Callable[[Mapping[str, str]], Dialect]] = {  # of the parameters that a webhook gave
    "chat": lambda parameters: Chat(),
    "live": lambda parameters: Live(),
    "realtime": lambda parameters: Realtime(beta=False),
    "realtime-beta": lambda parameters: Realtime(beta=True),
    "twilio": lambda parameters: Carrier(twilio=True, parameters=parameters),
    "telnyx": lambda parameters: Carrier(twilio=False),
    "asterisk": lambda parameters: Asterisk(),
}


def path_of(protocol: str) -> str:
    """Of its WebSocket."""
    return PROTOCOLS[protocol]({}).path


def _event(message: Message, name: str) -> Mapping[str, Any]:
    try:
        event = json.loads(message)
    except ValueError as error:
        raise ProtocolError("a message that is no JSON") from error
    if not isinstance(event, dict) or not isinstance(event.get(name), str):
        raise ProtocolError(f"a message without {name}")
    return event


def _heard(audio: Any) -> Received:
    if not isinstance(audio, str):
        raise ProtocolError("audio that is no text")
    try:
        return Received(encode(Audio(base64.b64decode(audio, validate=True))))
    except ValueError as error:
        raise ProtocolError("audio that is not base64") from error


def _told(event: Mapping[str, Any]) -> Received:
    return Received(encode(Text(str(event.get("delta", "")))))


def _error(event: Mapping[str, Any]) -> Received:
    """For people; how the server closes decides how the session ended."""
    error = event.get("error")
    return Received(encode(Error(str(error.get("message") if isinstance(error, dict) else error))))


def _pieces(frame: bytes) -> list[bytes]:
    size = len(frame) // PIECES
    return [frame[at : at + size] for at in range(0, len(frame), size)]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _dump(event: Mapping[str, Any]) -> str:
    return json.dumps(event, separators=(",", ":"))
