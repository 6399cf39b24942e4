"""The interface of every engine, and what goes in and out of it. Knows no torch.

`engine.Engine` (the model), `echo.EchoEngine` and `simulated.SimulatedEngine` (no model) implement `Stepper`.
An engine is not thread-safe: one thread owns it, and `step` is its only clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from personaplex.config import Pcm
from personaplex.persona import Persona
from personaplex.sessionlog import SessionLog

Tokens = npt.NDArray[np.int64]  # one frame's tokens, int64 [17]


@dataclass(frozen=True)
class Slot:
    """The right to one place in an engine. The next session in the same place has a higher generation."""

    index: int
    generation: int


@dataclass(frozen=True)
class Output:
    """One agent frame of one session.

    `frame` counts from 0 at the end of the prompt; `pcm` is float32 [1920]; `tokens` int64 [17] is the
    complete frame one step back (see lm.step), `user_codes` int64 [8] the user frame of this step; `text` is
    "" for padding.
    """

    slot: Slot
    frame: int
    pcm: Pcm
    tokens: Tokens
    user_codes: npt.NDArray[np.int64]
    text: str = ""


@dataclass(frozen=True)
class Usage:
    """What an engine holds now, and how often its voice cache was hit since it was made."""

    positions: int = 0  # of prompts and conversation, in the windows of all open slots together
    device_bytes: int = 0  # accelerator memory in use; 0 without one
    voice_hits: int = 0
    voice_misses: int = 0
    voices: tuple[str, ...] = ()  # cached, least recently used first: by name, a caller's own by digest


@dataclass(frozen=True)
class PackedVoice:
    """A voice as its sessions bring it: `packed` bytes (`Persona.own`) and the digest of its content."""

    packed: bytes = field(repr=False)
    digest: str


class VoiceEncoding(Protocol):
    """A recording that becomes a voice."""

    def run_chunk(self) -> PackedVoice | None:
        """Runs one bounded chunk; the voice when that was the last."""


class Stepper(Protocol):
    """An engine."""

    @property
    def slots(self) -> int: ...
    @property
    def free(self) -> int: ...
    @property
    def usage(self) -> Usage: ...
    def admit(self, persona: Persona) -> Slot:
        """Takes the lowest free slot and queues its prompt.

        Raises NoCapacity, UnknownVoice, PromptTooLong or BadParameter, and then takes nothing. UnknownVoice
        also for an own voice that is another one than the persona names, or none of this model.
        """

    def prefill(self) -> Slot | None:
        """Runs one bounded chunk of the oldest waiting prompt; the slot when that made it live."""

    def admit_rebuild(self, log: SessionLog) -> Slot:
        """Takes the lowest free slot for a session that goes on from its log, at frame `log.frames`.

        Raises what `admit` raises, NoCapacity also while too many rebuild, and LogRefused, and then takes
        nothing.
        """

    def rebuild_chunk(self) -> Slot | None:
        """Runs one bounded chunk of the rebuild with the least left; the slot when that made it live."""

    def window(self, slot: Slot) -> int:
        """Number of the first frame of a live slot that no longer attends to the beginning of its prompt; 0
        where every frame does."""

    def voice_digest(self, slot: Slot) -> str:
        """Names the content of an open slot's voice, for its session's log; "" where voices have none."""

    def encode_voice(self, pcm: Pcm) -> VoiceEncoding:
        """Begins to make a voice of a recording, float32 [samples] at 24 kHz, normalised.

        Raises BadAudio for one that is empty, not finite or longer than what the model remembers.
        """

    def count_tokens(self, text: str) -> int:
        """Length of a role text as `prompt_tokens` counts it. May be called on any thread."""

    def feed(self, slot: Slot, frame: Pcm) -> None:
        """Hands over one frame; at most one unconsumed frame per slot."""

    def step(self) -> Sequence[Output]:
        """One tick over all live slots that hold a frame."""

    def close(self, slot: Slot) -> None:
        """Frees the slot; idempotent."""


@dataclass(frozen=True)
class Loaded:
    """A warm engine, what its model is called and the voices it knows."""

    engine: Stepper
    name: str
    voices: Sequence[str]
