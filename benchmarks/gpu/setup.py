"""What `benchmarks.gpu` measures on: a model of random weights made where it runs, and engines over it.

Needs torch, numpy, triton (on CUDA) and sentencepiece, and no file of a checkpoint. Random weights cost what
trained ones cost; what the model says with them means nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import personaplex
from personaplex.config import (
    CODEBOOKS,
    FRAME_SIZE,
    REBUILD_AUDIO_S,
    STREAMS,
    EngineConfig,
    LMConfig,
    ModelConfig,
    Sampling,
    frames_in,
)
from personaplex.engine.engine import Engine
from personaplex.engine.interface import Slot
from personaplex.model import Model
from personaplex.model.lm import LM
from personaplex.model.mimi import Mimi
from personaplex.model.offload import place_quantized
from personaplex.persona import Persona
from personaplex.sessionlog import SessionLog
from personaplex.text import Tokenizer
from personaplex.voices import Voice

VOICE_FRAMES = 125  # ten seconds, as the released voices
PROMPT_TOKENS = 60
TOKENIZER = Path(personaplex.__file__).parent / "data" / "tiny-tokenizer.model"


class Words(Tokenizer):
    """Role texts of a wanted number of tokens, whatever the model's vocabulary: the text is that number."""

    def __init__(self) -> None:
        super().__init__(TOKENIZER)

    def encode_prompt(self, text: str) -> list[int]:
        return [5 + i % 100 for i in range(int(text or 0))]

    def piece(self, token: int) -> str:
        return super().piece(token % self.size)

    def byte(self, token: int) -> int | None:
        return None


class Voices:
    """A random voice for every name."""

    def __init__(self, lm: LMConfig, frames: int = VOICE_FRAMES) -> None:
        self._card, self._frames = lm.card, frames

    def get(self, name: str) -> Voice:
        random = torch.Generator().manual_seed(sum(name.encode()))
        return Voice.from_codes(torch.randint(0, self._card, (CODEBOOKS, self._frames), generator=random))


def random_model(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    weights: str = "auto",
    drawn_on: torch.device | None = None,
) -> Model:
    """A prepared model whose activations stay of order one.

    Weights are drawn where they stay; `drawn_on` one device they are the same on any other.
    """
    random = torch.Generator(drawn_on or device).manual_seed(1)
    with torch.device("meta"):
        lm, mimi = LM(config.lm), Mimi(config.mimi)
    deep = (2.0 * config.lm.temporal.layers) ** -0.5
    parts: list[tuple[nn.Module, torch.dtype]] = [(lm, dtype), (mimi, torch.float32)]
    for part, kind in parts:
        filled = {}
        for name, like in part.state_dict().items():
            scale = _scale(name, tuple(like.shape))
            if scale is not None and _ends_block(name):
                scale *= deep
            filled[name] = _tensor(like, scale, random, kind).to(device)
        part.load_state_dict(filled, strict=True, assign=True)
    lm.prepare()
    mimi.prepare()
    if weights == "int8":
        place_quantized(lm, device)
    return Model(lm, mimi, config)


def _tensor(like: Tensor, scale: float | None, random: torch.Generator, kind: torch.dtype) -> Tensor:
    if scale is None:
        return torch.ones(like.shape, device=random.device, dtype=kind)
    return torch.randn(like.shape, device=random.device, dtype=kind, generator=random).mul_(scale)


def _ends_block(name: str) -> bool:
    return "transformer" in name and ("out_proj" in name or "linear_out" in name)


def _scale(name: str, shape: tuple[int, ...]) -> float | None:
    """Standard deviation of one tensor's numbers; None: all ones."""
    if name.endswith(("alpha", "_initialized", "cluster_usage")) or (".norm" in name and "weight" in name):
        return None
    if name.endswith("bias"):
        return 0.02
    if name.endswith((".layer_scale_1.scale", ".layer_scale_2.scale")):
        return 0.2
    if name.startswith(("emb.", "text_emb.")):
        return 17**-0.5
    if "emb" in name:
        return 1.0
    if "convtr" in name:
        return (2 * shape[0] if shape[1] > 1 else 2) ** -0.5
    return float(np.prod(shape[1:])) ** -0.5


