"""The engine against the reference's way of stepping, and its steps against what the machine can do.

    python -m benchmarks.engine [--rounds 5] [--output benchmarks/results/engine-cpu.json]

A model of middle size with random weights, float32, one thread. CPU time of the process, the two sides
alternate within a round so that both see the same machine; `best` is the least of the rounds, and ratios are
of these. `benchmarks.naive` is the baseline; before anything is timed both must draw the same greedy tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import machine, publish
from benchmarks.naive import NaiveLM
from personaplex.config import (
    CODEBOOKS,
    FRAME_SECONDS,
    FRAME_SIZE,
    PRESET_7B,
    PRESET_TINY,
    SILENCE_CODES,
    SILENCE_FRAMES,
    SINE_CODES,
    STREAMS,
    TEXT_PAD,
    USER,
    EngineConfig,
    LMConfig,
    ModelConfig,
    Sampling,
    TransformerConfig,
)
from personaplex.engine.engine import Engine
from personaplex.model import Model, lm, mimi, tiny
from personaplex.model.hub import resolve
from personaplex.model.lm import LM, LMInputs
from personaplex.model.mimi import Mimi
from personaplex.model.weights import load_model
from personaplex.persona import Persona
from personaplex.text import Tokenizer
from personaplex.voices import Voice, VoiceLibrary

MIDDLE = LMConfig(
    temporal=TransformerConfig(dim=512, layers=9, heads=8, hidden=1_408, context=3_000),
    depth=TransformerConfig(dim=128, layers=2, heads=4, hidden=352, context=16),
    text_card=2_000,
)
VOICE_FRAMES, TEXT_TOKENS = 125, 60
SESSIONS = 8
GREEDY = Sampling().greedy()


class Words:
    """A tokenizer of as many ids as the model has; the role text is a list of ids."""

    def encode_prompt(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def piece(self, token: int) -> str:
        return f" {token}"

    def byte(self, token: int) -> None:
        return None


@dataclass
class Subject:
    """The middle-sized model, its weights under the checkpoint's names, and one prompt for it."""

    model: Model
    weights: dict[str, Tensor]
    voice: Tensor  # codes [8, F]
    text: list[int]

    @classmethod
    def make(cls) -> Subject:
        config = ModelConfig(lm=MIDDLE, mimi=PRESET_TINY.mimi)
        network = LM(MIDDLE)
        weights = tiny.lm_weights({name: tuple(t.shape) for name, t in network.state_dict().items()})
        network.load_state_dict(weights, strict=True)
        network.prepare()
        codec = make_mimi(PRESET_TINY.mimi)
        rng = np.random.default_rng(0)
        voice = torch.from_numpy(rng.integers(0, MIDDLE.card, (CODEBOOKS, VOICE_FRAMES)))
        text = rng.integers(4, MIDDLE.text_card, TEXT_TOKENS).tolist()
        return cls(Model(network, codec, config), weights, voice, text)

    def engine(self, slots: int, voice_cache: int = 0) -> Engine:
        config = EngineConfig(slots=slots, voice_cache=voice_cache)
        library = VoiceLibrary(MIDDLE)
        return Engine(self.model, library, Words(), config)  # type: ignore[arg-type]

    def persona(self, sampling: Sampling = GREEDY) -> Persona:
        return Persona(text_prompt=" ".join(map(str, self.text)), sampling=sampling)

    def naive(self, sampling: Sampling = GREEDY) -> NaiveLM:
        return NaiveLM(self.weights, MIDDLE, sampling)

    def prefill_naive(self, naive: NaiveLM) -> None:
        """The whole prompt, one frame a step."""
        for codes in self.voice.t().tolist():
            naive.step(user=SINE_CODES, agent=codes, text=TEXT_PAD)
        silence = [TEXT_PAD] * SILENCE_FRAMES
        for token in (*silence, *self.text, *silence):
            naive.step(user=SINE_CODES, agent=SILENCE_CODES, text=token)


def make_mimi(config: Any) -> Mimi:
    codec = Mimi(config)
    shapes = {name: tuple(t.shape) for name, t in codec.state_dict().items()}
    codec.load_state_dict(tiny.mimi_weights(shapes), strict=True)
    codec.prepare()
    return codec


