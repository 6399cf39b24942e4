"""Whole models on the device: does it compute what it should, and what does int8 cost?

The device against the CPU on a small model, captured ticks against eager ones, int8 keys and values and
weights against exact ones. The last needs no GPU:

    python -m benchmarks.gpu.checks [--output benchmarks/results/int8-cost-cpu.json]
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.setup import make_engine, persona, random_model, release, talk
from benchmarks.machine import machine, publish
from personaplex.config import PRESET_TINY, LMConfig, ModelConfig, TransformerConfig
from personaplex.engine.engine import Engine
from personaplex.model import Model

CPU = torch.device("cpu")


def mid_config(layers: int = 4, dim: int = 256) -> ModelConfig:
    """A small language model of the real shape of heads, over the tiny codec."""
    temporal = TransformerConfig(dim=dim, layers=layers, heads=dim // 64, hidden=704, context=300)
    depth = TransformerConfig(dim=128, layers=2, heads=2, hidden=352, context=16)
    return dataclasses.replace(PRESET_TINY, lm=LMConfig(temporal=temporal, depth=depth, text_card=2_000))


def against_cpu(device: torch.device, count: int = 40) -> dict[str, Any]:
    """A greedy float32 session on both: how many frames are the same before the first that is not."""
    heard = []
    for where in (CPU, device):
        model = random_model(mid_config(), where, torch.float32, drawn_on=CPU)
        engine = make_engine(model, 2, voice_frames=20)
        heard.append(talk(engine, [engine.open(persona(0, greedy=True))], count)[:, 0])
    return {"frames": count, "frames_equal": equal_frames(heard[0], heard[1])}


def equal_frames(ours: np.ndarray, theirs: np.ndarray) -> int:
    """Frames of tokens [frames, 17] before the first difference."""
    same = (ours == theirs).all(-1)
    return len(same) if same.all() else int(same.argmin())


def captured_against_eager(model: Model, slots: int, count: int = 8) -> dict[str, Any]:
    """Sampled sessions through captured graphs and eagerly: bit-identical?"""
    heard: list[np.ndarray] = []
    captured: list[int] = []
    for graphs in (True, False):
        engine: Engine = make_engine(model, slots, voice_frames=20, graphs=graphs)
        opened = [engine.open(persona(i)) for i in range(slots)]
        heard.append(talk(engine, opened, count))
        captured = engine._runner.widths or captured
        del engine
        release(model.device)
    return {
        "slots": slots,
        "frames": count,
        "captured": captured,
        "equal": bool((heard[0] == heard[1]).all()),
    }


def int8_cost(positions: int = 200) -> dict[str, Any]:
    """What int8 keys and values, and int8 weights, change in a small random model in float32, on the CPU.

    Relative error (root of mean squares) of the text logits, and how often the likeliest token stays, when
    the same random inputs are stepped through. A random model's logits are flat: its likeliest token changes
    far more easily than a trained one's.
    """
    config = mid_config()
    exact = _text_logits(config, "auto", "auto", positions)
    report: dict[str, Any] = {"model": "random, dim 256, 4 layers, float32", "positions": positions}
    for name, weights, kv in (("kv", "auto", "int8"), ("weights", "int8", "auto"), ("both", "int8", "int8")):
        logits = _text_logits(config, weights, kv, positions)
        error = float((logits - exact).norm() / exact.norm())
        agreement = float((logits.argmax(-1) == exact.argmax(-1)).float().mean())
        report[name] = {"logit_error": round(error, 5), "greedy_agreement": round(agreement, 4)}
    return report


def _text_logits(config: ModelConfig, weights: str, kv: str, positions: int) -> Tensor:
    random = torch.Generator().manual_seed(3)
    inputs = torch.randn(positions, 4, config.lm.temporal.dim, generator=random)
    lm = random_model(config, CPU, torch.float32, weights).lm
    ring = lm.allocate(4, torch.int8 if kv == "int8" else None).ring
    with torch.inference_mode():
        hidden = [lm.transformer.step(x.clone(), ring, torch.ones(4, dtype=torch.bool)) for x in inputs]
        return lm.text_linear(lm.out_norm(torch.stack(hidden, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the result here as JSON")
    arguments = parser.parse_args()
    result = {"benchmark": "int8 cost", "machine": machine("torch"), **int8_cost()}
    publish(result, arguments.output)


if __name__ == "__main__":
    main()
