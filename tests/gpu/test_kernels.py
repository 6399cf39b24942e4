"""Triton's kernels against plain torch: in its interpreter on the CPU, on a GPU with `-m gpu`.

The comparisons themselves are `benchmarks.gpu.compare`'s, which the GPU benchmark runs too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import compare
from benchmarks.gpu.compare import LAYER, copied, filled_ring
from personaplex.config import TransformerConfig
from personaplex.kernels import torch_reference as reference
from personaplex.kernels.int8 import Int8Matrix, quantize_vectors
from personaplex.model.self_attention import rope

pytest.importorskip("triton")

from personaplex.kernels import triton_attention as attention
from personaplex.kernels import triton_int8 as int8
from personaplex.kernels import triton_pointwise as pointwise


def limit(device: torch.device, on_cpu: float, on_gpu: float = 1e-4) -> float:
    """A GPU's exponentials and fused multiply-adds round differently from the CPU's."""
    return on_gpu if device.type == "cuda" else on_cpu


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, by Triton's interpreter, and a GPU with `-m gpu`."""
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip(f"Triton does not run on {request.param} here")
    return torch.device(request.param)


@pytest.mark.parametrize("sizes", [{"chunk": 16, "block": 16}, {"chunk": 64, "block": 64}])
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
def test_ring_attention(
    device: torch.device, kind: torch.dtype, steps: int, capacity: int, sizes: dict[str, int]
) -> None:
    """Rows empty, part filled, one short of full, full to the column and wrapped often."""
    output, contents = compare.ring_attention(device, kind, steps, capacity, **sizes)
    if kind == torch.bfloat16:  # to which the interpreter does not round to nearest
        assert output < 1e-2
        assert contents <= 2**-7
    elif kind == torch.int8:
        assert output < limit(device, 3e-6, 1e-1)
        assert contents <= limit(device, 0.0, 0.5)  # a code on the other side of a half
    else:
        assert output < limit(device, 3e-6)
        assert contents <= limit(device, 1e-6, 1e-5)


def test_ring_attention_does_not_depend_on_its_neighbours(device: torch.device) -> None:
    config = TransformerConfig(dim=32, layers=2, heads=2, hidden=1, context=40)
    ring = copied(filled_ring(config, [30, 90, 3], torch.float32), device)
    qkv = torch.randn(3, 1, 3, 2, 16, generator=torch.Generator().manual_seed(9)).to(device)
    angles = rope(config, ring.offset[:, None])
    everyone = torch.ones(3, dtype=torch.bool, device=device)
    whole = attention.attend(copied(ring, device), LAYER, qkv, angles, everyone, chunk=16, block=8)
    for row in range(3):
        one = slice(row, row + 1)
        alone = attention.attend(
            *(
                copied(ring, device).rows(row, row + 1),
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
def test_ring_attention_leaves_alone_who_takes_no_part(device: torch.device, chunk: int) -> None:
    """Their rings are not written, not read (they hold NaN), and give zeros; the others do not notice."""
    config = TransformerConfig(dim=32, layers=2, heads=2, hidden=1, context=40)
    ring = copied(filled_ring(config, [30, 90, 3], torch.float32), device)
    qkv = torch.randn(3, 1, 3, 2, 16, generator=torch.Generator().manual_seed(9)).to(device)
    angles = rope(config, ring.offset[:, None])
    sizes = {"chunk": chunk, "block": 8}
    everyone, others = torch.tensor([[True, True, True], [True, False, True]], device=device)
    whole = attention.attend(copied(ring, device), LAYER, qkv, angles, everyone, **sizes)
    for part in ring.contents:
        part[1] = torch.nan
    before = copied(ring, device)
    some = attention.attend(ring, LAYER, qkv, angles, others, **sizes)
    assert torch.equal(some[[0, 2]], whole[[0, 2]])
    assert (some[1] == 0).all()
    for part, old in zip(ring.contents, before.contents, strict=True):
        assert torch.equal(part[1].nan_to_num(7.0), old[1].nan_to_num(7.0))
        assert not torch.equal(part[0], old[0])


@pytest.mark.parametrize("context", [5, 16])
def test_depth_attention(device: torch.device, context: int) -> None:
    assert compare.depth_attention(device, context) < limit(device, 1e-6)


@pytest.mark.parametrize("shape", [(3, 2, 48), (1, 1, 64), (5, 1030)])
def test_norm_and_gate(device: torch.device, shape: tuple[int, ...]) -> None:
    assert max(compare.norm_and_gate(device, shape)) < limit(device, 2e-6)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_sample(device: torch.device, kind: torch.dtype) -> None:
    assert compare.sampled(device, kind) == 0


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_embedding(device: torch.device, kind: torch.dtype) -> None:
    assert compare.embeddings(device, kind) == (0.0, 0.0)


def test_noise_keys(device: torch.device) -> None:
    assert compare.noise_keys(device) == 0


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 40), (5, 300, 33), (70, 96, 64)])
def test_int8_matmul(device: torch.device, rows: int, inputs: int, outputs: int) -> None:
    assert max(compare.int8_matmul(device, rows, inputs, outputs)) < 1e-4


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_sampling_ranks_ties_by_token(kind: torch.dtype) -> None:
    """The reference itself, against sorting: of equal logits the lowest ids are candidates."""
    random = torch.Generator().manual_seed(7)
    logits = (3 * torch.randn(200, 300, generator=random)).to(kind)
    keys, topk = torch.arange(200), torch.randint(0, 301, (200,), generator=random)
    ranks = logits.float().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    score = logits.float() / 0.8 - reference.log_noise(keys, torch.arange(300))
    kept = ranks < torch.where(topk == 0, 300, topk)[:, None]
    expected = score.masked_fill(~kept, -torch.inf).argmax(-1)
    assert torch.equal(reference.sample(logits, torch.full((200,), 0.8), topk, keys), expected)


def test_an_int8_matrix_is_close() -> None:
    weight = torch.randn(33, 300, generator=torch.Generator().manual_seed(5))
    matrix = Int8Matrix.of(weight)
    assert (matrix.dequantize(torch.float32) - weight).abs().max() < 0.51 * matrix.scale.max()


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
    here = Path(__file__).parents[1]
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
