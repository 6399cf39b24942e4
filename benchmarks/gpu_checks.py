"""Whether the device computes what it should, before anything is timed on it; and what int8 costs.

Each kernel against the same sums in torch, the device against the CPU on a small model, graphs against the
same ticks launched piece by piece, int8 keys and values and weights against exact ones. The last needs no
GPU:

    python -m benchmarks.gpu_checks [--output benchmarks/results/int8-cost-cpu.json]
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_setup import make_engine, persona, random_model, release, talk
from benchmarks.machine import machine, publish
from personaplex.config import PRESET_TINY, LMConfig, ModelConfig, TransformerConfig
from personaplex.engine.engine import Engine
from personaplex.kernels import kvring
from personaplex.kernels import torch_reference as reference
from personaplex.kernels.constants import RMS_EPS
from personaplex.kernels.int8 import Int8Matrix, quantize_vectors
from personaplex.model import Model
from personaplex.model.offload import move
from personaplex.model.ring import Ring
from personaplex.model.self_attention import rope

CPU = torch.device("cpu")


def mid_config(layers: int = 4, dim: int = 256) -> ModelConfig:
    """A small language model of the real shape of heads, over the tiny codec."""
    temporal = TransformerConfig(dim=dim, layers=layers, heads=dim // 64, hidden=704, context=300)
    depth = TransformerConfig(dim=128, layers=2, heads=2, hidden=352, context=16)
    return dataclasses.replace(PRESET_TINY, lm=LMConfig(temporal=temporal, depth=depth, text_card=2_000))


def kernels(device: torch.device, capacity: int = 1_000) -> dict[str, float]:
    """Largest difference of each kernel from torch's own sums on the CPU, in float32."""
    from personaplex.kernels import triton_attention as attention
    from personaplex.kernels import triton_int8 as int8
    from personaplex.kernels import triton_pointwise as pointwise

    found: dict[str, float] = {}
    config = TransformerConfig(dim=256, layers=1, heads=2, hidden=1, context=capacity)
    for name, kind in (("float32", torch.float32), ("int8", torch.int8)):
        ring = Ring.allocate(config, 4, CPU, kind)
        ring.offset[:] = torch.tensor([0, capacity // 3, capacity - 1, 3 * capacity + 7])
        numbers = torch.randn(2, *ring.k.shape)
        if kind == torch.int8:
            kept = [quantize_vectors(x) for x in numbers]
            for part, new in zip(
                ring.contents, (kept[0][0], kept[1][0], kept[0][1], kept[1][1]), strict=True
            ):
                part.copy_(new)
        else:
            ring.k.copy_(numbers[0])
            ring.v.copy_(numbers[1])
        there = Ring(*(None if t is None else t.to(device, copy=True) for t in vars(ring).values()))
        qkv = torch.randn(4, 1, 3, 2, 128)
        angles = rope(config, ring.offset[:, None])
        expected = reference.attend(
            ring, 0, qkv, angles, kvring.window(ring, 1, torch.ones(4, dtype=torch.bool))
        )
        everyone = torch.ones(4, dtype=torch.bool, device=device)
        ours = attention.attend(
            there, 0, qkv.to(device), (angles[0].to(device), angles[1].to(device)), everyone
        )
        found[f"attention_{name}"] = _worst(ours, expected)
    found |= _depth(device)
    x, gain = torch.randn(5, 1_024), torch.rand(1_024)
    found["rms_norm"] = _worst(
        pointwise.rms_norm(x.to(device), gain.to(device), RMS_EPS),
        F.rms_norm(x, (1_024,), gain, RMS_EPS),
    )
    a, b = x.chunk(2, -1)
    found["silu_multiply"] = _worst(pointwise.silu_multiply(x.to(device)), F.silu(a) * b)
    matrix = Int8Matrix.of(torch.randn(96, 1_024))
    ours = int8.matmul(x.to(device), matrix.codes.to(device), matrix.scale.to(device))
    found["int8_product"] = _worst(ours, x @ matrix.dequantize(torch.float32).t())
    logits, keys = 3 * torch.randn(8, 2_048), torch.randint(0, 2**62, (8,))
    score = (logits / 0.8 - reference.log_noise(keys, torch.arange(2_048))).masked_fill(
        logits < logits.topk(250).values[:, -1:], -torch.inf
    )
    rule = (torch.full((8,), 0.8).to(device), torch.full((8,), 250).to(device), keys.to(device))
    drawn = pointwise.sample(logits.to(device), *rule)
    found["draws_that_differ"] = float((drawn.cpu() != score.argmax(-1)).sum())
    return found


def _depth(device: torch.device) -> dict[str, float]:
    from personaplex.kernels import triton_attention as attention

    qkv, worst = torch.randn(16, 3, 1, 3, 4, 64), 0.0
    keys, values = torch.zeros(2, 3, 4, 16, 64, device=device).unbind(0)
    for step in range(16):
        ours = attention.attend_depth(qkv[step].to(device), keys, values, step)
        q, k, v = (qkv[: step + 1, :, 0, i].permute(1, 2, 0, 3) for i in range(3))
        first = 1 if step == 15 else 0
        expected = F.scaled_dot_product_attention(q[:, :, -1:], k[:, :, first:], v[:, :, first:])
        worst = max(worst, _worst(ours, expected))
    return {"depth_attention": worst}


def _worst(ours: Tensor, expected: Tensor) -> float:
    return float((ours.cpu().float() - expected.float()).abs().max())


def against_cpu(device: torch.device, count: int = 40) -> dict[str, Any]:
    """A greedy float32 session on both: how many frames are the same before the first that is not."""
    heard = []
    for where in (CPU, device):
        model = moved(random_model(mid_config(), CPU, torch.float32), where)
        engine = make_engine(model, 2, voice_frames=20)
        heard.append(talk(engine, [engine.open(persona(0, greedy=True))], count)[:, 0])
    return {"frames": count, "frames_equal": equal_frames(heard[0], heard[1])}


def equal_frames(ours: np.ndarray, theirs: np.ndarray) -> int:
    """Frames of tokens [frames, 17] before the first difference."""
    same = (ours == theirs).all(-1)
    return len(same) if same.all() else int(same.argmin())


def moved(model: Model, device: torch.device) -> Model:
    """The same weights on another device."""
    for part in (model.lm, model.mimi):
        move(part, device)
    return model


def graphs_against_pieces(model: Model, slots: int, count: int = 8) -> dict[str, Any]:
    """Sampled sessions through recorded graphs and launched piece by piece: equal to the last bit?"""
    heard: list[np.ndarray] = []
    recorded: list[int] = []
    for graphs in (True, False):
        engine: Engine = make_engine(model, slots, voice_frames=20, graphs=graphs)
        opened = [engine.open(persona(i)) for i in range(slots)]
        heard.append(talk(engine, opened, count))
        recorded = engine._runner.widths or recorded
        del engine
        release(model.device)
    return {
        "slots": slots,
        "frames": count,
        "recorded": recorded,
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
