"""The file a conversation is kept in: append-only, so that whatever was written before a crash can be read.

    record  = MAGIC entry*
    entry   = kind (1 byte) | length of the payload uint32 LE | CRC-32 of all three uint32 LE | payload
    H head  = JSON, first and once: session, time, persona with sampling and seeds, model, versions
    R row   = frame uint32 | time uint32 ms | latency uint32 us | forced uint8 | int32 [17], in stream order
    E event = JSON: `type` and `at`, seconds since the beginning; `text`, `user_text` and `end` are among the
              types

Row k holds the complete frame one step back (see `Output`): its agent codes are the sound of the agent's
frame k, its user codes the user's frame k - 1, and row 0 is the last frame of the prompt. Frames of which the
gateway got no reply are missing; their numbers tell. A record without an `end` event was cut short.

`parse` gives the part of a damaged file up to the first damage. numpy only.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaplex.config import AGENT, FRAME_SECONDS, STREAMS, UNGENERATED, USER, Sampling
from personaplex.errors import BadRecord, UnknownVoice
from personaplex.persona import Persona, voice_name

MAGIC = b"personaplex record 1\n"
SUFFIX = ".record"
FILE_LIMIT = 2**28  # bytes; two days of frames
JSON_LIMIT = 2**20  # bytes of a head or an event; the role text comes in a query of some KiB

_ENTRY = struct.Struct("<cII")
_CHECKED = struct.Struct("<cI")
_ROW = struct.Struct(f"<IIIB{STREAMS}i")
_HEAD_KIND, _ROW_KIND, _EVENT_KIND = b"H", b"R", b"E"
_MISSING_LIMIT = 750  # frames: a gateway that stood still for longer ends its sessions
_SESSION = re.compile(r"[0-9A-Za-z_-]{1,64}")
_PERSON = re.compile(r"[0-9A-Za-z_.@+-]{1,128}")
_SHORT = 256  # characters of names
_LATEST = 2.0**33  # seconds since 1970
_UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True)
class Head:
    """What a session was. `began` is its time in seconds since 1970; `person` is the name under which the
    client asked to be found again, "" for none; `model` and `engine` say what answered."""

    session: str
    began: float
    persona: Persona
    version: str = ""
    model: str = ""
    engine: Mapping[str, str] = field(default_factory=dict)
    person: str = ""


@dataclass(frozen=True)
class Row:
    """One frame: `time_s` since the beginning, `latency_s` from the user's frame to the reply."""

    frame: int
    time_s: float
    latency_s: float
    tokens: NDArray[np.integer]  # [17]
    forced: bool = False


@dataclass(frozen=True)
class Event:
    """Something that happened `at` seconds since the beginning."""

    type: str
    at: float
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Record:
    """A record that was read. `damage` says in one line why the rest of the file was left out."""

    head: Head
    frames: NDArray[np.int64]  # [n], ascending
    times_s: NDArray[np.float64]  # [n]
    latencies_s: NDArray[np.float64]  # [n]
    forced: NDArray[np.bool_]  # [n]
    tokens: NDArray[np.int32]  # [n, 17]
    events: tuple[Event, ...] = ()
    damage: str | None = None

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def span(self) -> int:
        """Frames from the first of the conversation to the last row, missing ones included."""
        return int(self.frames[-1]) + 1 if len(self) else 0

    @property
    def seconds(self) -> float:
        return self.span * FRAME_SECONDS

    @property
    def unbroken(self) -> int:
        """Rows before the first missing frame."""
        return int((self.frames == np.arange(len(self))).sum())

    @property
    def ended(self) -> str | None:
        """How the session ended; None when the record was cut short."""
        return next((str(e.fields.get("cause")) for e in self.events if e.type == "end"), None)

    @property
    def agent_codes(self) -> NDArray[np.int32]:
        """int32 [n, 8]: row k is the agent's frame `frames[k]`."""
        return self.tokens[:, AGENT]

    @property
    def user_codes(self) -> NDArray[np.int32]:
        """int32 [n, 8]: row k is the user's frame `frames[k] - 1`; of row 0 it belongs to the prompt."""
        return self.tokens[:, USER]


def pack_head(head: Head) -> bytes:
    """The beginning of a file; of a session's own voice only the name. Raises BadRecord for a head that
    `parse` would refuse."""
    head = dataclasses.replace(head, persona=dataclasses.replace(head.persona, own=b""))
    fields = dataclasses.asdict(head)
    del fields["persona"]["own"]
    payload = _json(fields)
    if len(payload) > JSON_LIMIT or _read_head(payload) != head:
        raise BadRecord("this session cannot be described in a record")
    return MAGIC + _entry(_HEAD_KIND, payload)


def pack_row(row: Row) -> bytes:
    clipped = (min(max(round(n), 0), 2**32 - 1) for n in (row.time_s * 1e3, row.latency_s * 1e6))
    return _entry(_ROW_KIND, _ROW.pack(row.frame, *clipped, row.forced, *map(int, row.tokens)))


def pack_event(event: Event) -> bytes:
    return _entry(_EVENT_KIND, _json({"type": event.type, "at": round(event.at, 3), **event.fields}))


