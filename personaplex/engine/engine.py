"""The engine: N slots over one model, one tick at a time.

`step()` is its only clock. A slot is admitted with a persona, prefilled with its prompt in bounded chunks,
then takes one frame and gives one frame per tick until it is closed. The same engine serves one session and
many, on a CPU or a GPU. Not thread-safe: one thread owns it. Frames go in and out as numpy arrays. Nothing is
recorded: whoever needs a log of the tokens keeps one (`tokenlog`).
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from personaplex.config import FRAME_SIZE, EngineConfig, LMConfig, Sampling
from personaplex.engine.graph import Frames, Runner
from personaplex.engine.interface import Output, Slot, Usage
from personaplex.engine.script import Script, compose
from personaplex.engine.state import EngineState
from personaplex.errors import BadParameter, EngineFault, NoCapacity, PromptTooLong, SessionLost
from personaplex.model import Model
from personaplex.model.ring import copy_in, copy_out
from personaplex.persona import Persona
from personaplex.text import PieceDecoder, Tokenizer
from personaplex.voices import Voice, VoiceLibrary

LOWEST_TEMPERATURE = 1e-6  # that is not greedy; far below, float32 would round it to zero


@dataclass
class _SlotState:
    """The session in one slot."""

    slot: Slot
    script: Script
    voice: str  # digest of the voice, key of its cached prefix
    label: str  # what `Usage.voices` calls it
    decoder: PieceDecoder
    position: int = 0  # prompt positions prefilled so far
    live: bool = False
    fed: bool = False
    frames: int = 0


@dataclass(frozen=True)
class _Prefix:
    """Keys and values of one voice's part of a prompt."""

    label: str
    parts: tuple[Tensor, ...]


