"""Triton kernels for the small operations between the matmuls of a step.

At a few rows a step is bound by reading weights and by the number of launches; each kernel here replaces a
chain of small ones. `torch_reference` holds a function of the same name and signature for each. Rows are
independent of each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from personaplex.kernels.constants import NOISE_STRIDE, UNIFORM_BITS

_COLUMNS = 1024  # of a row, to one program of `silu_multiply`
_FEATURES = 256  # of a row, to one program of `embed` and `add_embedding`


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x [..., dim] contiguous, gain [dim] float32 -> the same shape and dtype."""
    assert x.is_contiguous()
    dim = x.shape[-1]
    out = torch.empty_like(x)
    wide = triton.next_power_of_2(dim)
    _rms_norm[(x.numel() // dim,)](x, gain, out, dim, eps, wide, num_warps=min(max(wide // 512, 1), 8))
    return out


def silu_multiply(x: Tensor) -> Tensor:
    """x [..., 2 h] contiguous = (a, b) -> silu(a) * b [..., h]."""
    assert x.is_contiguous()
    hidden = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], hidden, device=x.device, dtype=x.dtype)
    grid = (x.numel() // (2 * hidden), triton.cdiv(hidden, _COLUMNS))
    _silu_multiply[grid](x, out, hidden, _COLUMNS, num_warps=4)
    return out


def embed(tokens: Tensor, audio: Tensor, text: Tensor) -> Tensor:
    """tokens [N, 1 + streams] int64, audio [streams * rows of one table, dim], text [rows, dim] -> [N, dim].

    Token -1 reads the last row of its table.
    """
    assert tokens.is_contiguous()
    count, dim, streams = tokens.shape[0], text.shape[1], tokens.shape[1] - 1
    out = torch.empty(count, dim, device=text.device, dtype=text.dtype)
    _embed[(count, triton.cdiv(dim, _FEATURES))](
        tokens, audio, text, out, dim, audio.shape[0] // streams, text.shape[0], streams, _FEATURES,
        num_warps=1,
    )  # fmt: skip
    return out


def add_embedding(x: Tensor, table: Tensor, tokens: Tensor) -> Tensor:
    """x [N, dim], contiguous rows, plus the row of `table` [rows, dim] for each of tokens [N] int64."""
    n, dim = x.shape
    assert x.stride(1) == 1
    assert tokens.is_contiguous()
    out = torch.empty(n, dim, device=x.device, dtype=x.dtype)
    grid = (n, triton.cdiv(dim, _FEATURES))
    _add_embedding[grid](x, table, tokens, out, x.stride(0), dim, table.shape[0], _FEATURES, num_warps=1)
    return out


def noise_keys(text_seed: Tensor, audio_seed: Tensor, steps: Tensor, count: int) -> Tensor:
    """Seeds and steps [N] int64, contiguous -> keys [N, count] int64."""
    n = steps.shape[0]
    keys = torch.empty(n, count, device=steps.device, dtype=torch.int64)
    _noise_keys[(n,)](
        text_seed, audio_seed, steps, keys, count, triton.next_power_of_2(count), NOISE_STRIDE, num_warps=1
    )
    return keys


def sample(logits: Tensor, temperature: Tensor, topk: Tensor, keys: Tensor) -> Tensor:
    """logits [N, V], temperature [N] float32, topk [N] and keys [N] int64 -> tokens [N] int64.

    The k-th largest logit is found bit by bit instead of by sorting, so k needs no bound. Of logits equal to
    it those with the lowest token ids are candidates.
    """
    n, size = logits.shape
    assert logits.stride(1) == 1
    tokens = torch.empty(n, device=logits.device, dtype=torch.int64)
    wide = triton.next_power_of_2(size)
    # Of a bfloat16 the upper half of the float32's bits is all there is to search.
    low = 16 if logits.dtype == torch.bfloat16 else 0
    _sample[(n,)](
        logits, temperature, topk, keys, tokens, logits.stride(0), temperature.stride(0), topk.stride(0),
        keys.stride(0), size, wide, low, UNIFORM_BITS,
        num_warps=min(max(wide // 512, 1), 32),
    )  # fmt: skip
    return tokens


@triton.jit
def _rms_norm(x, gain, out, dim, eps, WIDE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDE)
    inside = d < dim
    numbers = tl.load(x + row * dim + d, inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(numbers * numbers, axis=0) / dim + eps)
    normed = numbers * (tl.load(gain + d, inside, other=0.0) * scale)
    tl.store(out + row * dim + d, normed.to(out.dtype.element_ty), inside)


@triton.jit
def _silu_multiply(x, out, hidden, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden
    a = tl.load(x + row * 2 * hidden + column, inside, other=0.0).to(tl.float32)
    b = tl.load(x + row * 2 * hidden + hidden + column, inside, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + column, (a / (1.0 + tl.exp(-a)) * b).to(out.dtype.element_ty), inside)


@triton.jit
def _table_row(token, rows):
    """Row of a table of `rows` rows whose last is all zeros, for token -1."""
    return tl.where(token == -1, rows - 1, tl.maximum(token, 0))


@triton.jit
def _embed(
    tokens, audio, text, out, dim, audio_rows, text_rows, STREAMS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dim
    source = tokens + row * (STREAMS + 1)
    total = tl.zeros([COLUMNS], out.dtype.element_ty)
    for stream in tl.static_range(STREAMS):
        place = stream * audio_rows + _table_row(tl.load(source + 1 + stream), audio_rows)
        part = tl.load(audio + place * dim + column, inside, other=0.0)
        total = (total.to(tl.float32) + part.to(tl.float32)).to(out.dtype.element_ty)  # rounded each time
    place = _table_row(tl.load(source), text_rows)
    part = tl.load(text + place * dim + column, inside, other=0.0)
    total = (total.to(tl.float32) + part.to(tl.float32)).to(out.dtype.element_ty)
    tl.store(out + row * dim + column, total, inside)


@triton.jit
def _add_embedding(x, table, tokens, out, stride, dim, rows, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dim
    place = _table_row(tl.load(tokens + row), rows)
    added = tl.load(table + place * dim + column, inside, other=0.0).to(tl.float32)
    added += tl.load(x + row * stride + column, inside, other=0.0).to(tl.float32)
    tl.store(out + row * dim + column, added.to(out.dtype.element_ty), inside)


@triton.jit
def _noise_keys(
    text_seed, audio_seed, steps, keys, count, WIDE: tl.constexpr, STRIDE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    stream = tl.arange(0, WIDE)
    text = tl.load(text_seed + row).to(tl.uint64, bitcast=True)
    audio = tl.load(audio_seed + row).to(tl.uint64, bitcast=True)
    counter = (tl.load(steps + row) * STRIDE + stream).to(tl.uint64, bitcast=True)
    mixed = _mix(_mix(tl.where(stream == 0, text, audio)) ^ counter)
    tl.store(keys + row * count + stream, mixed.to(tl.int64, bitcast=True), stream < count)


@triton.jit
def _sample(
    logits, temperature, topk, keys, tokens, row_stride, temperature_stride, topk_stride, key_stride, size,
    WIDE: tl.constexpr, LOW: tl.constexpr, UNIFORM_BITS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, WIDE)
    inside = token < size
    value = tl.load(logits + row * row_stride + token, inside, other=-float("inf")).to(tl.float32)
    likeliest = tl.argmax(value, axis=0, tie_break_left=True)
    heat = tl.load(temperature + row * temperature_stride)
    wanted = tl.load(topk + row * topk_stride).to(tl.int32)
    wanted = tl.where(wanted == 0, size, wanted)

    # Unsigned integers in the order of the floats: the sign bit flips, below zero all others too.
    bits = value.to(tl.int32, bitcast=True)
    order = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    order = tl.where(inside, order >> LOW, 0)
    edge = tl.zeros([1], tl.uint32)  # grows to the largest number that `wanted` values reach
    for place in tl.static_range(31 - LOW, -1, -1):
        higher = edge | (1 << place)
        reached = tl.sum((order >= higher).to(tl.int32), axis=0)
        edge = tl.where(reached >= wanted, higher, edge)
    above = inside & (order > edge)
    level = inside & (order == edge)
    room = wanted - tl.sum(above.to(tl.int32), axis=0)
    kept = above | (level & (tl.cumsum(level.to(tl.int32), axis=0) <= room))

    key = tl.load(keys + row * key_stride).to(tl.uint64, bitcast=True)
    random = _mix(key + token.to(tl.uint64) * 0x9E3779B97F4A7C15) & ((1 << UNIFORM_BITS) - 1)
    uniform = (random.to(tl.float32) + 0.5) * (1.0 / (1 << UNIFORM_BITS))
    score = value / tl.where(heat > 0, heat, 1.0) - tl.log(-tl.log(uniform))
    chosen = tl.argmax(tl.where(kept, score, -float("inf")), axis=0, tie_break_left=True)
    tl.store(tokens + row, tl.where(heat > 0, chosen, likeliest).to(tl.int64))


@triton.jit
def _mix(x):
    """The splitmix64 finalizer."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
