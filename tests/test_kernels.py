"""Triton's kernels, run by its interpreter on the CPU, against the same sums in torch."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import CONFIG

from personaplex.config import STREAMS, TransformerConfig
from personaplex.kernels import kvring
from personaplex.kernels import torch_reference as reference
from personaplex.kernels.constants import RMS_EPS
from personaplex.kernels.int8 import Int8Matrix, quantize_vectors
from personaplex.model.lm import LM
from personaplex.model.ring import Ring
from personaplex.model.sampling import SamplingState
from personaplex.model.self_attention import rope

pytest.importorskip("triton")

from personaplex.kernels import triton_attention as attention
from personaplex.kernels import triton_int8 as int8
from personaplex.kernels import triton_pointwise as pointwise

CPU = torch.device("cpu")
LAYER = 1


def filled_ring(config: TransformerConfig, offsets: list[int], kind: torch.dtype) -> Ring:
    """A ring of random contents; columns nobody has written hold NaN, or the largest codes."""
    ring = Ring.allocate(config, len(offsets), CPU, kind)
    ring.offset[:] = torch.tensor(offsets)
    k, v = torch.randn(2, *ring.k.shape, generator=torch.Generator().manual_seed(8)).unbind(0)
    if kind == torch.int8:
        assert ring.k_scale is not None
        assert ring.v_scale is not None
        for codes, scales, numbers in [(ring.k, ring.k_scale, k), (ring.v, ring.v_scale, v)]:
            new_codes, new_scales = quantize_vectors(numbers)
            codes.copy_(new_codes)
            scales.copy_(new_scales)
    else:
        ring.k.copy_(k)
        ring.v.copy_(v)
    for slot, offset in enumerate(offsets):
        for part in ring.contents:
            part[slot, :, :, offset:] = torch.nan if part.is_floating_point() else 127
    return ring


def copied(ring: Ring) -> Ring:
    return dataclasses.replace(
        ring,
        **{f.name: t.clone() for f in dataclasses.fields(ring) if (t := getattr(ring, f.name)) is not None},
    )


@pytest.mark.parametrize(
    ("kind", "steps", "capacity"),
    [
        (torch.float32, 1, 40),
        (torch.float32, 2, 40),
        (torch.bfloat16, 1, 33),
        (torch.int8, 1, 40),
        (torch.int8, 2, 33),
    ],
)
def test_ring_attention(kind: torch.dtype, steps: int, capacity: int) -> None:
    """Rows empty, part filled, one short of full, full to the column and wrapped often."""
    config = TransformerConfig(dim=48, layers=2, heads=2, hidden=1, context=capacity)
    offsets = [0, capacity - 2 * steps, capacity - steps, 5 * capacity + 3]
    ring = filled_ring(config, offsets, kind)
    twin = copied(ring)
    dtype = torch.float32 if kind == torch.int8 else kind
    qkv = torch.randn(len(offsets), steps, 3, 2, 24, generator=torch.Generator().manual_seed(9)).to(dtype)
    angles = rope(config, ring.offset[:, None] + torch.arange(steps))
    everyone = torch.ones(len(offsets), dtype=torch.bool)
    expected = reference.attend(ring, LAYER, qkv, angles, kvring.window(ring, steps, everyone))
    limit = 1e-2 if kind == torch.bfloat16 else 3e-6
    for chunk, block in [(16, 16), (64, 64)]:  # the latter: all in one piece
        written = copied(twin)
        ours = attention.attend(written, LAYER, qkv, angles, everyone, chunk=chunk, block=block)
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() < limit
    for part, other in zip(ring.contents, written.contents, strict=True):
        near = 2**-7 if kind == torch.bfloat16 else 0.0  # the interpreter does not round to nearest there
        assert torch.allclose(part.float(), other.float(), rtol=near, atol=1e-6, equal_nan=True)


def test_ring_attention_does_not_depend_on_its_neighbours() -> None:
    config = TransformerConfig(dim=32, layers=2, heads=2, hidden=1, context=40)
    ring = filled_ring(config, [30, 90, 3], torch.float32)
    qkv = torch.randn(3, 1, 3, 2, 16, generator=torch.Generator().manual_seed(9))
    angles = rope(config, ring.offset[:, None])
    everyone = torch.ones(3, dtype=torch.bool)
    whole = attention.attend(copied(ring), LAYER, qkv, angles, everyone, chunk=16, block=8)
    for row in range(3):
        one = slice(row, row + 1)
        alone = attention.attend(
            *(
                copied(ring).rows(row, row + 1),
                LAYER,
                qkv[one],
                (angles[0][one], angles[1][one]),
                everyone[one],
            ),
            chunk=16,
            block=8,
        )
        assert torch.equal(alone, whole[one])


@pytest.mark.parametrize("chunk", [16, 64])
def test_ring_attention_leaves_alone_who_takes_no_part(chunk: int) -> None:
    """Their rings are not written, not read (they hold NaN), and give zeros; the others do not notice."""
    config = TransformerConfig(dim=32, layers=2, heads=2, hidden=1, context=40)
    ring = filled_ring(config, [30, 90, 3], torch.float32)
    qkv = torch.randn(3, 1, 3, 2, 16, generator=torch.Generator().manual_seed(9))
    angles = rope(config, ring.offset[:, None])
    sizes = {"chunk": chunk, "block": 8}
    whole = attention.attend(copied(ring), LAYER, qkv, angles, torch.ones(3, dtype=torch.bool), **sizes)
    for part in ring.contents:
        part[1] = torch.nan
    before = copied(ring)
    some = attention.attend(ring, LAYER, qkv, angles, torch.tensor([True, False, True]), **sizes)
    assert torch.equal(some[[0, 2]], whole[[0, 2]])
    assert (some[1] == 0).all()
    for part, old in zip(ring.contents, before.contents, strict=True):
        assert torch.equal(part[1].nan_to_num(7.0), old[1].nan_to_num(7.0))
        assert not torch.equal(part[0], old[0])


@pytest.mark.parametrize("context", [5, 16])
def test_depth_attention(context: int) -> None:
    """All steps of a small context; the last does not see the first."""
    heads, size = 2, 12
    qkv = torch.randn(context, 3, 1, 3, heads, size, generator=torch.Generator().manual_seed(4))
    keys, values = torch.full((2, 3, heads, context, size), torch.nan).unbind(0)
    for step in range(context):
        ours = attention.attend_depth(qkv[step], keys, values, step)
        first = 1 if step + 1 == context else 0
        q, k, v = (qkv[: step + 1, :, 0, i].permute(1, 2, 0, 3) for i in range(3))
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, -1:], k[:, :, first:], v[:, :, first:]
        )
        assert (ours - expected).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(3, 2, 48), (1, 1, 64), (5, 1030)])
def test_norm_and_gate(shape: tuple[int, ...]) -> None:
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    gain = torch.rand(shape[-1], generator=torch.Generator().manual_seed(2))
    assert (pointwise.rms_norm(x, gain, RMS_EPS) - reference.rms_norm(x, gain, RMS_EPS)).abs().max() < 2e-6
    assert (pointwise.silu_multiply(x) - reference.silu_multiply(x)).abs().max() < 2e-6


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_sample(kind: torch.dtype) -> None:
    """Every mixture of rules, ties included (bfloat16 has many): of equals the lowest ids are in."""
    random = torch.Generator().manual_seed(7)
    size, rows = 300, 10
    logits = (3 * torch.randn(rows, size, generator=random)).to(kind)
    temperature = torch.tensor([0.8, 0.0, 1.3, 0.7, -1.0, 0.8, 0.5, 2.0, 0.8, 0.9])
    topk = torch.tensor([25, 25, 0, 1, 0, 250, 299, 300, 2, 40])
    keys = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=random)
    ranks = logits.float().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    score = logits.float() / torch.where(temperature > 0, temperature, 1.0)[:, None]
    score = score - reference.log_noise(keys, torch.arange(size))
    kept = ranks < torch.where(topk == 0, size, topk)[:, None]
    expected = torch.where(
        temperature > 0, score.masked_fill(~kept, -torch.inf).argmax(-1), logits.argmax(-1)
    )
    assert pointwise.sample(logits, temperature, topk, keys).tolist() == expected.tolist()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_embedding(kind: torch.dtype) -> None:
    """All 17 streams, the markers -1 (zeros) and -2 (row 0) among them; a row of depth inputs likewise."""
    random = torch.Generator().manual_seed(4)
    net = LM(CONFIG.lm).to(kind)
    for weight in net.parameters():
        weight.copy_(torch.randint(-7, 8, weight.shape, generator=random))  # sums are exact in bfloat16
    net.prepare()
    tokens = torch.randint(-2, CONFIG.lm.text_card + 1, (5, STREAMS), generator=random)
    tokens[0], tokens[1] = -1, -2
    ours = pointwise.embed(tokens, net.audio_table, net.text_emb.weight)
    assert torch.equal(ours, net.embed(tokens))
    assert (ours[0] == 0).all()
    part = torch.randint(-7, 8, (5, 2, CONFIG.lm.depth.dim), generator=random).to(kind)[:, 1]
    row = pointwise.add_embedding(part, net.depformer_text_emb.weight, tokens[:, 0].contiguous())
    assert torch.equal(row, net.depth_input(0, part, tokens[:, 0]))


def test_noise_keys() -> None:
    random = torch.Generator().manual_seed(7)
    state = SamplingState.allocate(6, CPU)
    for seeds in (state.text_seed, state.audio_seed):
        seeds.random_(0, 2**63 - 1, generator=random)
    steps = torch.tensor([0, 1, 2, 3_000, 10_000, 2**40])
    ours = pointwise.noise_keys(state.text_seed, state.audio_seed, steps, 9)
    assert torch.equal(ours, reference.noise_keys(state.text_seed, state.audio_seed, steps, 9))


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 40), (5, 300, 33), (70, 96, 64)])
def test_int8_matmul(rows: int, inputs: int, outputs: int) -> None:
    random = torch.Generator().manual_seed(5)
    x, weight = (torch.randn(n, inputs, generator=random) for n in (rows, outputs))
    residual = torch.randn(rows, outputs, generator=random)
    matrix = Int8Matrix.of(weight)
    assert (matrix.dequantize(torch.float32) - weight).abs().max() < 0.51 * matrix.scale.max()
    expected = x @ matrix.dequantize(torch.float32).t()
    assert (int8.matmul(x, matrix.codes, matrix.scale) - expected).abs().max() < 1e-4
    added = int8.matmul(x, matrix.codes, matrix.scale, residual.clone())
    assert (added - residual - expected).abs().max() < 1e-4


def test_quantized_vectors_are_close() -> None:
    """Half a code at most, over all magnitudes float16 scales can say; zeros stay zeros."""
    size = 10.0 ** torch.arange(-6, 6, dtype=torch.float32)
    x = torch.randn(12, 50, 64, generator=torch.Generator().manual_seed(2)) * size[:, None, None]
    codes, scale = quantize_vectors(x)
    step = scale.float()[..., None]
    assert ((codes * step - x).abs() <= 0.5005 * step).all()
    assert (step[size > 1e-2] <= 1.001 * x[size > 1e-2].abs().amax(-1, keepdim=True) / 127).all()
    codes, scale = quantize_vectors(torch.zeros(2, 8))
    assert torch.equal(codes * scale.float()[:, None], torch.zeros(2, 8))


def test_all_kernels_compile_for_hopper(tmp_path: Path) -> None:
    """At the sizes and types of the 7B model, by Triton's own compiler, within a small card's memory."""
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(here.parent)}
    done = subprocess.run(
        [sys.executable, here / "compile_kernels.py"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    inner = {"_store_pairs", "_seen", "_join_lanes", "_mix", "_table_row"}  # parts of others
    kernels = {
        name
        for part in (attention, pointwise, int8)
        for name, value in vars(part).items()
        if hasattr(value, "fn")
    } - inner
    assert {line[0] for line in lines} == kernels
    assert max(int(line[-1]) for line in lines) <= 99 * 1024
