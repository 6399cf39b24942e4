"""What every engine shows to the thread that owns it. Knows no torch, so that a stand-in needs none.

`Stepper` is met by `engine.Engine` (the model) and `echo.EchoEngine` (no model). An engine is not
thread-safe: one thread owns it, and `step` is its only clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from personaplex.persona import Persona

Pcm = npt.NDArray[np.float32]  # one frame, float32 [1920]
Tokens = npt.NDArray[np.int64]  # one frame's tokens, int64 [17]


@dataclass(frozen=True)
class Usage:
    """What an engine holds now, and how often it was spared a voice's prompt since it was made."""

    positions: int = 0  # of prompts and conversation, remembered by all open slots together
    device_bytes: int = 0  # accelerator memory in use; 0 without one
    voice_hits: int = 0
    voice_misses: int = 0


class Spoken(Protocol):
    """One agent frame. `frame` counts from 0 in its session; `text` is empty for padding tokens."""

    @property
    def slot(self) -> Any: ...
    @property
    def frame(self) -> int: ...
    @property
    def pcm(self) -> Pcm: ...
    @property
    def tokens(self) -> Tokens: ...
    @property
    def text(self) -> str: ...


class Stepper(Protocol):
    """An engine. Slots are opaque, hashable, and never used again after `close`."""

    @property
    def slots(self) -> int: ...
    @property
    def free(self) -> int: ...
    @property
    def usage(self) -> Usage: ...
    def admit(self, persona: Persona) -> Any:
        """Takes a slot and queues its prompt; NoCapacity, UnknownVoice, PromptTooLong, BadParameter."""

    def prime(self) -> Any | None:
        """Runs one bounded piece of the oldest waiting prompt; the slot when that made it ready."""

    def feed(self, slot: Any, frame: Pcm) -> None:
        """Hands over one frame; at most one unconsumed frame per slot."""

    def step(self) -> Sequence[Spoken]:
        """One tick over all ready slots that hold a frame."""

    def close(self, slot: Any) -> None:
        """Frees the slot; idempotent."""
