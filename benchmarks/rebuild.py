"""How exact a rebuilt session is, by what is kept and run of it, and how long a rebuild takes.

    python -m benchmarks.rebuild --output benchmarks/results/rebuild.json

Three parts, on a CPU:

- `user_codes`: of a talk of 110 s the encoder is rebuilt from the last 10, 20, 40 and 80 s of sound; then
  both hear the next 4 s. The share of equal codes, and of frames whose eight codes are all equal. With
  `tiny`'s codec and with one of the released model's sizes and random weights (not with `--quick`).
- `windows`: a model as deep as the released one (32 layers, narrow, a window of 64 positions) after 12
  windows of talk, rebuilt from the last few: the error of its newest keys, relative to their size, and the
  share of equal tokens at the next frame, greedy, over many places to stop.
- `speed`: seconds from a log in memory to a live slot with `tiny`, by length of the talk, everything run.

The weights of the first two are random. Trained ones look less far back, or further: the figures say how the
error falls with what is kept, and are to be taken again on the real weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.gpu.setup import TOKENIZER, Voices, Words, frames, log_of, random_model
from benchmarks.machine import machine, publish
from loadtest.speech import DEFAULT as RECORDING
from loadtest.speech import _frames as recorded
from personaplex.config import (
    FRAME_RATE,
    PRESET_7B,
    PRESET_TINY,
    EngineConfig,
    ModelConfig,
    Sampling,
    TransformerConfig,
)
from personaplex.engine.engine import Engine
from personaplex.model import Model, mimi
from personaplex.model.mimi import Mimi
from personaplex.model.weights import load_lm, load_mimi
from personaplex.persona import Persona
from personaplex.sessionlog import SessionLog
from personaplex.text import Tokenizer
from personaplex.voices import VoiceLibrary

CPU = torch.device("cpu")
KEPT_S = (10, 20, 40, 80)
TALK_S, AFTER_S = 110, 4
BLOCK = 32  # frames, as EngineConfig.rebuild_chunk
WINDOWS = (1, 2, 3, 4, 6, 8)
LENGTHS_S = (30, 60, 120, 240, 480, 960)


def talk_sound(count: int) -> NDArray[np.float32]:
    """Speech, float32 [count, 1920]: a recording in rounds, each at another level and with other noise."""
    one = np.stack(list(recorded(RECORDING)))
    rng, rounds = np.random.default_rng(5), list[NDArray[np.float32]]()
    while sum(len(one) for one in rounds) < count:
        noise = 0.002 * rng.standard_normal(one.shape)
        rounds.append((rng.uniform(0.4, 1.1) * one + noise).astype(np.float32))
    sound: NDArray[np.float32] = np.concatenate(rounds)[:count]
    return sound


@torch.inference_mode()
def encoded(codec: Mimi, sound: NDArray[np.float32], wanted: int) -> Tensor:
    """The codes [wanted, 8] of the last frames of `sound`, which begins a stream."""
    state, codes = codec.allocate(1, CPU).encoder, []
    for start in range(0, len(sound), BLOCK):
        block = torch.from_numpy(sound[start : start + BLOCK]).flatten()
        codes.append(mimi.encode_block(codec, state, 0, start, block))
    return torch.cat(codes)[-wanted:]


def user_codes(codec: Mimi) -> dict[str, Any]:
    """Agreement of an encoder that heard only the last seconds with one that heard everything."""
    before, after = int(TALK_S * FRAME_RATE), int(AFTER_S * FRAME_RATE)
    sound = talk_sound(before + after)
    exact, found = encoded(codec, sound, after), {}
    for kept in KEPT_S:
        equal = encoded(codec, sound[before - int(kept * FRAME_RATE) :], after) == exact
        found[f"{kept} s"] = {
            "codes_equal": round(float(equal.float().mean()), 4),
            "first_codebook_equal": round(float(equal[:, 0].float().mean()), 4),
            "frames_equal": round(float(equal.all(1).float().mean()), 4),
        }
    return found


def deep_model() -> Model:
    """As many temporal layers as the released model has, and its codec's depth, narrow."""
    temporal = TransformerConfig(dim=128, layers=32, heads=4, hidden=344, context=64)
    lm = dataclasses.replace(PRESET_TINY.lm, temporal=temporal)
    return random_model(ModelConfig(lm, PRESET_TINY.mimi), CPU, torch.float32)


