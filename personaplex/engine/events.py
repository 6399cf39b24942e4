"""What the thread that owns an engine tells of its sessions and recordings, and the totals that it keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from personaplex.engine.interface import Output, PackedVoice
from personaplex.errors import EngineFault, PersonaplexError


@dataclass(frozen=True)
class Opened:
    """The session's slot is live; `prefill_s` is the time since it was opened.

    `frame` is the number of its next output: 0, or where a rebuilt session goes on. `voice_digest`: see
    `SessionLog`. `window`: see `Stepper.window`.
    """

    session: int
    prefill_s: float
    frame: int = 0
    voice_digest: str = ""
    window: int = 0


@dataclass(frozen=True)
class Stepped:
    """One agent frame, in answer to the user's frame pushed with `timestamp`."""

    session: int
    output: Output
    timestamp: int


@dataclass(frozen=True)
class Refused:
    """The engine refused the session; it holds no slot."""

    session: int
    error: PersonaplexError


@dataclass(frozen=True)
class Encoded:
    """A recording has become a voice; or `error` says why it has not."""

    number: int
    voice: PackedVoice | None = None
    error: PersonaplexError | None = None


@dataclass(frozen=True)
class Closed:
    """The session's slot is free again; its last event."""

    session: int


@dataclass(frozen=True)
class Faulted:
    """The engine cannot go on; no session gets another event."""

    error: EngineFault


EngineEvent = Opened | Stepped | Refused | Encoded | Closed | Faulted
Chunk = Literal["prefill", "rebuild", "voice"]


@dataclass(frozen=True)
class Batch:
    """The events of one piece of work, how long it took and over how many slots it ran."""

    work: Literal["tick", "prefill", "rebuild", "voice", "control"]
    events: tuple[EngineEvent, ...]
    seconds: float = 0.0
    slots: int = 0


@dataclass
class Counters:
    """Totals since start; written by the loop, read from any thread."""

    frames_dropped: int = 0  # by a full inbox
    frames_late: int = 0  # answered more than one frame after they were pushed
    frames_waiting: int = 0  # in all inboxes when the last tick began; not a total
    ticks: int = 0
    ticks_late: int = 0  # longer than one frame