def make_engine(model: Model, slots: int, voice_frames: int = VOICE_FRAMES, **config: Any) -> Engine:
    """An engine over random voices; `config` as EngineConfig's."""
    voices: Any = Voices(model.config.lm, voice_frames)
    return Engine(model, voices, Words(), EngineConfig(slots=slots, **config))


def persona(index: int, voice: str = "NATF0", greedy: bool = False) -> Persona:
    """Session `index`: seeds of its own, the usual sampling and a role text of PROMPT_TOKENS tokens."""
    sampling = Sampling(text_seed=index, audio_seed=1_000 + index)
    return Persona(voice, str(PROMPT_TOKENS), sampling.greedy() if greedy else sampling)


def log_of(
    index: int,
    count: int,
    lm: LMConfig,
    audio_s: float = REBUILD_AUDIO_S,
    who: Persona | None = None,
) -> SessionLog:
    """A session of `count` answered frames of random tokens, with the last `audio_s` of its sound.

    What a rebuild costs does not depend on the tokens.
    """
    random = np.random.default_rng(index)
    tokens = random.integers(0, lm.card, (count, STREAMS)).astype(np.int32)
    tokens[:, 0] = random.integers(0, min(lm.text_card, 300), count)
    sound = frames(min(count, frames_in(audio_s)), index)
    return SessionLog(who or persona(index), tokens, np.arange(count) == 0, sound)


def fill(engine: Engine, context: int) -> None:
    """Every slot as after `context` positions: rings full of noise up to there, or wrapped."""
    state = engine._state
    for ring in (state.lm.ring, state.mimi.encoder.ring, state.mimi.decoder.ring):
        for part in ring.contents:
            for slot in part:
                if part.dtype == torch.int8:
                    slot.random_(-127, 128)
                elif part.dtype == torch.float16:
                    slot.fill_(0.01)
                else:
                    slot.normal_()
    state.lm.tokens.fill_(5)
    set_context(engine, context)


def set_context(engine: Engine, context: int) -> None:
    """Moves every slot's clocks to `context` positions."""
    state = engine._state
    state.lm.ring.offset.fill_(context)
    state.lm.offset.fill_(context + 1)
    for ring in (state.mimi.encoder.ring, state.mimi.decoder.ring):
        ring.offset.fill_(2 * context)
    for index in range(engine.slots):
        state.sampling.write(index, persona(index).sampling)


def frames(count: int, seed: int = 0) -> np.ndarray:
    """Soft noise, float32 [count, 1920]."""
    random = np.random.default_rng(seed)
    return (0.05 * random.standard_normal((count, FRAME_SIZE))).astype(np.float32)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Gives freed memory back, so that the next engine's allocation sees it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def timed(work: Callable[[], Any], device: torch.device, rounds: int, warm: int = 2) -> float:
    """Least seconds of one call, all launched work included."""
    for _ in range(warm):
        work()
    best = float("inf")
    for _ in range(rounds):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        best = min(best, time.perf_counter() - start)
    return best


@dataclass(frozen=True)
class Spread:
    """Of many times, in milliseconds."""

    p50: float
    p99: float
    max: float
    count: int

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        ms = 1e3 * np.asarray(seconds)
        p50, p99, most = (round(float(x), 3) for x in (np.median(ms), np.percentile(ms, 99), ms.max()))
        return cls(p50, p99, most, len(ms))


def talk(engine: Engine, slots: list[Slot], count: int, seed: int = 0) -> np.ndarray:
    """Tokens [count, sessions, 17] of all `slots` hearing the same noise."""
    heard = []
    for frame in frames(count, seed):
        for slot in slots:
            engine.feed(slot, frame)
        heard.append([out.tokens for out in engine.step()])
    return np.asarray(heard)
