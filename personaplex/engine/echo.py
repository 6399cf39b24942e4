"""An engine without a model: each slot says back what it hears, one frame late, as the model would.

Stands in for the model where only the service is under test or measurement (load tests on machines without
an accelerator, the serving benchmark, protocol tests). It keeps the engine's laws: slots, generations, typed
refusals, one frame per slot and tick. Needs numpy only.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from personaplex.config import AGENT, FRAME_SIZE, SILENCE_CODES, SINE_CODES, STREAMS, TEXT_PAD, USER
from personaplex.engine.interface import Pcm, Tokens, Usage
from personaplex.errors import NoCapacity, PromptTooLong, UnknownVoice
from personaplex.persona import VOICES, Persona

CHARACTERS_PER_TOKEN = 4  # how text length is counted where there is no tokenizer


@dataclass(frozen=True)
class Place:
    """A slot: its number, and how often it was given away before."""

    index: int
    generation: int


@dataclass(frozen=True)
class Echo:
    """One frame said back."""

    slot: Place
    frame: int
    pcm: Pcm
    tokens: Tokens
    text: str = ""


@dataclass
class _Voice:
    """What one open slot remembers."""

    place: Place
    heard: Pcm | None = None  # fed, not yet stepped
    last: Pcm | None = None
    frames: int = 0


class EchoEngine:
    """See the module; the interface is that of `interface.Stepper`."""

    def __init__(self, slots: int, prompt_tokens: int = 1_000) -> None:
        self._open: dict[int, _Voice] = {}
        self._unused = list(range(slots))  # lowest first
        self._generation = [0] * slots
        self._waiting: deque[Place] = deque()
        self._prompt_tokens = prompt_tokens

    @property
    def slots(self) -> int:
        return len(self._generation)

    @property
    def free(self) -> int:
        return len(self._unused)

    @property
    def usage(self) -> Usage:
        """It remembers one frame a slot and has no prompts."""
        return Usage(positions=len(self._open))

    def admit(self, persona: Persona) -> Place:
        """Takes the lowest free slot. Raises UnknownVoice, PromptTooLong, NoCapacity."""
        if persona.voice not in VOICES:
            raise UnknownVoice("this voice is not in the library")
        if len(persona.text_prompt) > CHARACTERS_PER_TOKEN * self._prompt_tokens:
            raise PromptTooLong(f"the role text has more than {self._prompt_tokens} tokens")
        if not self._unused:
            raise NoCapacity("every slot is taken")
        index = min(self._unused)
        self._unused.remove(index)
        place = Place(index, self._generation[index])
        self._open[index] = _Voice(place)
        self._waiting.append(place)
        return place

    def prime(self) -> Place | None:
        """There is no prompt to run: the oldest waiting slot is ready."""
        while self._waiting:
            place = self._waiting.popleft()
            if self._holds(place):
                return place
        return None

    def feed(self, slot: Place, frame: Pcm) -> None:
        assert self._holds(slot), "a frame for a slot that was closed"
        voice = self._open[slot.index]
        assert voice.heard is None, "a second frame before the tick"
        assert frame.shape == (FRAME_SIZE,), "one frame is float32 [1920]"
        voice.heard = frame

    def step(self) -> list[Echo]:
        """One tick: what each fed slot heard the tick before, silence at its first."""
        return [self._say(voice) for voice in self._open.values() if voice.heard is not None]

    def close(self, slot: Place) -> None:
        """Frees the slot; a slot already closed, or given to someone else since, is left alone."""
        if self._holds(slot):
            del self._open[slot.index]
            self._generation[slot.index] += 1
            self._unused.append(slot.index)

    def _holds(self, slot: Place) -> bool:
        voice = self._open.get(slot.index)
        return voice is not None and voice.place == slot

    def _say(self, voice: _Voice) -> Echo:
        pcm = voice.last if voice.last is not None else np.zeros(FRAME_SIZE, np.float32)
        tokens = np.full(STREAMS, TEXT_PAD, np.int64)
        tokens[AGENT], tokens[USER] = SILENCE_CODES, SINE_CODES
        echo = Echo(voice.place, voice.frames, pcm, tokens)
        voice.last, voice.heard, voice.frames = voice.heard, None, voice.frames + 1
        return echo