class LiveLM:
    """The language model's part of an engine's tick, for every slot of a prefilled engine."""

    def __init__(self, subject: Subject, slots: int, sampling: Sampling) -> None:
        self.network = subject.model.lm
        engine = subject.engine(slots, voice_cache=1)
        voice, persona = Voice.from_codes(subject.voice), subject.persona(sampling)
        for _ in range(slots):
            engine.open(persona, voice)
        self.state, self.sampling = engine._state.lm, engine._state.sampling
        self.active = torch.ones(slots, dtype=torch.bool)

    @torch.inference_mode()
    def step(self, codes: Tensor) -> Tensor:
        """User codes [slots, 8] -> tokens [slots, 17]."""
        tokens = torch.zeros(len(codes), STREAMS, dtype=torch.int64)
        given = torch.zeros_like(tokens, dtype=torch.bool)
        tokens[:, USER], given[:, USER] = codes, True
        inputs = LMInputs(tokens, given)
        out = lm.step(self.network, self.state, inputs, self.sampling, self.active, CODEBOOKS)
        return out.tokens

    def fill(self, positions: int) -> None:
        """Moves every session on to `positions`, as if that much had been said."""
        self.state.ring.offset.fill_(positions)
        self.state.offset.fill_(positions + 1)


def alternate(rounds: int, **tasks: Callable[[], object]) -> dict[str, dict[str, float]]:
    """CPU milliseconds of each task: best and median of the rounds, after one that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for index in range(rounds + 1):
        for name, task in tasks.items():
            begin = time.process_time()
            task()
            if index:
                taken[name].append(1e3 * (time.process_time() - begin))
    return {
        name: {"best_ms": round(min(ms), 3), "median_ms": round(statistics.median(ms), 3)}
        for name, ms in taken.items()
    }


def ratio(result: dict[str, dict[str, float]], slow: str, fast: str) -> float:
    return round(result[slow]["best_ms"] / result[fast]["best_ms"], 2)


def same_tokens(subject: Subject, frames: int = 8) -> None:
    """Both sides, from the same prompt and the same user, must say the same."""
    naive, live = subject.naive(), LiveLM(subject, 1, GREEDY)
    subject.prefill_naive(naive)
    rng = np.random.default_rng(1)
    for _ in range(frames):
        codes = torch.from_numpy(rng.integers(0, MIDDLE.card, (1, CODEBOOKS)))
        theirs = naive.step(user=codes[0].tolist())
        ours = live.step(codes)[0]
        if theirs is None or not torch.equal(ours, theirs):
            raise SystemExit("the engine and the baseline do not say the same: nothing was measured")


def measure_prompt(subject: Subject, rounds: int) -> dict[str, Any]:
    """From a persona to a session ready to speak, the voice's prefix not cached."""
    engine, voice, persona = subject.engine(1), Voice.from_codes(subject.voice), subject.persona()

    def ours() -> None:
        engine.close(engine.open(persona, voice))

    result = alternate(rounds, naive=lambda: subject.prefill_naive(subject.naive()), engine=ours)
    frames = VOICE_FRAMES + TEXT_TOKENS + 2 * SILENCE_FRAMES
    return {"frames": frames, **result, "times_naive": ratio(result, "naive", "engine")}


def measure_step(subject: Subject, rounds: int, filled: int | None = None) -> dict[str, Any]:
    """One frame of a live session with the default sampling, after the prompt or at `filled` positions."""
    sampling = Sampling()
    naive, live = subject.naive(sampling), LiveLM(subject, 1, sampling)
    if filled is None:
        subject.prefill_naive(naive)
    else:
        live.fill(filled)
        naive.offset = filled + 1
        naive.tokens[:] = live.state.tokens[0]
        for ring in naive.rings:
            ring.written = filled
    codes = torch.randint(0, MIDDLE.card, (1, CODEBOOKS))
    listed = codes[0].tolist()
    result = alternate(rounds, naive=lambda: naive.step(user=listed), engine=lambda: live.step(codes))
    positions = int(live.state.ring.offset[0])
    return {
        "positions": positions,
        **result,
        "times_naive": ratio(result, "naive", "engine"),
        "work": work_of_step(positions, result["engine"]["best_ms"]),
    }


def measure_batch(subject: Subject, rounds: int) -> dict[str, Any]:
    """Frames a second of eight sessions in one tick against one session."""
    one, many = LiveLM(subject, 1, Sampling()), LiveLM(subject, SESSIONS, Sampling())
    codes = torch.randint(0, MIDDLE.card, (SESSIONS, CODEBOOKS))
    result = alternate(rounds, one=lambda: one.step(codes[:1]), eight=lambda: many.step(codes))
    gain = SESSIONS * result["one"]["best_ms"] / result["eight"]["best_ms"]
    return {**result, "times_frames_per_second": round(gain, 2)}


