"""Attention of single steps as Triton kernels; `torch_reference` computes the same.

A step reads a ring in chunks of CHUNK columns, one program per slot, head, query and chunk, so that one long
session keeps as many programs busy as many short ones; a second kernel joins the chunks. Only the filled part
of a ring is read, by its offset on the device: shapes never depend on the length of a session, nothing is
copied to the host, and a slot's result does not depend on how many others share the step. Inactive slots cost
next to nothing: frames of different sessions do not arrive together, and a tick must not pay for the rings of
the slots it skips.

Keys and values are in the model's dtype, or int8 with one float16 scale per position and head. All sums are
float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from personaplex.kernels.constants import INT8_MAX, SMALLEST_SCALE
from personaplex.kernels.kvring import KVRing, Rope

CHUNK = 256  # ring columns per program
BLOCK = 32  # of them held in registers at a time
WARPS = 4
STAGES = 3  # blocks on their way from memory while one is summed

_HIDDEN = tl.constexpr(-1e30)  # the score of a column a query must not see; finite, so that differences are
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and taking it away rounds to the nearest even integer


def attend(
    ring: KVRing,
    layer: int,
    qkv: Tensor,
    rope: Rope,
    active: Tensor,
    *,
    chunk: int = CHUNK,
    block: int = BLOCK,
    warps: int = WARPS,
    stages: int = STAGES,
) -> Tensor:
    """Rotates q and k, writes k and v into the ring and attends to it, in two or three kernels.

    qkv [N, T, 3, H, head_dim], active [N] bool, both contiguous -> [N, H, T, head_dim]. Rings of inactive
    slots are neither read nor written; their output is zeros. The rest are tuning sizes, of which only
    `chunk` and `block` change the result, by rounding.
    """
    n, steps, _, heads, size = qkv.shape
    assert qkv.is_contiguous()
    assert active.is_contiguous()
    keys, values = ring.k[:, layer], ring.v[:, layer]
    assert keys.stride() == values.stride()
    assert keys.stride()[2:] == (size, 1)
    int8 = ring.k_scale is not None
    k_scale = ring.k_scale[:, layer] if ring.k_scale is not None else keys
    v_scale = ring.v_scale[:, layer] if ring.v_scale is not None else values
    cos, sin = rope
    queries = torch.empty(n, steps, heads, size, device=qkv.device, dtype=qkv.dtype)
    half = size // 2
    _rope_and_store[(n * steps, heads)](
        qkv, cos, sin, queries, keys, values, k_scale, v_scale, ring.offset, active,
        keys.stride(0), keys.stride(1), k_scale.stride(0), k_scale.stride(1), ring.capacity, heads,
        steps, half, triton.next_power_of_2(half), int8, INT8_MAX, SMALLEST_SCALE,
        num_warps=1,
    )  # fmt: skip
    out = torch.empty_like(queries)
    splits = triton.cdiv(ring.capacity, chunk)
    lone = splits == 1
    parts = out if lone else torch.empty(n * steps, heads, splits, size + 2, device=out.device)
    wide = triton.next_power_of_2(size)
    _attend_chunk[(splits, heads, n * steps)](
        queries, keys, values, k_scale, v_scale, ring.offset, active, parts,
        keys.stride(0), keys.stride(1), k_scale.stride(0), k_scale.stride(1), ring.capacity, size**-0.5,
        steps, size, wide, chunk, block, int8, lone, stages,
        num_warps=warps,
    )  # fmt: skip
    if not lone:
        _join_chunks[(n * steps, heads)](
            parts, ring.offset, active, out, ring.capacity, splits,
            steps, size, wide, chunk, triton.next_power_of_2(splits),
            num_warps=4,
        )  # fmt: skip
    return out.transpose(1, 2)


def attend_depth(qkv: Tensor, keys: Tensor, values: Tensor, step: int) -> Tensor:
    """One layer's attention at step `step` of the depth transformer: writes k and v, attends to what it sees.

    qkv [N, 1, 3, H, head_dim], keys and values [N, H, context, head_dim], all contiguous ->
    [N, H, 1, head_dim]. The last step of a full context does not see the first (see `kvring`).
    """
    n, _, _, heads, size = qkv.shape
    context = keys.shape[2]
    assert qkv.is_contiguous()
    assert keys.is_contiguous()
    assert values.is_contiguous()
    out = torch.empty(n, heads, 1, size, device=qkv.device, dtype=qkv.dtype)
    _attend_depth[(n, heads)](
        qkv, keys, values, out, step, 1 if step + 1 == context else 0, heads, size**-0.5,
        context, triton.next_power_of_2(context), size, triton.next_power_of_2(size),
        num_warps=1,
    )  # fmt: skip
    return out


@triton.jit
def _rope_and_store(
    qkv, cos, sin, queries, keys, values, k_scale, v_scale, offset, active,
    slot_stride, head_stride, scale_slot_stride, scale_head_stride, capacity, heads,
    STEPS: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, INT8: tl.constexpr,
    INT8_MAX: tl.constexpr, SMALLEST_SCALE: tl.constexpr,
):  # fmt: skip
    """One query, key and value of one head: q and k rotated in interleaved pairs, k and v into the ring."""
    row, head = tl.program_id(0), tl.program_id(1)
    slot = (row // STEPS).to(tl.int64)
    if not tl.load(active + slot):
        return
    column = (tl.load(offset + slot) + row % STEPS) % capacity
    pair = tl.arange(0, WIDE)
    there = pair < HALF
    c = tl.load(cos + row * HALF + pair, there, other=0.0)
    s = tl.load(sin + row * HALF + pair, there, other=0.0)
    source = qkv + (row.to(tl.int64) * 3 * heads + head) * 2 * HALF + 2 * pair
    third = heads * 2 * HALF

    a = tl.load(source, there, other=0.0).to(tl.float32)
    b = tl.load(source + 1, there, other=0.0).to(tl.float32)
    target = queries + (row.to(tl.int64) * heads + head) * 2 * HALF + 2 * pair
    tl.store(target, (a * c - b * s).to(queries.dtype.element_ty), there)
    tl.store(target + 1, (a * s + b * c).to(queries.dtype.element_ty), there)

    a = tl.load(source + third, there, other=0.0).to(tl.float32)
    b = tl.load(source + third + 1, there, other=0.0).to(tl.float32)
    kind = qkv.dtype.element_ty  # the model's own: a key is rounded to it before it is quantised
    place = slot * slot_stride + head * head_stride + column * 2 * HALF + 2 * pair
    scale_place = slot * scale_slot_stride + head * scale_head_stride + column
    _store_pairs((a * c - b * s).to(kind), (a * s + b * c).to(kind), keys + place, k_scale + scale_place,
                 there, INT8, INT8_MAX, SMALLEST_SCALE)  # fmt: skip
    a = tl.load(source + 2 * third, there, other=0.0)
    b = tl.load(source + 2 * third + 1, there, other=0.0)
    _store_pairs(a, b, values + place, v_scale + scale_place, there, INT8, INT8_MAX, SMALLEST_SCALE)


@triton.jit
def _store_pairs(
    a, b, place, scale_place, there,
    INT8: tl.constexpr, INT8_MAX: tl.constexpr, SMALLEST_SCALE: tl.constexpr,
):  # fmt: skip
    """Writes the even (a) and odd (b) elements of one vector, for INT8 as `int8.quantize_vectors` does."""
    if INT8:
        a, b = a.to(tl.float32), b.to(tl.float32)
        largest = tl.max(tl.maximum(tl.abs(a), tl.abs(b)), axis=0)
        scale = tl.minimum(tl.maximum(largest * (1.0 / INT8_MAX), SMALLEST_SCALE), 65504.0).to(tl.float16)
        tl.store(scale_place, scale)
        step = scale.to(tl.float32)
        a = (tl.div_rn(a, step) + _ROUND) - _ROUND
        b = (tl.div_rn(b, step) + _ROUND) - _ROUND
        a = tl.minimum(tl.maximum(a, -INT8_MAX), INT8_MAX)
        b = tl.minimum(tl.maximum(b, -INT8_MAX), INT8_MAX)
    tl.store(place, a.to(place.dtype.element_ty), there)
    tl.store(place + 1, b.to(place.dtype.element_ty), there)


@triton.jit
def _seen(column, filled, newest, ahead, shown, capacity):
    """Columns visible to a query `ahead` positions before the newest; see `kvring`."""
    age = newest - column  # positions since the one in this column
    age = tl.where(age < 0, age + capacity, age)
    return (column < filled) & (age >= ahead) & (age < shown)


@triton.jit
def _join_lanes(best, total, mixed):
    """The running softmaxes of all lanes as one: largest score, sum, weighted values."""
    top = tl.max(best, axis=0)
    fade = tl.exp(best - top)
    return top, tl.sum(total * fade, axis=0), tl.sum(mixed * fade[:, None], axis=0)


@triton.jit
def _attend_chunk(
    queries, keys, values, k_scale, v_scale, offset, active, parts,
    slot_stride, head_stride, scale_slot_stride, scale_head_stride, capacity, scale,
    STEPS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    INT8: tl.constexpr, LONE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One query over one chunk of its slot's ring.

    Each of BLOCK lanes keeps a running softmax of its own over the columns it meets (largest score, sum,
    weighted values); lanes are joined at the end, so that the loop never waits for other warps.
    """
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = (row // STEPS).to(tl.int64)
    d = tl.arange(0, WIDE)
    inside = d < SIZE
    heads = tl.num_programs(1)
    query_place = (row.to(tl.int64) * heads + head) * SIZE + d
    if not tl.load(active + slot):
        if LONE:
            tl.store(parts + query_place, tl.zeros([WIDE], parts.dtype.element_ty), inside)
        return
    written = tl.load(offset + slot) + STEPS
    filled = tl.minimum(written, capacity).to(tl.int32)
    start = split * CHUNK
    if start >= filled:
        return
    shown = tl.where(written >= capacity, capacity - 1, capacity)  # a full ring hides its oldest position
    newest = ((written - 1) % capacity).to(tl.int32)
    ahead = STEPS - 1 - row % STEPS  # positions this step wrote after the query's own

    lane = tl.arange(0, BLOCK)
    q = tl.load(queries + query_place, inside, other=0.0).to(tl.float32) * scale
    base = slot * slot_stride + head * head_stride
    scale_base = slot * scale_slot_stride + head * scale_head_stride
    best = tl.full([BLOCK], _HIDDEN, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, WIDE], tl.float32)
    if INT8:
        k_unit = tl.load(k_scale + scale_base + start + lane, start + lane < filled, other=0.0)
        v_unit = tl.load(v_scale + scale_base + start + lane, start + lane < filled, other=0.0)
    for first in tl.range(0, CHUNK, BLOCK, num_stages=STAGES):
        column = start + first + lane
        seen = _seen(column, filled, newest, ahead, shown, capacity)
        place = base + column[:, None].to(tl.int64) * SIZE + d[None, :]
        mask = seen[:, None] & inside[None, :]
        k = tl.load(keys + place, mask, other=0.0).to(tl.float32)
        v = tl.load(values + place, mask, other=0.0).to(tl.float32)
        score = tl.sum(k * q[None, :], axis=1)
        if INT8:
            score *= k_unit.to(tl.float32)
        score = tl.where(seen, score, _HIDDEN)
        higher = tl.maximum(best, score)
        fade = tl.exp(best - higher)
        weight = tl.where(seen, tl.exp(score - higher), 0.0)
        total = total * fade + weight
        if INT8:  # too small for the pipeline that fetches k and v: the next units are asked for here
            weight = tl.where(seen, weight * v_unit.to(tl.float32), 0.0)
            ahead_of = column + BLOCK
            k_unit = tl.load(k_scale + scale_base + ahead_of, ahead_of < filled, other=0.0)
            v_unit = tl.load(v_scale + scale_base + ahead_of, ahead_of < filled, other=0.0)
        mixed = mixed * fade[:, None] + weight[:, None] * v
        best = higher
    top, total_here, mixed_here = _join_lanes(best, total, mixed)
    if LONE:
        tl.store(parts + query_place, (mixed_here / total_here).to(parts.dtype.element_ty), inside)
    else:
        part = parts + ((row.to(tl.int64) * heads + head) * tl.num_programs(0) + split) * (SIZE + 2)
        tl.store(part + d, mixed_here, inside)
        tl.store(part + SIZE, top)
        tl.store(part + SIZE + 1, total_here)