def windows() -> dict[str, Any]:
    """What is lost when only the last windows are run."""
    model = deep_model()
    context = model.config.lm.temporal.context
    persona = Persona("NATF0", "10", Sampling().greedy())
    whole = log_of(0, 12 * context, model.config.lm, audio_s=100.0, who=persona)
    stops = [len(whole.tokens) - 7 * back for back in range(12)]
    exact = [rebuilt(model, whole, stop, 100) for stop in stops]
    found = {}
    for count in WINDOWS:
        errors, equal = [], []
        for stop, (keys, tokens) in zip(stops, exact, strict=True):
            ours, our_tokens = rebuilt(model, whole, stop, count)
            errors.append(float((ours - keys).norm() / keys.norm()))
            equal.append(float((our_tokens == tokens).mean()))
        found[str(count)] = {
            "key_error": round(statistics.mean(errors), 6),
            "next_tokens_equal": round(statistics.mean(equal), 4),
        }
    return found


def rebuilt(model: Model, whole: SessionLog, stop: int, count: int) -> tuple[Tensor, NDArray[np.int64]]:
    """The newest key of the last layer, and the agent's half of the two frames that follow."""
    config = EngineConfig(rebuild_windows=count, rebuild_audio_s=4.0)
    voices: Any = Voices(model.config.lm, 8)
    engine = Engine(model, voices, Words(), config)
    log = SessionLog(whole.persona, whole.tokens[:stop], whole.forced[:stop], whole.sound[:stop][-50:])
    slot, tokens = engine.rebuild(log), []
    for frame in frames(2, seed=9):
        engine.feed(slot, frame)
        tokens.append(engine.step()[0].tokens[:9])
    ring = engine._state.lm.ring
    newest = int(ring.offset[0]) - 3  # of the frame in flight
    return ring.k[0, -1, :, newest % ring.capacity].clone(), np.stack(tokens)


def tiny_engine() -> Engine:
    """`tiny`, set to run everything of a log."""
    lm = load_lm(None, PRESET_TINY.lm, CPU, torch.float32)
    model = Model(lm, load_mimi(None, PRESET_TINY.mimi, CPU), PRESET_TINY)
    config = EngineConfig(rebuild_windows=1_000)
    return Engine(model, VoiceLibrary(PRESET_TINY.lm), Tokenizer(TOKENIZER), config)


def speed(engine: Engine) -> dict[str, dict[str, float]]:
    """Of five rebuilds by length of the talk, everything run and 20 s of sound kept: the median seconds, and
    the median seconds of processor time, which other programs do not lengthen.
    """
    found = {}
    for length in LENGTHS_S:
        log = log_of(0, int(length * FRAME_RATE), PRESET_TINY.lm, who=Persona())
        taken = [_seconds(engine, log) for _ in range(5)]
        wall, cpu = (round(statistics.median(column), 3) for column in zip(*taken, strict=True))
        found[f"{length} s"] = {"seconds": wall, "cpu_seconds": cpu}
    return found


def _seconds(engine: Engine, log: SessionLog) -> tuple[float, float]:
    began = time.perf_counter(), time.process_time()
    slot = engine.rebuild(log)
    taken = time.perf_counter() - began[0], time.process_time() - began[1]
    engine.close(slot)
    return taken


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--quick", action="store_true", help="without the codec of the released model's size")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    engine = tiny_engine()
    result: dict[str, Any] = {"benchmark": "rebuild", "machine": machine("torch", "numpy")}
    result["speed"] = speed(engine)
    result["windows"] = windows()
    result["user_codes"] = {"tiny": user_codes(engine._model.mimi)}
    if not arguments.quick:
        large = dataclasses.replace(PRESET_TINY, mimi=PRESET_7B.mimi)
        result["user_codes"]["7b_size_random"] = user_codes(random_model(large, CPU, torch.float32).mimi)
    publish(result, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
