"""The engine: N slots over one model, one tick at a time.

`step()` is its only clock. A slot is admitted with a persona, prefilled with its prompt in bounded chunks,
then takes one frame and gives one frame per tick until it is closed. A session that ran elsewhere comes in
by its log instead, and goes on where it was (`rebuild.py`). The same engine serves one session and many, on a
CPU or a GPU. Not thread-safe: one thread owns it. Frames go in and out as numpy arrays. Nothing is recorded:
whoever needs a log keeps one (`sessionlog.SessionRecorder`).
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from personaplex.config import FRAME_SIZE, EngineConfig, LMConfig, Sampling
from personaplex.engine.graph import Frames, TickRunner
from personaplex.engine.interface import Output, PackedVoice, Slot, Usage
from personaplex.engine.prefill import Prefill, Prompt
from personaplex.engine.rebuild import CodecRebuild, check_log, logged_voice, spoken_frames
from personaplex.engine.script import VoiceEncoder, compose
from personaplex.engine.state import EngineState
from personaplex.errors import (
    BadAudio,
    BadParameter,
    CheckpointError,
    EngineFault,
    LogRefused,
    NoCapacity,
    PromptTooLong,
    SessionLost,
    UnknownVoice,
)
from personaplex.model import Model
from personaplex.persona import Persona, own_voice
from personaplex.sessionlog import SessionLog
from personaplex.text import PieceDecoder, Tokenizer
from personaplex.voices import Voice, VoiceLibrary

VOICE_CHUNK = 4  # frames of an own voice encoded between two ticks
LOWEST_TEMPERATURE = 1e-6  # that is not greedy; far below, float32 would round it to zero


@dataclass
class _SlotState:
    """The session in one slot."""

    slot: Slot
    prompt: Prompt
    decoder: PieceDecoder
    live: bool = False
    fed: bool = False
    frames: int = 0


@dataclass
class _Rebuild:
    """One session on its way back."""

    state: _SlotState
    log: SessionLog
    codec: CodecRebuild

    @property
    def left(self) -> int:
        """Positions and frames still to be run."""
        return self.state.prompt.left + self.codec.left


class OwnVoice:
    """A recording that becomes a voice, between ticks."""

    def __init__(self, encoder: VoiceEncoder) -> None:
        self._encoder = encoder

    def run_chunk(self) -> PackedVoice | None:
        """Raises EngineFault when the device fails."""
        try:
            if not self._encoder.run(VOICE_CHUNK):
                return None
            voice = Voice.from_codes(self._encoder.codes)
            return PackedVoice(voice.pack(), voice.digest)
        except RuntimeError as error:
            raise EngineFault("the engine failed in a voice") from error


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
        self._prefill = Prefill(model, self._state, config)
        if model.device.type == "cuda":
            self._prefill.warm()
        self._runner = TickRunner(model, self._state, config.slots, config.graphs)
        self._open: list[_SlotState | None] = [None] * config.slots
        self._generations = [0] * config.slots
        self._vacant = list(range(config.slots))  # a heap: lowest first, so that ticks run on short prefixes
        self._waiting: deque[Slot] = deque()
        self._rebuilding: list[_Rebuild] = []

    @property
    def free(self) -> int:
        """Slots that `admit` can still give."""
        return len(self._vacant)

    @property
    def usage(self) -> Usage:
        """What it holds now; cheap, but not for every tick."""
        window = self._model.config.lm.temporal.context
        held = [
            min(state.prompt.position + state.frames, window) for state in self._open if state is not None
        ]
        device = self._model.device
        memory = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        prefill = self._prefill
        return Usage(sum(held), memory, prefill.hits, prefill.misses, prefill.voices)

    def admit(self, persona: Persona, voice: Voice | None = None) -> Slot:
        """Takes a slot and queues its prompt; `voice` replaces the library's voice of that name.

        Raises NoCapacity, UnknownVoice, PromptTooLong or BadParameter, and then takes nothing.
        """
        slot = self._take(persona, voice, None).slot
        self._waiting.append(slot)
        return slot

    def admit_rebuild(self, log: SessionLog) -> Slot:
        """Takes a slot for a session that goes on from its log; `rebuild_chunk` runs it.

        Raises what `admit` raises, NoCapacity also when `config.rebuilds` are under way, and LogRefused for a
        log that does not fit the model or the voice; then takes nothing.
        """
        self._drop_closed_rebuilds()
        if len(self._rebuilding) >= self._config.rebuilds:
            raise NoCapacity(f"{len(self._rebuilding)} sessions are being rebuilt already")
        check_log(log, self._model.config.lm)
        state = self._take(log.persona, logged_voice(log, self._model.config.lm), log)
        codec = CodecRebuild.of(log, self._model.config.mimi.transformer.context, self._config)
        self._rebuilding.append(_Rebuild(state, log, codec))
        return state.slot

    def prefill(self) -> Slot | None:
        """Runs one prefill chunk for the slot that waits longest; that slot once it is live, else None."""
        while self._waiting:
            state = self._state_or_none(self._waiting[0])
            if state is None:  # closed while it waited
                self._waiting.popleft()
                continue
            self._prefill.run_chunk(state.prompt)
            if state.prompt.left:
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

    def rebuild_chunk(self) -> Slot | None:
        """Runs one chunk of the rebuild with the least left; its slot once it is live, else None.

        Returns when the device is done with it. Raises EngineFault when the device fails.
        """
        self._drop_closed_rebuilds()
        if not self._rebuilding:
            return None
        job = min(self._rebuilding, key=lambda one: one.left)
        try:
            if job.left:
                self._run_rebuild(job)
                return None
            self._rebuilding.remove(job)
            self._finish_rebuild(job)
        except RuntimeError as error:
            raise EngineFault("the engine failed in a rebuild") from error
        return job.state.slot

    def rebuild(self, log: SessionLog) -> Slot:
        """`admit_rebuild`, then `rebuild_chunk` until the slot is live: frame `log.frames` is next."""
        slot = self.admit_rebuild(log)
        while self.rebuild_chunk() != slot:
            pass
        return slot

    def window(self, slot: Slot) -> int:
        context = self._model.config.lm.temporal.context
        return max(1, context - self._state_of(slot).prompt.position)

    def voice_digest(self, slot: Slot) -> str:
        """Names the content of the slot's voice. Raises SessionLost for a closed slot."""
        return self._state_of(slot).prompt.voice

    def encode_voice(self, pcm: NDArray[np.float32]) -> OwnVoice:
        """Begins to make a voice of a recording; see `interface.Stepper`."""
        frames = math.ceil(len(pcm) / FRAME_SIZE)
        if not frames or not np.isfinite(pcm).all():
            raise BadAudio("the voice recording holds no audio")
        if frames > self._model.config.lm.temporal.context:
            raise BadAudio("the voice recording is longer than what the model remembers")
        return OwnVoice(VoiceEncoder(self._model, torch.from_numpy(np.array(pcm, np.float32))))

    def count_tokens(self, text: str) -> int:
        """Length of a role text as `prompt_tokens` counts it; touches nothing of the device."""
        return len(self._tokenizer.encode_prompt(text))

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

    def _state_or_none(self, slot: Slot) -> _SlotState | None:
        state = self._open[slot.index]
        return state if state is not None and state.slot == slot else None

    def _state_of(self, slot: Slot) -> _SlotState:
        state = self._state_or_none(slot)
        if state is None:
            raise SessionLost("the slot has been closed")
        return state

    def _take(self, persona: Persona, voice: Voice | None, log: SessionLog | None) -> _SlotState:
        """A slot with its script, not yet queued; see `admit` for what it raises."""
        lm = self._model.config.lm
        check_sampling(persona.sampling, lm)
        if voice is None and persona.own:
            voice = own_voice_of(persona, lm)
        label = persona.voice if voice is None else voice.digest
        voice = voice or self._voices.get(persona.voice)
        if log is not None and log.voice_digest not in ("", voice.digest):
            raise LogRefused("the session spoke with another voice of this name than the one here")
        text = self._tokenizer.encode_prompt(persona.text_prompt)
        if len(text) > self._config.prompt_tokens:
            raise PromptTooLong(
                f"the role text has {len(text)} tokens, at most {self._config.prompt_tokens} fit"
            )
        script = compose(voice, text, lm, None if log is None else spoken_frames(log))
        if not self._vacant:
            raise NoCapacity(f"all {self.slots} slots are taken")
        index = heapq.heappop(self._vacant)
        slot = Slot(index, self._generations[index])
        self._state.reset(index)
        self._state.sampling.write(index, persona.sampling)
        prompt = Prompt(index, script, voice.digest, label)
        if log is not None:
            window = self._config.rebuild_windows * lm.temporal.context
            prompt.origin = prompt.position = max(0, script.frames - 1 - window)
        state = _SlotState(slot, prompt, PieceDecoder(self._tokenizer))
        self._open[index] = state
        return state

    def _drop_closed_rebuilds(self) -> None:
        self._rebuilding = [
            one for one in self._rebuilding if self._state_or_none(one.state.slot) is one.state
        ]

    def _run_rebuild(self, job: _Rebuild) -> None:
        if job.state.prompt.left:
            self._prefill.run_chunk(job.state.prompt)
        else:
            with torch.inference_mode():
                index, frames = job.state.slot.index, self._config.rebuild_chunk
                job.codec.run_chunk(self._model, self._state.mimi, index, frames)
        if self._model.device.type == "cuda":  # or the next tick would wait for it, and nobody knew
            torch.cuda.current_stream(self._model.device).synchronize()

    def _finish_rebuild(self, job: _Rebuild) -> None:
        """Steps the frame in flight, whose output is the log's last row, and makes the slot live."""
        state, log = job.state, job.log
        self._go_live(state)
        if log.frames:
            self._runner.pcm[state.slot.index] = torch.from_numpy(np.array(log.sound[-1], np.float32))
            self._runner.run([state.slot.index])
            state.prompt.position -= log.frames - 1  # the prompt's; `frames` counts the conversation's
        state.frames = log.frames
        for token in log.tokens[:, 0].tolist():
            state.decoder.push(token)

    def _go_live(self, state: _SlotState) -> None:
        lm, index = self._state.lm, state.slot.index
        lm.tokens[index] = state.prompt.script.ring
        lm.provided[index] = state.prompt.script.provided
        lm.offset[index] = state.prompt.script.frames
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


def own_voice_of(persona: Persona, lm: LMConfig) -> Voice:
    """The voice that a persona brings. Raises UnknownVoice for another than it names, and for no voice."""
    try:
        own = Voice.unpack(persona.own, lm)
    except CheckpointError as error:
        raise UnknownVoice(f"the session's own voice cannot be used: {error}") from error
    if persona.voice != own_voice(own.digest):
        raise UnknownVoice("the session's own voice is another one than it names")
    return own


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
