"""The Moshi protocol, as `/api/chat` speaks it: the codec between its messages and the session core.

A message is one binary WebSocket message: the first byte is the kind, the rest the payload.

    0 handshake   sent once, when the session is live; payload ignored
    1 audio       bytes of an Ogg/Opus stream, both ways
    2 text        UTF-8, appended verbatim by the reader: leading spaces count
    3 control     one byte: start, end of turn, pause, restart
    4 metadata    a JSON object
    5 error       UTF-8, for people
    6 ping        nothing; resets the reader's patience

Stock clients throw on text frames, on empty messages and on any other kind, so nothing here can produce one.
From a client they are no error: stock servers ignore them. A server turns what it receives into events
(`event_of`, `event_of_text`) and commands into bytes (`bytes_of`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from personaplex.errors import ProtocolError
from personaplex.session.events import (
    Event,
    Failed,
    PeerAudio,
    PeerMessage,
    Send,
    SendAudio,
    SendDetails,
    SendError,
    SendHandshake,
    SendKeepAlive,
    SendNotice,
    SendPlace,
    SendText,
    SendUserText,
    UserText,
    UserTextLost,
)
from personaplex.words import as_json, milliseconds

MESSAGE_LIMIT = 131_072  # bytes of one message, either way; the largest Ogg page has 65307
USER_TEXT, USER_TEXT_LOST = "user_text", "user_text_lost"  # types of metadata
REASON_LIMIT = 123  # bytes of a close reason (RFC 6455, section 5.5)


class Kind(IntEnum):
    HANDSHAKE = 0
    AUDIO = 1
    TEXT = 2
    CONTROL = 3
    METADATA = 4
    ERROR = 5
    PING = 6


_KINDS = frozenset(map(int, Kind))


class Action(IntEnum):
    """Payload of a control message. Stock clients define these; the service has no use for any of them."""

    START = 0
    END_TURN = 1
    PAUSE = 2
    RESTART = 3


@dataclass(frozen=True)
class Handshake:
    """The session is live."""


@dataclass(frozen=True)
class Audio:
    data: bytes  # a piece of an Ogg/Opus stream; from the server always one whole page


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Control:
    action: Action


@dataclass(frozen=True)
class Metadata:
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Error:
    message: str


@dataclass(frozen=True)
class Ping:
    pass


Message = Handshake | Audio | Text | Control | Metadata | Error | Ping


def encode(message: Message) -> bytes:
    """Bytes of `message`: one binary WebSocket message, never empty."""
    match message:
        case Handshake():
            return bytes([Kind.HANDSHAKE])
        case Audio(data):
            return b"\x01" + data
        case Text(text):
            return b"\x02" + text.encode()
        case Control(action):
            return bytes([Kind.CONTROL, action])
        case Metadata(data):
            return b"\x04" + json.dumps(data, separators=(",", ":"), allow_nan=False).encode()
        case Error(text):
            return b"\x05" + text.encode()
        case Ping():
            return bytes([Kind.PING])


def decode(data: bytes) -> Message:
    """The message in one binary WebSocket message.

    Raises ProtocolError when it is empty or too long, of an unknown kind, or its payload is not what the kind
    asks for.
    """
    kind, payload = _kind(data), data[1:]
    match kind:
        case Kind.AUDIO:
            return Audio(payload)
        case Kind.TEXT:
            return Text(_text(payload))
        case Kind.HANDSHAKE:
            return Handshake()
        case Kind.CONTROL:
            return Control(_action(payload))
        case Kind.METADATA:
            return Metadata(_object(payload))
        case Kind.ERROR:
            return Error(_text(payload))
        case Kind.PING:
            return Ping()


def event_of(data: bytes) -> Event:
    """What a client's binary message is to the core: PeerAudio, PeerMessage, or Failed when it is too long.

    Of what is not audio only the kind is read.
    """
    try:
        _check_length(data)
    except ProtocolError as error:
        return Failed(error)
    if len(data) > 1 and data[0] == Kind.AUDIO:
        return PeerAudio(data[1:], len(data))
    return PeerMessage(len(data), known=bool(data) and data[0] in _KINDS)


def event_of_text(text: str) -> Event:
    """What a client's text frame is to the core; the protocol has none."""
    return PeerMessage(len(text.encode()), known=False)


def bytes_of(command: Send) -> bytes:
    """The message a core's command asks for."""
    match command:
        case SendAudio(page):
            return encode(Audio(page))
        case SendText(text):
            return encode(Text(text))
        case SendUserText(heard):
            return encode(Metadata(user_text(heard)))
        case SendKeepAlive():
            return encode(Ping())
        case SendHandshake():
            return encode(Handshake())
        case SendPlace(position, wait_s):
            known = {} if wait_s is None else {"wait_s": round(wait_s)}
            return encode(Metadata({"type": "queue", "position": position, **known}))
        case SendDetails(details):
            return encode(Metadata({"type": "session", **details}))
        case SendNotice(kind, data):
            return encode(Metadata({"type": kind, **data}))
        case SendError(message):
            return encode(Error(message))


def user_text(heard: UserText | UserTextLost) -> Mapping[str, Any]:
    """The metadata that tells a client what it said."""
    if isinstance(heard, UserText):
        return {"type": USER_TEXT, **as_json(heard.segment)}
    span = {"start_ms": milliseconds(heard.start), "end_ms": milliseconds(heard.end)}
    return {"type": USER_TEXT_LOST, **span, "reason": heard.reason}


def close_reason(message: str) -> str:
    """`message` cut to REASON_LIMIT bytes of UTF-8, between two characters."""
    return message.encode()[:REASON_LIMIT].decode(errors="ignore")


def _kind(data: bytes) -> Kind:
    if not data:
        raise ProtocolError("empty message")
    _check_length(data)
    try:
        return Kind(data[0])
    except ValueError as error:
        raise ProtocolError(f"unknown message kind {data[0]}") from error


def _check_length(data: bytes) -> None:
    if len(data) > MESSAGE_LIMIT:
        raise ProtocolError(f"message of {len(data)} bytes, at most {MESSAGE_LIMIT} are accepted")


def _text(payload: bytes) -> str:
    try:
        return payload.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError("text that is not UTF-8") from error


def _action(payload: bytes) -> Action:
    if len(payload) != 1 or payload[0] > Action.RESTART:
        raise ProtocolError("unknown control action")
    return Action(payload[0])


def _object(payload: bytes) -> Mapping[str, Any]:
    try:
        data = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("metadata that is not JSON") from error
    if not isinstance(data, dict):
        raise ProtocolError("metadata that is not a JSON object")
    return data
