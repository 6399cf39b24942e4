"""An engine over the golden weights with two made-up voices, and sessions on it, for several tests."""

from __future__ import annotations

import functools

import numpy as np
import torch
from golden import CONFIG, GOLDEN, model
from numpy.typing import NDArray

from personaplex.config import FRAME_SIZE, EngineConfig, Sampling
from personaplex.engine.engine import Engine
from personaplex.errors import UnknownVoice
from personaplex.model import Model
from personaplex.persona import Persona
from personaplex.text import Tokenizer
from personaplex.voices import Voice


class Library:
    """Two made-up voices; `get` is all the engine asks of a VoiceLibrary."""

    def get(self, name: str) -> Voice:
        if name not in ("NATF0", "NATM1"):
            raise UnknownVoice(f"no voice {name}")
        generator = torch.Generator().manual_seed(len(name) + ord(name[3]) * 7)
        codes = torch.randint(0, CONFIG.lm.card, (8, 9 if name == "NATF0" else 23), generator=generator)
        return Voice.from_codes(codes)


def library() -> Library:
    return Library()


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer(GOLDEN / "tokenizer.model", size=CONFIG.lm.text_card)


@functools.cache
def speech(seed: int, frames: int) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    t = np.arange(frames * FRAME_SIZE) / 24_000
    wave = 0.3 * np.sin(2 * np.pi * (120 + 40 * seed) * t) + 0.05 * rng.standard_normal(len(t))
    return (wave * (0.5 + 0.5 * np.sin(2 * np.pi * 1.3 * t))).astype(np.float32).reshape(frames, FRAME_SIZE)


PERSONAS = [
    Persona("NATF0", "You sell bread.", Sampling(text_seed=1, audio_seed=2)),
    Persona("NATM1", "", Sampling(0.9, 0, 1.1, 0, text_seed=3, audio_seed=4)),
    Persona("NATF0", "You are a calm guide. " * 4, Sampling().greedy()),
    Persona("NATM1", "You sell bread.", Sampling(0.5, 7, 0.6, 900, text_seed=2**63 - 1, audio_seed=0)),
]


def engine(slots: int, net: Model | None = None, **config: int) -> Engine:
    return Engine(net or model(), library(), tokenizer(), EngineConfig(slots=slots, **config))  # type: ignore[arg-type]


def speak(
    machine: Engine, frames: int, persona: Persona = PERSONAS[0], voice: Voice | None = None
) -> NDArray:
    """One session alone: its tokens [frames, 17]."""
    slot = machine.open(persona, voice)
    out = []
    for frame in speech(len(persona.text_prompt) % 5, frames):
        machine.feed(slot, frame)
        out.append(machine.step()[0].tokens)
    machine.close(slot)
    return np.stack(out)
