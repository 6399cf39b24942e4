"""What gateways and replicas say to each other: over Serve as dataclasses, over the media link as bytes.

A lease is asked for with a LeaseRequest and answered with a Grant or a Refusal; replicas tell the fleet how
they stand with a ReplicaStatus. On the link (link.py) a message is a kind and a payload:

    gateway -> replica   OPEN   one-time token (16 bytes), persona as JSON; first and only once
                         FRAME  timestamp uint32 (microseconds, of the gateway's clock, modulo 2**32), the
                                user's frame float32 LE [1920]: bit for bit as decoded
                         CLOSE  JSON; the slot may go
    replica -> gateway   READY  JSON; the prompt is done, frames count from here
                         REPLY  number uint32, timestamp of the user's frame it answers uint32, tokens int32
                                [17], frame float32 [1920], text UTF-8
                         CLOSE  JSON with the error that ended the session

Payloads of any other shape raise ProtocolError. Knows no Ray, no socket and no engine.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt

from personaplex import errors
from personaplex.config import FRAME_SIZE, STREAMS, Pcm, Sampling
from personaplex.errors import PersonaplexError, ProtocolError, SessionLost, UnknownVoice
from personaplex.persona import VOICES, Persona, own_digest, voice_name

TOKEN_BYTES = 16

_TIMESTAMP = struct.Struct("<I")
_REPLY = struct.Struct(f"<II{4 * STREAMS}s")
FRAME_BYTES = 4 * FRAME_SIZE

# What JSON that is none, or about something else, leads to; UnicodeError and json's own are ValueErrors.
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class LeaseRequest:
    """All a replica needs to know before the session connects to it. Nothing in it was written by a client:
    `voice` is a name the gateway found in its own list, the digest of an own voice, or empty."""

    session: str
    voice: str

    @classmethod
    def of(cls, session: str, persona: Persona) -> LeaseRequest:
        named = persona.voice if persona.voice in VOICES else own_digest(persona.voice)
        return cls(session, named)


@dataclass(frozen=True)
class Grant:
    """A slot is held until `token` is shown at host:port, or for the lease timeout."""

    host: str
    port: int
    token: bytes = field(repr=False)
    replica: str
    slots: int


@dataclass(frozen=True)
class Refusal:
    """The replica cannot take the session after all: it drains, or its engine has ended."""


@dataclass(frozen=True)
class SessionStatus:
    """One session that holds a slot: its name and age."""

    session: str
    seconds: float


@dataclass(frozen=True)
class ReplicaStatus:
    """What one replica says of itself. No personal content."""

    replica: str
    node: str
    pid: int
    model: str
    voices: tuple[str, ...]
    slots: int
    accepting: bool
    sessions: tuple[SessionStatus, ...]
    engine: Mapping[str, str] = field(default_factory=dict)  # settings a record names, to run it again
    host: str = ""  # where gateways may ask it questions (questions.py)
    port: int = 0

    @property
    def used(self) -> int:
        return len(self.sessions)


class MessageKind(enum.IntEnum):
    OPEN = 1
    FRAME = 2
    CLOSE = 3
    READY = 4
    REPLY = 5
    TOKENS = 16  # from here on: questions outside a session, see questions.py
    SAMPLES = 17
    ENCODE = 18
    ANSWER = 19


@dataclass(frozen=True)
class Reply:
    """One agent frame: `pcm` float32 [1920], `tokens` int64 [17], `timestamp` of the user's
    frame it answers."""

    frame: int
    pcm: Pcm
    tokens: npt.NDArray[np.int64]
    text: str
    timestamp: int


def pack_reply(reply: Reply) -> bytes:
    head = _REPLY.pack(reply.frame, reply.timestamp, reply.tokens.astype("<i4").tobytes())
    pcm = np.ascontiguousarray(reply.pcm, "<f4").tobytes()
    return b"".join((head, pcm, reply.text.encode()))


def unpack_reply(payload: bytes) -> Reply:
    """Raises ProtocolError for anything `pack_reply` does not make."""
    try:
        frame, timestamp, tokens = _REPLY.unpack_from(payload)
        pcm = np.frombuffer(payload, "<f4", FRAME_SIZE, _REPLY.size)
        text = payload[_REPLY.size + FRAME_BYTES :].decode()
    except (struct.error, ValueError) as error:
        raise ProtocolError("a reply of the wrong shape") from error
    if not np.isfinite(pcm).all():
        raise ProtocolError("a reply that is not audio")
    return Reply(frame, pcm, np.frombuffer(tokens, "<i4").astype(np.int64), text, timestamp)


def pack_open(token: bytes, persona: Persona) -> bytes:
    own = base64.b64encode(persona.own).decode()
    return token + json.dumps({**dataclasses.asdict(persona), "own": own}).encode()


def open_token(payload: bytes) -> bytes:
    """The token of an opening message, to be checked before the rest is read. Raises ProtocolError."""
    if len(payload) < TOKEN_BYTES:
        raise ProtocolError("an opening message of the wrong shape")
    return payload[:TOKEN_BYTES]


def unpack_open(payload: bytes) -> Persona:
    """Raises ProtocolError for anything `pack_open` does not make."""
    try:
        fields = json.loads(payload[TOKEN_BYTES:])
        persona = Persona(**{**fields, "sampling": Sampling(**fields["sampling"])})
        persona.text_prompt.encode()
        return dataclasses.replace(
            persona,
            voice=voice_name(persona.voice),
            sampling=_numbers(persona.sampling),
            own=base64.b64decode(persona.own or "", validate=True),
        )
    except (*_UNREADABLE, UnknownVoice) as error:
        raise ProtocolError("an opening message of the wrong shape") from error


def _numbers(sampling: Sampling) -> Sampling:
    """The same values, each of its field's type. Raises TypeError for others, OverflowError."""
    values = dataclasses.asdict(sampling)
    for name, default in dataclasses.asdict(Sampling()).items():
        value, kinds = values[name], (int, float) if isinstance(default, float) else (int,)
        if type(value) not in kinds:
            raise TypeError(name)
        values[name] = type(default)(value)
    return Sampling(**values)


