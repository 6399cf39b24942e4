"""Every operation in plain torch: what runs where no kernel does, and what the kernels are tested against.

Functions have the names, signatures and results of the kernels, which document the shapes (see also `ops`);
`attend` takes a `Window` where the Triton kernel takes the active slots.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from personaplex.kernels.constants import GOLDEN, NOISE_STRIDE, UNIFORM_BITS
from personaplex.kernels.int8 import dequantize_vectors, quantize_vectors
from personaplex.kernels.kvring import KVRing, Rope, Window

_GOLDEN = GOLDEN - 2**64  # as int64


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), gain.shape, gain, eps).to(x.dtype)


def silu_multiply(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return F.silu(a).mul_(b)


def embed(tokens: Tensor, audio: Tensor, text: Tensor) -> Tensor:
    """Audio streams are summed in order, then text; tokens [N, 1 + streams]."""
    streams = tokens.shape[1] - 1
    rows = audio.shape[0] // streams
    base = torch.arange(streams, device=tokens.device) * rows
    first, *others = F.embedding(_table_rows(tokens[:, 1:], rows) + base, audio).unbind(1)
    total = first.clone()
    for stream in others:
        total += stream
    return total.add_(F.embedding(_table_rows(tokens[:, 0], text.shape[0]), text))


def add_embedding(x: Tensor, table: Tensor, tokens: Tensor) -> Tensor:
    return x + F.embedding(_table_rows(tokens, table.shape[0]), table)


def _table_rows(tokens: Tensor, rows: int) -> Tensor:
    """Rows of a table of `rows` rows, whose last is all zeros, for token -1; lower tokens read row 0."""
    return tokens.clamp(min=0).masked_fill_(tokens == -1, rows - 1)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """x [N, T, ..., H, head_dim] with its interleaved pairs rotated, computed in float32."""
    cos, sin = rope
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def attend(ring: KVRing, layer: int, qkv: Tensor, rope: Rope, window: Window) -> Tensor:
    assert window.columns is not None
    q, k = apply_rope(qkv[:, :, :2], rope).unbind(2)
    slots = torch.arange(len(q), device=q.device)[:, None]
    for part, new in zip(ring.contents, stored(ring, k, qkv[:, :, 2]), strict=True):
        part[:, layer].transpose(1, 2)[slots, window.columns] = new
    q = q.transpose(1, 2)
    out = torch.zeros_like(q)
    for row, filled, mask in window.rows:
        keys, values = loaded(tuple(part[row, layer, :, :filled] for part in ring.contents), q.dtype)
        one = slice(row, row + 1)
        out[one] = F.scaled_dot_product_attention(q[one], keys[None], values[None], attn_mask=mask)
    return out


def stored(ring: KVRing, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Keys and values [..., head_dim] in the order and form of `ring.contents`."""
    if ring.k_scale is None:
        return k, v
    (k_codes, k_scale), (v_codes, v_scale) = quantize_vectors(k), quantize_vectors(v)
    return k_codes, v_codes, k_scale, v_scale


def loaded(contents: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inverse of `stored`; an int8 ring's keys and values come in `dtype`."""
    if len(contents) == 2:
        return contents[0], contents[1]
    k, v, k_scale, v_scale = contents
    return dequantize_vectors(k, k_scale, dtype), dequantize_vectors(v, v_scale, dtype)


def attend_depth(qkv: Tensor, keys: Tensor, values: Tensor, step: int) -> Tensor:
    q, k, v = qkv.transpose(1, 3).unbind(2)  # each [N, H, 1, head_dim]
    keys[:, :, step], values[:, :, step] = k[:, :, 0], v[:, :, 0]
    first = 1 if step + 1 == keys.shape[2] else 0
    seen = slice(first, step + 1)
    return F.scaled_dot_product_attention(q, keys[:, :, seen], values[:, :, seen])


def noise_keys(text_seed: Tensor, audio_seed: Tensor, steps: Tensor, count: int) -> Tensor:
    stream = torch.arange(count, device=steps.device)
    seeds = torch.where(stream == 0, text_seed[:, None], audio_seed[:, None])
    return _mix(_mix(seeds) ^ (steps[:, None] * NOISE_STRIDE + stream))


def sample(logits: Tensor, temperature: Tensor, topk: Tensor, keys: Tensor) -> Tensor:
    return choose(logits, temperature, topk, log_noise(keys, torch.arange(logits.shape[1])))


def choose(logits: Tensor, temperature: Tensor, topk: Tensor, log_noise: Tensor) -> Tensor:
    """`sample` with given log noise [N, V].

    argmax(p / n) = argmax(logits / temperature - log n) over the top k; the softmax's constant drops out.
    Of logits equal to the k-th largest those with the lowest token ids are candidates. A temperature <= 0 is
    greedy; top-k 0 is the whole vocabulary.
    """
    values, size = logits.float(), logits.shape[1]
    count = torch.where(topk == 0, size, topk)[:, None]
    least = values.topk(int(count.max()), dim=-1).values.gather(1, count - 1)
    above, level = values > least, values == least
    candidates = above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    greedy = temperature <= 0
    score = values / torch.where(greedy, 1.0, temperature)[:, None] - log_noise
    sampled = score.masked_fill_(~candidates, -torch.inf).argmax(-1)
    return torch.where(greedy, values.argmax(-1), sampled)


def log_noise(keys: Tensor, tokens: Tensor) -> Tensor:
    """Log of the Exponential(1) noise [..., c] of token ids [..., c] under keys [...]: splitmix64 per key."""
    bits = _mix(keys[..., None] + tokens.to(keys.device) * _GOLDEN) & (2**UNIFORM_BITS - 1)
    return ((bits.float() + 0.5) / 2**UNIFORM_BITS).log().neg().log()


def _mix(x: Tensor) -> Tensor:
    """The splitmix64 finalizer: a bijection of int64 whose output bits each depend on every input bit."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift."""
    return (x >> by) & (2 ** (64 - by) - 1)
