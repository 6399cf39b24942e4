"""Each Triton kernel on `device` against `torch_reference` on the CPU, from the same random operands.

Every function returns the largest difference, or a number of differing tokens. On a CPU the kernels need
Triton's interpreter (TRITON_INTERPRET=1 before Triton is imported, so nothing here imports it at the top).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from personaplex.config import STREAMS, TransformerConfig
from personaplex.kernels import kvring
from personaplex.kernels import torch_reference as reference
from personaplex.kernels.constants import RMS_EPS
from personaplex.kernels.int8 import Int8Matrix, quantize_vectors
from personaplex.model.ring import Ring
from personaplex.model.self_attention import rope

CPU = torch.device("cpu")
LAYER = 1


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def worst(ours: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; NaN equals NaN."""
    ours, expected = (part.cpu().float().nan_to_num(7.0) for part in (ours, expected))
    assert ours.shape == expected.shape
    return float((ours - expected).abs().max())


def filled_ring(config: TransformerConfig, offsets: list[int], kind: torch.dtype) -> Ring:
    """A ring of random contents; columns nobody has written hold NaN, or the largest codes."""
    ring = Ring.allocate(config, len(offsets), CPU, kind)
    ring.offset[:] = torch.tensor(offsets)
    k, v = torch.randn(2, *ring.k.shape, generator=generator(8)).unbind(0)
    if ring.k_scale is None or ring.v_scale is None:
        ring.k.copy_(k)
        ring.v.copy_(v)
    else:
        for codes, scales, numbers in [(ring.k, ring.k_scale, k), (ring.v, ring.v_scale, v)]:
            new_codes, new_scales = quantize_vectors(numbers)
            codes.copy_(new_codes)
            scales.copy_(new_scales)
    for slot, offset in enumerate(offsets):
        for part in ring.contents:
            part[slot, :, :, offset:] = torch.nan if part.is_floating_point() else 127
    return ring


def copied(ring: Ring, device: torch.device = CPU) -> Ring:
    """The same contents in memory of their own on `device`."""
    parts = {f.name: getattr(ring, f.name) for f in dataclasses.fields(ring)}
    return Ring(**{name: t.to(device, copy=True) for name, t in parts.items() if t is not None})