def pack_frame(timestamp: int, pcm: Pcm) -> bytes:
    """`timestamp` in [0, 2**32), `pcm` float32 [1920]."""
    return _TIMESTAMP.pack(timestamp) + np.ascontiguousarray(pcm, "<f4").tobytes()


def unpack_frame(payload: bytes) -> tuple[int, Pcm]:
    """Timestamp and float32 [1920]. Raises ProtocolError for another length and for samples that are not
    finite."""
    if len(payload) != _TIMESTAMP.size + FRAME_BYTES:
        raise ProtocolError("a frame of the wrong length")
    frame = np.frombuffer(payload, "<f4", FRAME_SIZE, _TIMESTAMP.size).copy()  # torch wants it writable
    if not np.isfinite(frame).all():
        raise ProtocolError("a frame that is not audio")
    return _TIMESTAMP.unpack_from(payload)[0], frame


def pack_ready(prefill_s: float) -> bytes:
    return json.dumps({"prefill_s": prefill_s}).encode()


def unpack_ready(payload: bytes) -> float:
    """Seconds the prompt took in the replica. Raises ProtocolError for another shape."""
    try:
        seconds = json.loads(payload)["prefill_s"]
        if type(seconds) in (int, float) and 0 <= float(seconds) < math.inf:
            return float(seconds)
    except _UNREADABLE as error:
        raise ProtocolError("a ready message of the wrong shape") from error
    raise ProtocolError("a ready message without a time")


def pack_error(error: PersonaplexError) -> bytes:
    fields = {"error": type(error).__name__, "message": str(error)}
    return json.dumps(fields).encode()


def unpack_error(payload: bytes) -> PersonaplexError:
    """The error as the same class, so that its close code survives; SessionLost for one it cannot read."""
    try:
        fields = json.loads(payload)
        kind, message = getattr(errors, fields["error"]), fields["message"]
        if issubclass(kind, PersonaplexError) and isinstance(message, str):
            message.encode()
            return cast(PersonaplexError, kind(message))
    except _UNREADABLE:
        pass
    return SessionLost("the session was ended")
