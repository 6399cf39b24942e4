"""What gateways and replicas say to each other: over Serve as dataclasses, over the media link as bytes.

A lease is asked for with a LeaseRequest and answered with a Grant or a Refusal; replicas tell the fleet how
they stand with a ReplicaStatus. On the link (link.py) a message is a kind and a payload:

    gateway -> replica   OPEN     opening, persona as JSON
                         REBUILD  opening, bytes of the session's log uint32: instead of OPEN, for a session
                                  that goes on; LOG messages follow (transfer.py)
                         LOG      the next piece of the log
                         FRAME    timestamp uint32 (microseconds, of the gateway's clock, modulo 2**32), the
                                  user's frame float32 LE [1920]: bit for bit as decoded
                         CLOSE    JSON; the slot may go
                         DETACH   nothing; as CLOSE, but the client may come back: the log is to be kept
                         TAKE     a client's resume token: instead of an opening, asks for the session's log;
                                  CLOSE then says that the session goes on elsewhere
    replica -> gateway   READY    JSON (`SlotReady`); the slot takes frames from here on
                         REPLY    number uint32, timestamp of the user's frame it answers uint32, tokens int32
                                  [17], frame float32 [1920], text UTF-8
                         TAKEN    JSON (`TakenSession`); LOG messages follow
                         CLOSE    JSON with the error that ended the session

An opening comes first and only once: one-time token (16 bytes), version of all these messages uint16,
generation uint32, which grows with each slot that the session is given, and what its client holds to come
back with (`Held`: twice int32). A version that the replica does not speak raises UnknownVersion, payloads of
any other shape ProtocolError. Knows no Ray, no socket and no engine.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import numpy.typing as npt

from personaplex import errors
from personaplex.config import FRAME_SIZE, STREAMS, Pcm, Sampling
from personaplex.errors import PersonaplexError, ProtocolError, SessionLost, UnknownVersion, UnknownVoice
from personaplex.persona import VOICES, Persona, own_digest, voice_name

VERSION = 3  # of all these messages: a message that changes its shape gets a new one
TOKEN_BYTES = 16
REPORT_EVERY_S = 1.0  # between two reports of a replica to the fleet, which hears of changes at once

_OPENING = struct.Struct(f"<{TOKEN_BYTES}sHIii")
_SIZE = struct.Struct("<I")
_TIMESTAMP = struct.Struct("<I")
_REPLY = struct.Struct(f"<II{4 * STREAMS}s")
FRAME_BYTES = 4 * FRAME_SIZE

# What JSON that is none, or about something else, leads to; UnicodeError and json's own are ValueErrors.
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)

Address = tuple[str, str, int]  # a replica: its name, host and port of its links


@dataclass(frozen=True)
class LeaseRequest:
    """All a replica needs to know before the session connects to it. Nothing in it was written by a client:
    `voice` is a name the gateway found in its own list, the digest of an own voice, or empty; `excluded` are
    replicas that shall not take the session."""

    session: str
    voice: str
    excluded: frozenset[str] = frozenset()

    @classmethod
    def of(cls, session: str, persona: Persona, excluded: Iterable[str] = ()) -> LeaseRequest:
        named = persona.voice if persona.voice in VOICES else own_digest(persona.voice)
        return cls(session, named, frozenset(excluded))

    def without(self, replicas: Iterable[str]) -> LeaseRequest:
        """The same request with further replicas excluded."""
        return dataclasses.replace(self, excluded=self.excluded.union(replicas))


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
    """The replica cannot take the session after all: it drains, its engine has ended, or it is excluded."""


@dataclass(frozen=True)
class Held:
    """Which resume tokens a session's client may hold. `generation`: of the slot that its connection began
    with; the token of that slot is good, and those of later ones. Negative: it has none. `back`: of the token
    with which it came back, as long as it was not heard since and may have got no newer one, else
    negative."""

    generation: int = -1
    back: int = -1

    def __bool__(self) -> bool:
        return self.generation >= 0

    def takes(self, counter: int, newest: int) -> bool:
        """Whether the token of slot `counter` is good while the newest slot is this one."""
        return bool(self) and (self.generation <= counter <= newest or 0 <= self.back == counter)

    def used(self, counter: int) -> bool:
        """Whether the token of slot `counter` is worth nothing any more."""
        return bool(self) and counter < self.generation and counter != self.back

    def heard(self) -> Held:
        """The client is heard, so it has got the token that its connection began with."""
        return Held(self.generation)


NOTHING_HELD = Held()


@dataclass(frozen=True)
class SessionStatus:
    """One session that holds a slot: its name, for how long, which of the session's slots it is, and what its
    client may hold."""

    session: str
    seconds: float
    generation: int = 0
    held: Held = NOTHING_HELD


@dataclass(frozen=True)
class ReplicaStatus:
    """What one replica says of itself. No personal content. `detached`: sessions without a slot, whose
    clients may come back. `media`: where its links are made; port 0 where nobody is to know."""

    replica: str
    node: str
    pid: int
    model: str
    voices: tuple[str, ...]
    slots: int
    accepting: bool
    sessions: tuple[SessionStatus, ...]
    engine: Mapping[str, str] = field(default_factory=dict)  # settings a record names, to run it again
    detached: tuple[SessionStatus, ...] = ()
    media: tuple[str, int] = ("", 0)

    @property
    def used(self) -> int:
        return len(self.sessions)


class MessageKind(enum.IntEnum):
    OPEN = 1
    FRAME = 2
    CLOSE = 3
    READY = 4
    REPLY = 5
    REBUILD = 6
    LOG = 7
    DETACH = 8
    TAKE = 9
    TAKEN = 10
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


def reply_tokens(payload: bytes) -> npt.NDArray[np.int32]:
    """The tokens, int32 [17], of a reply that `pack_reply` made."""
    return np.frombuffer(payload, "<i4", STREAMS, _REPLY.size - 4 * STREAMS)


def unpack_reply(payload: bytes) -> Reply:
    """Raises ProtocolError for anything `pack_reply` does not make."""
    try:
        frame, timestamp, tokens = _REPLY.unpack_from(payload)
        pcm = np.frombuffer(payload, "<f4", FRAME_SIZE, _REPLY.size)
        text = payload[_REPLY.size + FRAME_BYTES :].decode()
    except (struct.error, ValueError) as error:
        raise ProtocolError("a reply of the wrong shape") from error
    if not _is_audio(pcm):
        raise ProtocolError("a reply that is not audio")
    return Reply(frame, pcm, np.frombuffer(tokens, "<i4").astype(np.int64), text, timestamp)


@dataclass(frozen=True)
class Opening:
    """What OPEN and REBUILD begin with, and the `rest` of them."""

    token: bytes = field(repr=False)
    generation: int
    held: Held
    rest: bytes = field(repr=False)


def unpack_opening(payload: bytes) -> Opening:
    """Raises ProtocolError for another shape, UnknownVersion for messages of another version."""
    if len(payload) < _OPENING.size:
        raise ProtocolError("an opening message of the wrong shape")
    token, version, generation, held, back = _OPENING.unpack_from(payload)
    if version != VERSION:
        raise UnknownVersion(f"the link speaks version {version}, this process {VERSION}")
    return Opening(token, generation, Held(held, back), payload[_OPENING.size :])


def pack_opening(token: bytes, generation: int = 0, held: Held = NOTHING_HELD) -> bytes:
    return _OPENING.pack(token, VERSION, generation, held.generation, held.back)


def pack_open(token: bytes, persona: Persona, generation: int = 0, held: Held = NOTHING_HELD) -> bytes:
    own = base64.b64encode(persona.own).decode()
    fields = {**dataclasses.asdict(persona), "own": own}
    return pack_opening(token, generation, held) + json.dumps(fields).encode()


def unpack_open(rest: bytes) -> Persona:
    """The persona behind an opening. Raises ProtocolError for anything `pack_open` does not make."""
    try:
        fields = json.loads(rest)
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


def pack_rebuild(token: bytes, log_bytes: int, generation: int, held: Held = NOTHING_HELD) -> bytes:
    return pack_opening(token, generation, held) + _SIZE.pack(log_bytes)


def unpack_rebuild(rest: bytes) -> int:
    """Bytes of the log, behind an opening. Raises ProtocolError for another shape."""
    if len(rest) != _SIZE.size:
        raise ProtocolError("a rebuild message of the wrong shape")
    return int(_SIZE.unpack(rest)[0])


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
    if not _is_audio(frame):
        raise ProtocolError("a frame that is not audio")
    return _TIMESTAMP.unpack_from(payload)[0], frame


def _is_audio(pcm: Pcm) -> bool:
    """Whether all samples are finite. They are where the sum of their squares is, which is found sooner."""
    return math.isfinite(np.vdot(pcm, pcm)) or bool(np.isfinite(pcm).all())


@dataclass(frozen=True)
class SlotReady:
    """A slot is live. `prefill_s`: seconds its prompt or rebuild took, the wait included. `frame`: number of
    its next reply. `voice_digest`: of the voice it speaks with, for the session's log. `window`: number of
    the first frame that no longer knows the beginning; 0 where each does."""

    prefill_s: float
    frame: int = 0
    voice_digest: str = ""
    window: int = 0


def pack_ready(ready: SlotReady) -> bytes:
    return json.dumps(dataclasses.asdict(ready)).encode()


def unpack_ready(payload: bytes) -> SlotReady:
    """Raises ProtocolError for another shape."""
    try:
        ready = SlotReady(**json.loads(payload))
        if (
            type(ready.prefill_s) in (int, float)
            and 0 <= float(ready.prefill_s) < math.inf
            and type(ready.frame) is int
            and ready.frame >= 0
            and type(ready.voice_digest) is str
            and type(ready.window) is int
            and ready.window >= 0
        ):
            ready.voice_digest.encode()
            return ready
    except _UNREADABLE as error:
        raise ProtocolError("a ready message of the wrong shape") from error
    raise ProtocolError("a ready message of the wrong shape")


@dataclass(frozen=True)
class TakenSession:
    """A session that was given to whoever showed its token. `generation`: of the slot it had last. `texts`:
    what the agent said of late, with its frames. `log_bytes` of log follow."""

    generation: int
    log_bytes: int
    texts: tuple[tuple[int, str], ...] = ()


def pack_taken(taken: TakenSession) -> bytes:
    return json.dumps(dataclasses.asdict(taken)).encode()


def unpack_taken(payload: bytes) -> TakenSession:
    """Raises ProtocolError for another shape."""
    try:
        fields = json.loads(payload)
        texts = tuple((frame, text) for frame, text in fields["texts"])
        taken = TakenSession(fields["generation"], fields["log_bytes"], texts)
        numbers = (taken.generation, taken.log_bytes, *(frame for frame, _ in texts))
        if all(type(number) is int and number >= 0 for number in numbers) and all(
            type(text) is str for _, text in texts
        ):
            return taken
    except _UNREADABLE as error:
        raise ProtocolError("a taken message of the wrong shape") from error
    raise ProtocolError("a taken message of the wrong shape")


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
