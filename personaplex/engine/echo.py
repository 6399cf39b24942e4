"""An engine without a model: each slot returns what it hears, one frame late, as the model would.

Stands in for the model where only the service is tested or measured (load tests on machines without an
accelerator, the serving benchmark, protocol tests). Slots, generations, typed refusals and one frame per slot
and tick are the engine's. Needs numpy only.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import deque
from dataclasses import dataclass

import numpy as np

from personaplex.config import AGENT, FRAME_SIZE, SILENCE_CODES, SINE_CODES, STREAMS, TEXT_PAD, USER, Pcm
from personaplex.engine.interface import Output, PackedVoice, Slot, Usage
from personaplex.errors import BadAudio, NoCapacity, PromptTooLong, UnknownVoice
from personaplex.persona import VOICES, Persona, own_voice
from personaplex.sessionlog import SessionLog

CHARACTERS_PER_TOKEN = 4  # how text length is counted where there is no tokenizer


@dataclass
class _SlotState:
    """What one open slot has heard."""

    slot: Slot
    heard: Pcm | None = None  # fed, not yet stepped
    last: Pcm | None = None
    frames: int = 0


class EchoVoice:
    """A recording that becomes a voice, frame by frame as in an engine."""

    def __init__(self, pcm: Pcm) -> None:
        self._digest, self._left = (
            hashlib.sha256(b"echo"),
            deque(np.array_split(pcm, -(-len(pcm) // FRAME_SIZE))),
        )

    def run_chunk(self) -> PackedVoice | None:
        self._digest.update(np.ascontiguousarray(self._left.popleft(), "<f4").tobytes())
        packed = self._digest.digest()
        return None if self._left else PackedVoice(packed, hashlib.sha256(packed).hexdigest())


class EchoEngine:
    """See the module; the interface is that of `interface.Stepper`."""

    def __init__(self, slots: int, prompt_tokens: int = 1_000) -> None:
        self._open: dict[int, _SlotState] = {}
        self._unused = list(range(slots))  # lowest first
        self._generation = [0] * slots
        self._waiting: deque[Slot] = deque()
        self._rebuilding: deque[Slot] = deque()
        self._prompt_tokens = prompt_tokens

    @property
    def slots(self) -> int:
        return len(self._generation)

    @property
    def free(self) -> int:
        return len(self._unused)

    @property
    def usage(self) -> Usage:
        """One frame per slot, no prompts."""
        return Usage(positions=len(self._open))

    def admit(self, persona: Persona) -> Slot:
        """Takes the lowest free slot. Raises UnknownVoice, PromptTooLong, NoCapacity."""
        if persona.own:
            known = persona.voice == own_voice(hashlib.sha256(persona.own).hexdigest())
        else:
            known = persona.voice in VOICES
        if not known:
            raise UnknownVoice("this voice is not in the library")
        if len(persona.text_prompt) > CHARACTERS_PER_TOKEN * self._prompt_tokens:
            raise PromptTooLong(f"the role text has more than {self._prompt_tokens} tokens")
        if not self._unused:
            raise NoCapacity("every slot is taken")
        index = min(self._unused)
        self._unused.remove(index)
        slot = Slot(index, self._generation[index])
        self._open[index] = _SlotState(slot)
        self._waiting.append(slot)
        return slot

    def admit_rebuild(self, log: SessionLog) -> Slot:
        """Takes the lowest free slot for a session that goes on. Raises what `admit` raises."""
        slot = self.admit(dataclasses.replace(log.persona, own=log.voice))
        self._waiting.remove(slot)
        self._rebuilding.append(slot)
        state = self._open[slot.index]
        state.frames = log.frames
        state.last = log.sound[-1] if log.frames else None
        return slot

    def rebuild_chunk(self) -> Slot | None:
        """There is nothing to run: the oldest waiting slot is live."""
        while self._rebuilding:
            slot = self._rebuilding.popleft()
            if self._holds(slot):
                return slot
        return None

    def window(self, slot: Slot) -> int:
        return 0

    def voice_digest(self, slot: Slot) -> str:
        """Voices have no content here."""
        return ""

    def encode_voice(self, pcm: Pcm) -> EchoVoice:
        """A recording's digest is its voice."""
        if not len(pcm) or not np.isfinite(pcm).all():
            raise BadAudio("the voice recording holds no audio")
        return EchoVoice(pcm)

    def count_tokens(self, text: str) -> int:
        return -(-len(text) // CHARACTERS_PER_TOKEN)

    def prefill(self) -> Slot | None:
        """There is no prompt to run: the oldest waiting slot is live."""
        while self._waiting:
            slot = self._waiting.popleft()
            if self._holds(slot):
                return slot
        return None

    def feed(self, slot: Slot, frame: Pcm) -> None:
        assert self._holds(slot), "a frame for a slot that was closed"
        state = self._open[slot.index]
        assert state.heard is None, "a second frame before the tick"
        assert frame.shape == (FRAME_SIZE,), "one frame is float32 [1920]"
        state.heard = frame

    def step(self) -> list[Output]:
        """One tick: what each fed slot heard the tick before, silence at its first."""
        return [self._output(state) for state in self._open.values() if state.heard is not None]

    def close(self, slot: Slot) -> None:
        """Frees the slot. Idempotent; a slot with a newer generation is left alone."""
        if self._holds(slot):
            del self._open[slot.index]
            self._generation[slot.index] += 1
            self._unused.append(slot.index)

    def _holds(self, slot: Slot) -> bool:
        state = self._open.get(slot.index)
        return state is not None and state.slot == slot

    def _output(self, state: _SlotState) -> Output:
        pcm = state.last if state.last is not None else np.zeros(FRAME_SIZE, np.float32)
        tokens = np.full(STREAMS, TEXT_PAD, np.int64)
        tokens[AGENT], tokens[USER] = SILENCE_CODES, SINE_CODES
        output = Output(state.slot, state.frames, pcm, tokens, tokens[USER])
        state.last, state.heard, state.frames = state.heard, None, state.frames + 1
        return output