class Engine:
    """Serves `config.slots` sessions with one model."""

    def __init__(
        self, model: Model, voices: VoiceLibrary, tokenizer: Tokenizer, config: EngineConfig
    ) -> None:
        self.slots = config.slots
        self._model, self._voices, self._tokenizer, self._config = model, voices, tokenizer, config
        if model.device.type == "cuda":
            torch.cuda.set_device(model.device)  # kernels are launched on the thread's current device
        self._state = EngineState.allocate(model, config.slots, config.kv)
        if model.device.type == "cuda":
            self._warm_prefill()
        self._runner = Runner(model, self._state, config.slots, config.graphs)
        self._open: list[_SlotState | None] = [None] * config.slots
        self._generations = [0] * config.slots
        self._vacant = list(range(config.slots))  # a heap: lowest first, so that ticks run on short prefixes
        self._waiting: deque[Slot] = deque()
        self._prefixes: OrderedDict[str, _Prefix] = OrderedDict()  # by digest, last used last
        self.voice_hits = 0
        self.voice_misses = 0

    @property
    def free(self) -> int:
        """Slots that `admit` can still give."""
        return len(self._vacant)

    @property
    def usage(self) -> Usage:
        """What it holds now; cheap, but not for every tick."""
        window = self._model.config.lm.temporal.context
        held = [min(state.position + state.frames, window) for state in self._open if state is not None]
        device = self._model.device
        memory = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        voices = tuple(prefix.label for prefix in self._prefixes.values())
        return Usage(sum(held), memory, self.voice_hits, self.voice_misses, voices)

    def admit(self, persona: Persona, voice: Voice | None = None) -> Slot:
        """Takes a slot and queues its prompt; `voice` replaces the library's voice of that name.

        Raises NoCapacity, UnknownVoice, PromptTooLong or BadParameter, and then takes nothing.
        """
        check_sampling(persona.sampling, self._model.config.lm)
        label = persona.voice if voice is None else voice.digest
        voice = voice or self._voices.get(persona.voice)
        text = self._tokenizer.encode_prompt(persona.text_prompt)
        if len(text) > self._config.prompt_tokens:
            raise PromptTooLong(
                f"the role text has {len(text)} tokens, at most {self._config.prompt_tokens} fit"
            )
        script = compose(voice, text, self._model.config.lm)
        if not self._vacant:
            raise NoCapacity(f"all {self.slots} slots are taken")
        index = heapq.heappop(self._vacant)
        slot = Slot(index, self._generations[index])
        self._state.reset(index)
        self._state.sampling.write(index, persona.sampling)
        self._open[index] = _SlotState(slot, script, voice.digest, label, PieceDecoder(self._tokenizer))
        self._waiting.append(slot)
        return slot

    def prefill(self) -> Slot | None:
        """Runs one prefill chunk for the slot that waits longest; that slot once it is live, else None."""
        while self._waiting:
            state = self._state_or_none(self._waiting[0])
            if state is None:  # closed while it waited
                self._waiting.popleft()
                continue
            self._run_chunk(state)
            if state.position < state.script.frames - 1:
                return None
            self._waiting.popleft()
            self._go_live(state)
            return state.slot
        return None

    @property
    def prefilling(self) -> bool:
        """True while any slot waits for its prompt."""
        return any(self._state_or_none(slot) is not None for slot in self._waiting)

    def open(self, persona: Persona, voice: Voice | None = None) -> Slot:
        """`admit`, then `prefill` until the new slot is live."""
        slot = self.admit(persona, voice)
        while self.prefill() != slot:
            pass
        return slot

    def feed(self, slot: Slot, frame: NDArray[np.float32]) -> None:
        """Hands over the user's next frame, float32 [1920], for the next `step`.

        Raises SessionLost for a closed slot, BadParameter for a frame of another shape, for one that is not
        finite, and when the slot is not live or has not stepped its last frame yet.
        """
        state = self._state_of(slot)
        if frame.shape != (FRAME_SIZE,) or not np.isfinite(frame).all():
            raise BadParameter(f"a frame is {FRAME_SIZE} finite samples")
        if not state.live or state.fed:
            raise BadParameter("the slot cannot take a frame now")
        self._runner.pcm[slot.index] = torch.from_numpy(np.asarray(frame, np.float32))
        state.fed = True

    def step(self) -> list[Output]:
        """One tick over every live slot that holds a frame; [] when none does.

        Raises EngineFault when the device fails; the engine is then of no further use.
        """
        ready = [state for state in self._open if state is not None and state.fed]
        if not ready:
            return []
        try:
            frames = self._runner.run([state.slot.index for state in ready])
        except RuntimeError as error:
            raise EngineFault("the engine failed in a step") from error
        return [self._output(state, frames) for state in ready]

    def close(self, slot: Slot) -> None:
        """Frees the slot. Closing twice, or a slot whose place has a new session, does nothing."""
        if self._state_or_none(slot) is None:
            return
        self._open[slot.index] = None
        self._generations[slot.index] += 1
        heapq.heappush(self._vacant, slot.index)

    def internals(self, slot: Slot) -> tuple[Model, EngineState]:
        """The weights and the tensors of all slots, for `rerun`. Raises SessionLost, BadParameter for a slot
        that is not live or holds a frame."""
        state = self._state_of(slot)
        if not state.live or state.fed:
            raise BadParameter("the slot cannot be run again now")
        return self._model, self._state

    def skip(self, slot: Slot, frames: int) -> None:
        """Counts frames that a slot went through without `step`."""
        self._state_of(slot).frames += frames

    def _state_or_none(self, slot: Slot) -> _SlotState | None:
        state = self._open[slot.index]
        return state if state is not None and state.slot == slot else None

    def _state_of(self, slot: Slot) -> _SlotState:
        state = self._state_or_none(slot)
        if state is None:
            raise SessionLost("the slot has been closed")
        return state

    def _run_chunk(self, state: _SlotState) -> None:
        """The next chunk of one prompt. The voice's part ends a chunk, so that it can be shared."""
        script, ring, index = state.script, self._state.lm.ring, state.slot.index
        cached = self._prefixes.get(state.voice)
        with torch.inference_mode():
            if state.position == 0 and cached is not None:
                self._prefixes.move_to_end(state.voice)
                self.voice_hits += 1
                copy_in(ring, index, cached.parts)
                state.position = script.prefix
            end = script.prefix if state.position < script.prefix else script.frames - 1
            stop = min(state.position + self._config.prefill_chunk, end)
            if stop > state.position:
                x = script.inputs(self._model.lm, state.position, stop)
                self._model.lm.transformer.prefill(x, ring, index, state.position)
                state.position = stop
            if stop == script.prefix and cached is None and 0 < stop < ring.capacity:
                self._keep_prefix(state, stop)

    def _warm_prefill(self) -> None:
        """Compiles and loads every kernel a prefill may need before the first session comes."""
        lm, ring = self._model.lm, self._state.lm.ring
        with torch.inference_mode():
            for positions in sorted({1, 17, 33, 65, self._config.prefill_chunk}):
                x = torch.zeros(1, positions, lm.config.temporal.dim, device=lm.device, dtype=lm.dtype)
                for start in (0, 1):  # without a past, and with one
                    lm.transformer.prefill(x.clone(), ring, 0, start)
        self._state.reset(0)

    def _keep_prefix(self, state: _SlotState, length: int) -> None:
        parts = copy_out(self._state.lm.ring, state.slot.index, length)
        if self._config.voice_memory == "host" and self._model.device.type == "cuda":
            parts = tuple(_pinned(part) for part in parts)
        self.voice_misses += 1
        self._prefixes[state.voice] = _Prefix(state.label, parts)
        while len(self._prefixes) > self._config.voice_cache:
            self._prefixes.popitem(last=False)

    def _go_live(self, state: _SlotState) -> None:
        lm, index = self._state.lm, state.slot.index
        lm.tokens[index] = state.script.ring
        lm.provided[index] = state.script.provided
        lm.offset[index] = state.script.frames
        state.live = True

    def _output(self, state: _SlotState, frames: Frames) -> Output:
        index = state.slot.index
        row = frames.tokens[index]
        output = Output(
            slot=state.slot,
            frame=state.frames,
            pcm=frames.pcm[index],
            tokens=row,
            user_codes=frames.user_codes[index],
            text=state.decoder.push(int(row[0])),
        )
        state.fed = False
        state.frames += 1
        return output


def _pinned(part: Tensor) -> Tensor:
    """A copy in pinned host memory, complete at the stream's next synchronization."""
    return torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True)


def check_sampling(sampling: Sampling, lm: LMConfig) -> None:
    """Raises BadParameter for a value the model cannot sample with."""
    for name in ("text_temperature", "audio_temperature"):
        temperature = getattr(sampling, name)
        if not math.isfinite(temperature) or 0 < temperature < LOWEST_TEMPERATURE:
            raise BadParameter(
                f"{name} must be a finite number, either 0 (greedy) or at least {LOWEST_TEMPERATURE:g}"
            )
    for name, size in (("text_topk", lm.text_card), ("audio_topk", lm.card)):
        if not 0 <= getattr(sampling, name) <= size:
            raise BadParameter(f"{name} must lie between 0 and {size}")
    for name in ("text_seed", "audio_seed"):
        if not 0 <= getattr(sampling, name) < 2**63:
            raise BadParameter(f"{name} must lie between 0 and 2**63 - 1")