def parse(data: bytes) -> Record:
    """The record in the content of a file; of a damaged one the part before the damage.

    Raises BadRecord when not even the head can be read. Takes memory in proportion to `data`, whatever that
    claims.
    """
    if not data.startswith(MAGIC):
        raise BadRecord("this file is no record")
    kind, payload, position = _next_entry(data, len(MAGIC))
    if kind != _HEAD_KIND:
        raise BadRecord("this record's head is damaged")
    head, rows, events = _read_head(payload), _Rows(), []
    damage = None
    while position < len(data):
        kind, payload, after = _next_entry(data, position)
        event = _read_event(payload) if kind == _EVENT_KIND else None
        if event is not None:
            events.append(event)
        elif kind != _ROW_KIND or not rows.add(payload):
            damage = (
                f"damaged at byte {position} of {len(data)}: "
                f"{len(rows.kept)} frames ({len(rows.kept) * FRAME_SECONDS:.1f} s) before it are good"
            )
            break
        position = after
    return rows.record(head, tuple(events), damage)


def is_person(text: str) -> bool:
    """Whether `text` may be the name under which a person's records are found."""
    return _PERSON.fullmatch(text) is not None


def _json(value: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as error:  # lone surrogates among them
        raise BadRecord("this session cannot be described in a record") from error


def _entry(kind: bytes, payload: bytes) -> bytes:
    checked = _CHECKED.pack(kind, len(payload))
    return _ENTRY.pack(kind, len(payload), zlib.crc32(payload, zlib.crc32(checked))) + payload


def _next_entry(data: bytes, start: int) -> tuple[bytes, bytes, int]:
    """Kind, payload and end of the entry at `start`; kind b"" for one that is not whole."""
    if start + _ENTRY.size > len(data):
        return b"", b"", start
    kind, length, claimed = _ENTRY.unpack_from(data, start)
    begin = start + _ENTRY.size
    end = begin + length
    if end > len(data) or length > JSON_LIMIT:
        return b"", b"", start
    payload = data[begin:end]
    if zlib.crc32(payload, zlib.crc32(_CHECKED.pack(kind, length))) != claimed:
        return b"", b"", start
    return kind, payload, end


class _Rows:
    """Rows as they are read; those of another shape or order are refused."""

    def __init__(self) -> None:
        self.kept: list[bytes] = []
        self._last = -1
        self._missing = 0

    def add(self, payload: bytes) -> bool:
        if len(payload) != _ROW.size:
            return False
        frame, _, _, forced, *tokens = _ROW.unpack(payload)
        self._missing += frame - self._last - 1
        if frame <= self._last or self._missing > len(self.kept) + _MISSING_LIMIT:
            return False
        if forced > 1 or min(tokens) < UNGENERATED:
            return False
        self._last = frame
        self.kept.append(payload)
        return True

    def record(self, head: Head, events: tuple[Event, ...], damage: str | None) -> Record:
        layout = [
            ("frame", "<u4"),
            ("time", "<u4"),
            ("latency", "<u4"),
            ("forced", "u1"),
            ("tokens", "<i4", STREAMS),
        ]
        rows = np.frombuffer(b"".join(self.kept), np.dtype(layout))
        return Record(
            head=head,
            frames=rows["frame"].astype(np.int64),
            times_s=rows["time"] / 1e3,
            latencies_s=rows["latency"] / 1e6,
            forced=rows["forced"].astype(np.bool_),
            tokens=rows["tokens"].astype(np.int32),
            events=events,
            damage=damage,
        )


def _read_head(payload: bytes) -> Head:
    try:
        fields = json.loads(payload)
        persona = fields["persona"]
        engine = {_short(name): _short(value) for name, value in dict(fields["engine"]).items()}
        session, person = fields["session"], fields["person"]
        if not _SESSION.fullmatch(session) or not (person == "" or _PERSON.fullmatch(person)):
            raise ValueError("a name that is none")
        return Head(
            session=session,
            began=_finite(fields["began"], _LATEST),
            persona=Persona(
                voice=voice_name(persona["voice"]),
                text_prompt=_text(persona["text_prompt"]),
                sampling=_sampling(persona["sampling"]),
            ),
            version=_short(fields["version"]),
            model=_short(fields["model"]),
            engine=engine,
            person=person,
        )
    except (*_UNREADABLE, UnknownVoice) as error:
        raise BadRecord("this record's head is damaged") from error


def _sampling(fields: Mapping[str, Any]) -> Sampling:
    values: dict[str, Any] = {}
    for name, default in dataclasses.asdict(Sampling()).items():
        value = fields[name]
        if isinstance(default, float):
            values[name] = _finite(value, 1e9)
        elif type(value) is int and 0 <= value < 2**63:
            values[name] = value
        else:
            raise ValueError(name)
    return Sampling(**values)


def _read_event(payload: bytes) -> Event | None:
    """None for what is no event."""
    try:
        fields = json.loads(payload)
        kind, at = _short(fields.pop("type")), _finite(fields.pop("at"), _LATEST)
        json.dumps(fields, ensure_ascii=False, allow_nan=False).encode()  # no lone surrogates
        return Event(kind, at, fields)
    except _UNREADABLE:
        return None


def _finite(value: Any, most: float) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= most:
        raise ValueError("a number outside its range")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("no text")
    value.encode()
    return value


def _short(value: Any) -> str:
    text = _text(value)
    if len(text) > _SHORT or not text.isprintable():
        raise ValueError("a name that is too long")
    return text