def moved(angles: tuple[Tensor, Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    return angles[0].to(device), angles[1].to(device)


def ring_attention(
    device: torch.device,
    kind: torch.dtype,
    steps: int = 1,
    capacity: int = 40,
    heads: int = 2,
    head_dim: int = 24,
    **sizes: Any,
) -> tuple[float, float]:
    """Differences of output and of the ring's contents, the latter relative to 1 + their size.

    Slots are empty, nearly full, full to the column and wrapped often.
    """
    from personaplex.kernels import triton_attention

    config = TransformerConfig(dim=heads * head_dim, layers=2, heads=heads, hidden=1, context=capacity)
    offsets = [0, capacity - 2 * steps, capacity - steps, 5 * capacity + 3]
    ring = filled_ring(config, offsets, kind)
    written = copied(ring, device)
    dtype = torch.float32 if kind == torch.int8 else kind
    qkv = torch.randn(len(offsets), steps, 3, heads, head_dim, generator=generator(9)).to(dtype)
    angles = rope(config, ring.offset[:, None] + torch.arange(steps))
    everyone = torch.ones(len(offsets), dtype=torch.bool)
    expected = reference.attend(ring, LAYER, qkv, angles, kvring.window(ring, steps, everyone))
    ours = triton_attention.attend(
        written, LAYER, qkv.to(device), moved(angles, device), everyone.to(device), **sizes
    )
    contents = 0.0
    for part, other in zip(ring.contents, written.contents, strict=True):
        part, other = (t.cpu().float().nan_to_num(7.0) for t in (part, other))
        contents = max(contents, float(((part - other).abs() / (1 + part.abs())).max()))
    return worst(ours, expected), contents


def depth_attention(device: torch.device, context: int, heads: int = 2, head_dim: int = 12) -> float:
    """Over all steps of one frame; the last does not see the first."""
    from personaplex.kernels import triton_attention

    qkv = torch.randn(context, 3, 1, 3, heads, head_dim, generator=generator(4))
    ours = torch.full((2, 3, heads, context, head_dim), torch.nan, device=device)
    theirs = torch.full((2, 3, heads, context, head_dim), torch.nan)
    found = 0.0
    for step in range(context):
        mine = triton_attention.attend_depth(qkv[step].to(device), ours[0], ours[1], step)
        found = max(found, worst(mine, reference.attend_depth(qkv[step], theirs[0], theirs[1], step)))
    return found


def norm_and_gate(device: torch.device, shape: tuple[int, ...]) -> tuple[float, float]:
    """Differences of `rms_norm` and `silu_multiply`."""
    from personaplex.kernels import triton_pointwise

    x, gain = 3 * torch.randn(shape, generator=generator(1)), torch.rand(shape[-1], generator=generator(2))
    norm = triton_pointwise.rms_norm(x.to(device), gain.to(device), RMS_EPS)
    gate = triton_pointwise.silu_multiply(x.to(device))
    return worst(norm, reference.rms_norm(x, gain, RMS_EPS)), worst(gate, reference.silu_multiply(x))


def sampled(device: torch.device, kind: torch.dtype, size: int = 300) -> int:
    """Tokens that differ, over every mixture of temperature and top-k, ties included (bfloat16 has many)."""
    from personaplex.kernels import triton_pointwise

    random = generator(7)
    temperature = torch.tensor([0.8, 0.0, 1.3, 0.7, -1.0, 0.8, 0.5, 2.0, 0.8, 0.9])
    topk = torch.tensor([25, 25, 0, 1, 0, 250, size - 1, size, 2, 40])
    logits = (3 * torch.randn(len(topk), size, generator=random)).to(kind)
    keys = torch.randint(-(2**63), 2**63 - 1, (len(topk),), generator=random)
    operands = (logits, temperature, topk, keys)
    ours = triton_pointwise.sample(*(part.to(device) for part in operands))
    return int((ours.cpu() != reference.sample(*operands)).sum())


def noise_keys(device: torch.device) -> int:
    """Keys that differ."""
    from personaplex.kernels import triton_pointwise

    random = generator(7)
    text, audio = (torch.randint(0, 2**63 - 1, (6,), generator=random) for _ in range(2))
    steps = torch.tensor([0, 1, 2, 3_000, 10_000, 2**40])
    ours = triton_pointwise.noise_keys(text.to(device), audio.to(device), steps.to(device), 9)
    return int((ours.cpu() != reference.noise_keys(text, audio, steps, 9)).sum())


def embeddings(device: torch.device, kind: torch.dtype, dim: int = 40) -> tuple[float, float]:
    """Differences of `embed` over 17 streams, markers -1 and -2 among the tokens, and of `add_embedding`.

    Operands are small integers, so that sums are exact in bfloat16.
    """
    from personaplex.kernels import triton_pointwise

    random, rows = generator(4), 50
    tables = torch.randint(-7, 8, ((STREAMS - 1) * rows, dim), generator=random).to(kind)
    text = torch.randint(-7, 8, (80, dim), generator=random).to(kind)
    tables.view(STREAMS - 1, rows, dim)[:, -1] = 0
    text[-1] = 0
    tokens = torch.randint(-2, rows - 1, (5, STREAMS), generator=random)
    tokens[0], tokens[1] = -1, -2
    ours = triton_pointwise.embed(tokens.to(device), tables.to(device), text.to(device))
    assert not ours[0].any(), "token -1 embeds as zeros"
    x = torch.randint(-7, 8, (5, 2, dim), generator=random).to(kind)[:, 1]
    column = tokens[:, 0].contiguous()
    added = triton_pointwise.add_embedding(x.to(device), text.to(device), column.to(device))
    return (
        worst(ours, reference.embed(tokens, tables, text)),
        worst(added, reference.add_embedding(x, text, column)),
    )


def int8_matmul(device: torch.device, rows: int, inputs: int, outputs: int) -> tuple[float, float]:
    """Differences of the product, and of the product added to a residual."""
    from personaplex.kernels import triton_int8

    random = generator(5)
    x, weight = (torch.randn(n, inputs, generator=random) for n in (rows, outputs))
    residual = torch.randn(rows, outputs, generator=random)
    matrix = Int8Matrix.of(weight)
    expected = x @ matrix.dequantize(torch.float32).t()
    operands = x.to(device), matrix.codes.to(device), matrix.scale.to(device)
    added = triton_int8.matmul(*operands, residual.to(device, copy=True))
    return worst(triton_int8.matmul(*operands), expected), worst(added, residual + expected)


def all_kernels(device: torch.device, capacity: int = 1_000) -> dict[str, float]:
    """The largest difference of each kernel, at sizes nearer to the model's."""
    found: dict[str, float] = {}
    for name, kind in (("float32", torch.float32), ("int8", torch.int8)):
        found[f"attention_{name}"] = max(
            ring_attention(device, kind, capacity=capacity, heads=2, head_dim=128)
        )
    found["depth_attention"] = depth_attention(device, context=16, heads=4, head_dim=64)
    found["rms_norm"], found["silu_multiply"] = norm_and_gate(device, (5, 1_024))
    found["embed"], found["add_embedding"] = embeddings(device, torch.bfloat16, dim=1_024)
    found["int8_matmul"] = max(int8_matmul(device, rows=5, inputs=1_024, outputs=96))
    found["keys_that_differ"] = noise_keys(device)
    found["tokens_that_differ"] = sampled(device, torch.float32, size=2_048)
    return found
