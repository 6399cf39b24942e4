"""Prompts into the temporal transformer's ring, in bounded chunks, and the voices that prompts share.

A voice is the beginning of every prompt of its sessions: its keys and values are copied out once and copied
in from then on. The last used `voice_cache` of them stay.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from personaplex.config import CODEBOOKS, FRAME_SIZE, EngineConfig
from personaplex.engine.rebuild import DECODED
from personaplex.engine.script import Script
from personaplex.engine.state import EngineState
from personaplex.model import Model, mimi
from personaplex.model.ring import copy_in, copy_out


@dataclass
class Prompt:
    """A script on its way into the ring of slot `index`."""

    index: int
    script: Script
    voice: str  # digest of the voice, key of its cached prefix
    label: str  # what `Usage.voices` calls it
    position: int = 0  # positions prefilled so far
    origin: int = 0  # the first position that is run

    @property
    def left(self) -> int:
        """Positions still to be run."""
        return self.script.frames - 1 - self.position


@dataclass(frozen=True)
class _Prefix:
    """Keys and values of one voice's part of a prompt."""

    label: str
    parts: tuple[Tensor, ...]


class Prefill:
    """Runs the prompts of one engine; `hits` and `misses` count voices found and not found in the cache."""

    def __init__(self, model: Model, state: EngineState, config: EngineConfig) -> None:
        self._model, self._state, self._config = model, state, config
        self._prefixes: OrderedDict[str, _Prefix] = OrderedDict()  # by digest, last used last
        self.hits = 0
        self.misses = 0

    @property
    def voices(self) -> tuple[str, ...]:
        """Labels of the cached voices, least recently used first."""
        return tuple(prefix.label for prefix in self._prefixes.values())

    def run_chunk(self, prompt: Prompt) -> None:
        """The next chunk of one prompt. The voice's part ends a chunk, so that it can be shared."""
        script, ring, index = prompt.script, self._state.lm.ring, prompt.index
        cached = self._prefixes.get(prompt.voice)
        with torch.inference_mode():
            if prompt.position == 0 and cached is not None:
                self._prefixes.move_to_end(prompt.voice)
                self.hits += 1
                copy_in(ring, index, cached.parts)
                prompt.position = script.prefix
            end = script.prefix if prompt.position < script.prefix else script.frames - 1
            stop = min(prompt.position + self._config.prefill_chunk, end)
            if stop > prompt.position:
                x = script.inputs(self._model.lm, prompt.position, stop)
                self._model.lm.transformer.prefill(x, ring, index, prompt.position, prompt.origin)
                prompt.position = stop
            whole = stop == script.prefix and prompt.origin == 0
            if whole and cached is None and 0 < stop < ring.capacity:
                self._keep(prompt, stop)

    def warm(self) -> None:
        """Compiles and loads every kernel a prefill or a rebuild may need before the first session comes."""
        lm, codec, config = self._model.lm, self._model.mimi, self._config
        with torch.inference_mode():
            for positions in sorted({1, 17, 33, 65, config.prefill_chunk}):
                x = torch.zeros(1, positions, lm.config.temporal.dim, device=lm.device, dtype=lm.dtype)
                for start in (0, 1):  # without a past, and with one
                    lm.transformer.prefill(x.clone(), self._state.lm.ring, 0, start)
            decoded = DECODED * config.rebuild_chunk
            codes = torch.zeros(decoded, CODEBOOKS, dtype=torch.int64, device=lm.device)
            sound = torch.zeros(config.rebuild_chunk * FRAME_SIZE, device=lm.device)
            mimi.decode_block(codec, self._state.mimi.decoder, 0, 0, codes, pcm_wanted=False)
            mimi.encode_block(codec, self._state.mimi.encoder, 0, 0, sound, codes_wanted=False)
        self._state.reset(0)

    def _keep(self, prompt: Prompt, length: int) -> None:
        parts = copy_out(self._state.lm.ring, prompt.index, length)
        if self._config.voice_memory == "host" and self._model.device.type == "cuda":
            parts = tuple(_pinned(part) for part in parts)
        self.misses += 1
        self._prefixes[prompt.voice] = _Prefix(prompt.label, parts)
        while len(self._prefixes) > self._config.voice_cache:
            self._prefixes.popitem(last=False)


def _pinned(part: Tensor) -> Tensor:
    """A copy in pinned host memory, complete at the stream's next synchronization."""
    return torch.empty_like(part, device="cpu", pin_memory=True).copy_(part, non_blocking=True)