def measure_mimi(rounds: int) -> dict[str, Any]:
    """Encode plus decode of one frame a session, at the size of the released codec."""
    codec, cpu = make_mimi(PRESET_7B.mimi), torch.device("cpu")

    def task(slots: int) -> Callable[[], None]:
        state, active = codec.allocate(slots, cpu), torch.ones(slots, dtype=torch.bool)
        pcm = 0.1 * torch.randn(slots, FRAME_SIZE)

        def run() -> None:
            with torch.inference_mode():
                codes = mimi.encode(codec, state.encoder, pcm, active)
                mimi.decode(codec, state.decoder, codes, active)

        return run

    result = alternate(rounds, one=task(1), eight=task(SESSIONS))
    return {**result, "eight_per_frame_ms": round(result["eight"]["best_ms"] / SESSIONS, 3)}


def measure_tiny(rounds: int, frames: int = 25) -> dict[str, Any]:
    """`tiny` as a whole, codec included: CPU time for a second of one conversation, and of eight."""
    checkpoint = resolve("tiny")
    library = VoiceLibrary(checkpoint.config.lm)
    model = load_model(checkpoint, "cpu", torch.float32)
    tokenizer = Tokenizer(checkpoint.tokenizer)
    frame = (0.05 * np.random.default_rng(0).standard_normal(FRAME_SIZE)).astype(np.float32)

    def task(sessions: int) -> Callable[[], None]:
        engine = Engine(model, library, tokenizer, EngineConfig(slots=sessions))
        slots = [engine.open(Persona()) for _ in range(sessions)]

        def run() -> None:
            for _ in range(frames):
                for slot in slots:
                    engine.feed(slot, frame)
                engine.step()

        return run

    result, seconds = alternate(rounds, one=task(1), eight=task(SESSIONS)), frames * FRAME_SECONDS
    one, eight = (round(result[key]["best_ms"] / (1e3 * seconds), 3) for key in ("one", "eight"))
    return {"real_time_factor": one, "real_time_factor_of_eight": eight}


def work_of_step(positions: int, ms: float) -> dict[str, float]:
    """Bytes a live step must read (float32), the operations it must do, and the rates that makes."""
    temporal, depth = MIDDLE.temporal, MIDDLE.depth
    layer = 4 * temporal.dim**2 + 3 * temporal.dim * temporal.hidden
    backbone = temporal.layers * layer + MIDDLE.text_card * temporal.dim
    depth_layer = 4 * depth.dim**2 + 3 * depth.dim * depth.hidden
    one_depth = depth.layers * depth_layer + temporal.dim * depth.dim + depth.dim * MIDDLE.card
    weights = backbone + CODEBOOKS * one_depth
    cached = 2 * temporal.layers * temporal.dim * positions
    gigabytes, gigaflops = 4 * (weights + cached) / 1e9, 2 * (weights + cached) / 1e9
    return {
        "megabytes": round(1e3 * gigabytes, 2),
        "megaflops": round(1e3 * gigaflops, 2),
        "gigabytes_per_s": round(1e3 * gigabytes / ms, 2),
        "gigaflops_per_s": round(1e3 * gigaflops / ms, 2),
    }


def measure_limits(rounds: int) -> dict[str, float]:
    """What one core does at most here: reading memory larger than its caches, and multiplying matrices."""
    large = torch.randn(8_192, 8_192)
    a, b = torch.randn(1_024, 1_024), torch.randn(1_024, 1_024)
    result = alternate(rounds, read=lambda: large.sum(), multiply=lambda: a @ b)
    return {
        "gigabytes_per_s": round(4 * 8_192**2 / 1e6 / result["read"]["best_ms"], 2),
        "gigaflops_per_s": round(2 * 1_024**3 / 1e6 / result["multiply"]["best_ms"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="of the steps; prompts run a fifth as often")
    parser.add_argument("--output", type=Path, help="write the result here as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds = arguments.rounds
    subject = Subject.make()
    same_tokens(subject)
    result = {
        "benchmark": "engine",
        "machine": machine("torch", "numpy") | {"threads": 1},
        "limits": measure_limits(rounds),
        "prompt": measure_prompt(subject, max(1, rounds // 5)),
        "step_after_prompt": measure_step(subject, rounds),
        "step_at_full_context": measure_step(subject, rounds, filled=MIDDLE.temporal.context),
        "batch": measure_batch(subject, rounds),
        "mimi_full_size": measure_mimi(rounds),
        "tiny": measure_tiny(rounds),
    }
    publish(result, arguments.output)


if __name__ == "__main__":
    main()
