"""The engine: N slots over one model, one tick at a time.

`step()` is its only clock. A slot is admitted with a persona, primed (its prompt prefilled in bounded
chunks), then takes one frame and gives one frame a tick until it is closed. The same engine serves one
session and many, on a CPU or a GPU. Not thread-safe: one thread owns it. Frames go in and out as numpy
arrays.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from personaplex.config import FRAME_SIZE, EngineConfig, LMConfig, Sampling
from personaplex.engine.graph import Frames, Runner
from personaplex.engine.interface import Usage
from personaplex.engine.script import Script, compose
from personaplex.engine.state import EngineState
from personaplex.errors import BadParameter, EngineFault, NoCapacity, PromptTooLong, SessionLost
from personaplex.model import Model
from personaplex.model.ring import copy_in, copy_out
from personaplex.persona import Persona
from personaplex.text import PieceDecoder, Tokenizer
from personaplex.tokenlog import TokenLog
from personaplex.voices import Voice, VoiceLibrary

COLDEST = 1e-6  # the lowest temperature that is not greedy; far below, float32 would make it zero


@dataclass(frozen=True)
class Slot:
    """A place in the engine, for one session. A later session in the same place has a higher generation."""

    index: int
    generation: int


@dataclass(frozen=True)
class Output:
    """One agent frame of one session.

    `frame` counts from 0 at the end of the prompt; `pcm` is float32 [1920]; `tokens` int64 [17] is the whole
    frame one step back (see lm.step), `user_codes` int64 [8] the frame just heard; `text` is "" for padding.
    """

    slot: Slot
    frame: int
    pcm: NDArray[np.float32]
    tokens: NDArray[np.int64]
    user_codes: NDArray[np.int64]
    text: str


@dataclass
class _Seat:
    """What the engine knows of the session in one slot."""

    slot: Slot
    sampling: Sampling
    script: Script
    voice: str  # digest of the voice, key of its cached prefix
    decoder: PieceDecoder
    position: int = 0  # prompt positions prefilled so far
    live: bool = False
    fed: bool = False
    frames: int = 0
    log: TokenLog = field(default_factory=TokenLog)


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
        self._seats: list[_Seat | None] = [None] * config.slots
        self._generations = [0] * config.slots
        self._vacant = list(range(config.slots))  # a heap: lowest first, so that ticks run on short prefixes
        self._waiting: deque[Slot] = deque()
        self._prefixes: OrderedDict[str, tuple[Tensor, ...]] = OrderedDict()
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
        held = [min(seat.position + seat.frames, window) for seat in self._seats if seat is not None]
        device = self._model.device
        memory = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        return Usage(sum(held), memory, self.voice_hits, self.voice_misses)

    def admit(self, persona: Persona, voice: Voice | None = None) -> Slot:
        """Takes a slot and queues its prompt; `voice` replaces the library's voice of that name.

        Raises NoCapacity, UnknownVoice, PromptTooLong or BadParameter, and then takes nothing.
        """
        check_sampling(persona.sampling, self._model.config.lm)
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
        self._seats[index] = _Seat(
            slot, persona.sampling, script, voice.digest, PieceDecoder(self._tokenizer)
        )
        self._waiting.append(slot)
        return slot

    def prime(self) -> Slot | None:
        """Runs one prefill chunk for the slot that waits longest; that slot once it is live, else None."""
        while self._waiting:
            seat = self._seat_or_none(self._waiting[0])
            if seat is None:  # closed while it waited
                self._waiting.popleft()
                continue
            self._prefill(seat)
            if seat.position < seat.script.frames - 1:
                return None
            self._waiting.popleft()
            self._go_live(seat)
            return seat.slot
        return None

    @property
    def priming(self) -> bool:
        """Whether any slot still waits for its prompt."""
        return any(self._seat_or_none(slot) is not None for slot in self._waiting)

    def open(self, persona: Persona, voice: Voice | None = None) -> Slot:
        """`admit`, then `prime` until the new slot is live."""
        slot = self.admit(persona, voice)
        while self.prime() != slot:
            pass
        return slot

    def feed(self, slot: Slot, frame: NDArray[np.float32]) -> None:
        """Hands over the user's next frame, float32 [1920]; it is heard in the next `step`.

        Raises SessionLost for a closed slot, BadParameter for a frame of another shape, for one that is not
        finite, and when the slot is not live or has not yet heard its last frame.
        """
        seat = self._seat(slot)
        if frame.shape != (FRAME_SIZE,) or not np.isfinite(frame).all():
            raise BadParameter(f"a frame is {FRAME_SIZE} finite samples")
        if not seat.live or seat.fed:
            raise BadParameter("the slot cannot take a frame now")
        self._runner.pcm[slot.index] = torch.from_numpy(np.asarray(frame, np.float32))
        seat.fed = True

    def step(self) -> list[Output]:
        """One tick over every live slot that holds a frame; [] when none does.

        Raises EngineFault when the device fails; the engine is then of no further use.
        """
        ready = [seat for seat in self._seats if seat is not None and seat.fed]
        if not ready:
            return []
        try:
            frames = self._runner.run([seat.slot.index for seat in ready])
        except RuntimeError as error:
            raise EngineFault("the engine failed in a step") from error
        return [self._deliver(seat, frames) for seat in ready]

    def close(self, slot: Slot) -> None:
        """Gives the slot back. Closing twice, or closing a slot that has a new user, does nothing."""
        if self._seat_or_none(slot) is None:
            return
        self._seats[slot.index] = None
        self._generations[slot.index] += 1
        heapq.heappush(self._vacant, slot.index)

    def log(self, slot: Slot) -> TokenLog:
        """The session's frames so far; it goes on growing until the slot is closed. Raises SessionLost."""
        return self._seat(slot).log

    def _seat_or_none(self, slot: Slot) -> _Seat | None:
        seat = self._seats[slot.index]
        return seat if seat is not None and seat.slot == slot else None

    def _seat(self, slot: Slot) -> _Seat:
        seat = self._seat_or_none(slot)
        if seat is None:
            raise SessionLost("the slot has been closed")
        return seat

    def _prefill(self, seat: _Seat) -> None:
        """The next chunk of one prompt. The voice's part ends a chunk, so that it can be shared."""
        script, ring, index = seat.script, self._state.lm.ring, seat.slot.index
        cached = self._prefixes.get(seat.voice)
        with torch.inference_mode():
            if seat.position == 0 and cached is not None:
                self._prefixes.move_to_end(seat.voice)
                self.voice_hits += 1
                copy_in(ring, index, cached)
                seat.position = script.prefix
            end = script.prefix if seat.position < script.prefix else script.frames - 1
            stop = min(seat.position + self._config.prefill_chunk, end)
            if stop > seat.position:
                x = script.inputs(self._model.lm, seat.position, stop)
                self._model.lm.transformer.prefill(x, ring, index, seat.position)
                seat.position = stop
            if stop == script.prefix and cached is None and 0 < stop < ring.capacity:
                self._keep_prefix(seat.voice, index, stop)

    def _warm_prefill(self) -> None:
        """Has every kernel a prefill may need compiled and loaded before the first session comes."""
        lm, ring = self._model.lm, self._state.lm.ring
        with torch.inference_mode():
            for positions in sorted({1, 17, 33, 65, self._config.prefill_chunk}):
                x = torch.zeros(1, positions, lm.config.temporal.dim, device=lm.device, dtype=lm.dtype)
                for start in (0, 1):  # with nothing before it, and with something
                    lm.transformer.prefill(x.clone(), ring, 0, start)
        self._state.reset(0)

    def _keep_prefix(self, voice: str, index: int, length: int) -> None:
        prefix = copy_out(self._state.lm.ring, index, length)
        if self._config.voice_memory == "host" and self._model.device.type == "cuda":
            prefix = tuple(_pinned(part) for part in prefix)
        self.voice_misses += 1
        self._prefixes[voice] = prefix
        while len(self._prefixes) > self._config.voice_cache:
            self._prefixes.popitem(last=False)

    def _go_live(self, seat: _Seat) -> None:
        state, index = self._state.lm, seat.slot.index
        state.tokens[index] = seat.script.ring
        state.provided[index] = seat.script.provided
        state.offset[index] = seat.script.frames
        seat.live = True

    def _deliver(
        self,
        seat: _Seat,
        frames: Frames,
    ) -> Output:
        index = seat.slot.index
        row = frames.tokens[index]
        output = Output(
            slot=seat.slot,
            frame=seat.frames,
            pcm=frames.pcm[index],
            tokens=row,
            user_codes=frames.user_codes[index],
            text=seat.decoder.push(int(row[0])),
        )
        seat.log.append(row, forced=seat.frames == 0)  # the first frame out is the prompt's last
        seat.fed = False
        seat.frames += 1
        return output


def _pinned(part: Tensor) -> Tensor:
    """A copy in host memory that the device can read by itself; complete before the stream's next wait."""
    return torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True)


def check_sampling(sampling: Sampling, lm: LMConfig) -> None:
    """Raises BadParameter for a value the model cannot draw with."""
    for name in ("text_temperature", "audio_temperature"):
        temperature = getattr(sampling, name)
        if not math.isfinite(temperature) or 0 < temperature < COLDEST:
            raise BadParameter(f"{name} must be a finite number, either 0 (greedy) or at least {COLDEST:g}")
    for name, size in (("text_topk", lm.text_card), ("audio_topk", lm.card)):
        if not 0 <= getattr(sampling, name) <= size:
            raise BadParameter(f"{name} must lie between 0 and {size}")
    for name in ("text_seed", "audio_seed"):
        if not 0 <= getattr(sampling, name) < 2**63:
            raise BadParameter(f"{name} must lie between 0 and 2**63 - 1")