@triton.jit
def _join_chunks(
    parts, offset, active, out, capacity, splits,
    STEPS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Joins the chunks of one query and head by their softmax sums; unfilled ones are not read."""
    row, head = tl.program_id(0), tl.program_id(1)
    split, d = tl.arange(0, SPLITS), tl.arange(0, WIDE)
    inside = d < SIZE
    target = out + (row.to(tl.int64) * tl.num_programs(1) + head) * SIZE + d
    if not tl.load(active + row // STEPS):
        tl.store(target, tl.zeros([WIDE], out.dtype.element_ty), inside)
        return
    written = tl.load(offset + row // STEPS) + STEPS
    filled = tl.minimum(written, capacity)
    used = split * CHUNK < filled
    place = (row.to(tl.int64) * tl.num_programs(1) + head) * splits + split
    best = tl.load(parts + place * (SIZE + 2) + SIZE, used, other=_HIDDEN)
    total = tl.load(parts + place * (SIZE + 2) + SIZE + 1, used, other=0.0)
    mixed = tl.load(
        parts + place[:, None] * (SIZE + 2) + d[None, :], used[:, None] & inside[None, :], other=0.0
    )
    fade = tl.exp(best - tl.max(best, axis=0))
    joined = tl.sum(mixed * fade[:, None], axis=0) / tl.sum(total * fade, axis=0)
    tl.store(target, joined.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["step", "skip"])
def _attend_depth(
    qkv, keys, values, out, step, skip, heads, scale,
    CONTEXT: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One slot and head; the step's own key and value are used as they come, without reading them back."""
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, column = tl.arange(0, WIDE), tl.arange(0, COLUMNS)
    inside = d < SIZE
    source = qkv + (slot * 3 * heads + head) * SIZE + d
    q = tl.load(source, inside, other=0.0).to(tl.float32) * scale
    k_new = tl.load(source + heads * SIZE, inside, other=0.0)
    v_new = tl.load(source + 2 * heads * SIZE, inside, other=0.0)
    base = (slot * heads + head) * CONTEXT * SIZE
    tl.store(keys + base + step * SIZE + d, k_new, inside)
    tl.store(values + base + step * SIZE + d, v_new, inside)
    old = (column < step) & (column >= skip)
    own = column == step
    place = base + column[:, None] * SIZE + d[None, :]
    mask = old[:, None] & inside[None, :]
    k = tl.where(own[:, None], k_new[None, :], tl.load(keys + place, mask, other=0.0)).to(tl.float32)
    v = tl.where(own[:, None], v_new[None, :], tl.load(values + place, mask, other=0.0)).to(tl.float32)
    seen = old | own
    score = tl.where(seen, tl.sum(k * q[None, :], axis=1), _HIDDEN)
    weight = tl.where(seen, tl.exp(score - tl.max(score, axis=0)), 0.0)
    mixed = tl.sum(weight[:, None] * v, axis=0) / tl.sum(weight, axis=0)
    tl.store(out + (slot * heads + head) * SIZE + d, mixed.to(out.dtype.element_ty), inside)
