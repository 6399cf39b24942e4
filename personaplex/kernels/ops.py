"""One function per operation, which picks Triton, Numba or torch by its own operands.

Triton runs on CUDA at fixed shapes, without a host sync. Numba runs single steps on a CPU in float32; its
results are bit-identical whatever the batch size. torch runs everything else: sequences, bfloat16 on a CPU,
and whatever a machine without Triton or Numba is asked for. A missing backend costs speed and changes results
by rounding only. Callers never ask which backend there is. What only the codec does is in `codec_ops`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from personaplex.kernels import kvring
from personaplex.kernels import torch_reference as reference
from personaplex.kernels.constants import LARGE_MATRIX, RMS_EPS
from personaplex.kernels.int8 import Int8Matrix
from personaplex.kernels.kvring import KVRing, Rope, Window

try:  # compiles its kernels, or loads them from disk, now and not in the first frame
    from personaplex.kernels import numba_cpu
except ImportError:  # not installed, or refused beside a NumPy it does not know
    numba_cpu = None  # type: ignore[assignment]

Matrix = Tensor | Int8Matrix  # [out, in]
Array = NDArray[np.float32]

_FEW_ROWS = 128  # up to which int8 weights are read faster by the kernel than dequantized for cuBLAS


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def uses_triton(x: Tensor) -> bool:
    """True when the Triton kernels work on x. For this package and its tests only."""
    return x.is_cuda and _has_triton()


def uses_numba(x: Tensor) -> bool:
    """True when the Numba kernels work on x. For this package and its tests only."""
    return numba_cpu is not None and x.device.type == "cpu" and x.dtype == torch.float32


def fixed_shapes(x: Tensor) -> bool:
    """True when every operation on x's device has fixed shapes and never syncs with the host, as a CUDA graph
    needs it.
    """
    return uses_triton(x)


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """`x @ weight.T` for x [..., in], weight [out, in].

    x [N, in] is one row per slot: on a CPU in float32 a row's result is bit-identical whatever N is. Any
    other shape is a sequence of one slot.
    """
    if isinstance(weight, Int8Matrix):
        if uses_triton(x):
            return _int8_matmul(x.flatten(0, -2), weight).view(*x.shape[:-1], -1)
        return linear(x, weight.dequantize(x.dtype))
    if x.dim() == 2 and not uses_triton(x) and uses_numba(x):
        return numba_cpu.matmul(x, weight)
    return F.linear(x, _fetched(weight, x))


def linear_add(residual: Tensor, x: Tensor, weight: Matrix) -> Tensor:
    """`residual + x @ weight.T` for residual [..., out], x [..., in]; rows as independent as in `linear`.

    May write the sum into `residual`.
    """
    if not uses_triton(x):
        return residual + linear(x, weight)
    rows, inner = residual.flatten(0, -2), x.flatten(0, -2)
    if isinstance(weight, Int8Matrix):
        return _int8_matmul(inner, weight, rows).view(residual.shape)
    return rows.addmm_(inner, _fetched(weight, x).t()).view(residual.shape)


def _int8_matmul(x: Tensor, weight: Int8Matrix, residual: Tensor | None = None) -> Tensor:
    """x [rows, in] on CUDA -> [rows, out]; added to `residual` if given."""
    if x.shape[0] <= _FEW_ROWS:
        from personaplex.kernels import triton_int8

        return triton_int8.matmul(x.contiguous(), weight.codes, weight.scale, residual)
    out = F.linear(x, weight.dequantize(x.dtype))
    return out if residual is None else residual + out


def _fetched(weight: Tensor, x: Tensor) -> Tensor:
    """The weight on x's device: an offloaded one is copied there for this matmul only."""
    return weight if weight.device == x.device else weight.to(x.device, non_blocking=True)


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """x [..., dim], gain [dim] float32 -> x * gain / rms(x), computed in float32, in x's dtype."""
    if uses_triton(x):
        from personaplex.kernels import triton_pointwise

        return triton_pointwise.rms_norm(x, gain, RMS_EPS)
    if x.dim() == 2 and uses_numba(x):
        return numba_cpu.rms_norm(x.contiguous(), gain)
    return reference.rms_norm(x, gain, RMS_EPS)


def silu_multiply(x: Tensor) -> Tensor:
    """x [..., 2 h] = (a, b) -> silu(a) * b [..., h]."""
    if uses_triton(x):
        from personaplex.kernels import triton_pointwise

        return triton_pointwise.silu_multiply(x)
    return reference.silu_multiply(x)


def embed(tokens: Tensor, audio: Tensor, text: Tensor) -> Tensor:
    """tokens [..., 1 + streams] int64, the text stream first -> [..., dim], the sum of all embeddings.

    audio [streams * rows of one table, dim] and text [rows, dim] end in a row of zeros, which token -1 reads.
    Lower tokens read row 0.
    """
    flat = tokens.reshape(-1, tokens.shape[-1])
    if uses_triton(tokens):
        from personaplex.kernels import triton_pointwise

        summed = triton_pointwise.embed(flat, audio, text)
    else:
        summed = reference.embed(flat, audio, text)
    return summed.view(*tokens.shape[:-1], -1)


def add_embedding(x: Tensor, table: Tensor, tokens: Tensor) -> Tensor:
    """x [N, dim] plus the row of `table` [rows, dim] for each of tokens [N] int64."""
    if uses_triton(x):
        from personaplex.kernels import triton_pointwise

        return triton_pointwise.add_embedding(x, table, tokens)
    return reference.add_embedding(x, table, tokens)


def noise_keys(text_seed: Tensor, audio_seed: Tensor, steps: Tensor, count: int) -> Tensor:
    """Seeds and steps [N] int64 -> keys [N, count] int64: of the text token, then of the codebooks."""
    if uses_triton(steps):
        from personaplex.kernels import triton_pointwise

        return triton_pointwise.noise_keys(text_seed, audio_seed, steps, count)
    return reference.noise_keys(text_seed, audio_seed, steps, count)


def sample(logits: Tensor, temperature: Tensor, topk: Tensor, keys: Tensor) -> Tensor:
    """logits [N, V], temperature [N] float32, topk [N] and keys [N] int64 -> tokens [N] int64.

    Each row by its own temperature (<= 0 is greedy) and top-k (0 is the whole vocabulary); see
    `torch_reference.choose`.
    """
    if uses_triton(logits):
        from personaplex.kernels import triton_pointwise

        return triton_pointwise.sample(logits, temperature, topk, keys)
    if uses_numba(logits):
        return numba_cpu.sample(logits, temperature, topk, keys)
    return reference.sample(logits, temperature, topk, keys)


def window(ring: KVRing, steps: int, active: Tensor) -> Window:
    """What the queries of a step over `steps` positions may read, for `attend`; active [N] bool."""
    return Window(active) if uses_triton(active) else kvring.window(ring, steps, active)


def attend(ring: KVRing, layer: int, qkv: Tensor, rope: Rope, window: Window) -> Tensor:
    """Rotates q and k, writes k and v into the ring and attends to it: qkv [N, T, 3, H, head_dim] ->
    [N, H, T, head_dim], zeros for inactive slots.
    """
    if window.columns is None:
        from personaplex.kernels import triton_attention

        return triton_attention.attend(ring, layer, qkv, rope, window.active)
    return reference.attend(ring, layer, qkv, rope, window)


@dataclass(eq=False)
class LayerWeights:
    """A pre-norm transformer layer without biases: x + attention(norm1 x), then x + feed_forward(norm2 x)."""

    norm1: Tensor  # gain [dim] float32
    in_proj: Matrix  # [3 dim, dim]
    out_proj: Matrix  # [dim, dim]
    norm2: Tensor  # gain [dim] float32
    linear_in: Matrix  # [2 hidden, dim]
    linear_out: Matrix  # [dim, hidden]

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...] | None:
        """The weights for the fused Numba kernel, which runs on one thread.

        None unless all are float32 on the CPU, and none is large enough to be worth more threads.
        """
        found: list[Array] = []
        parts = (self.norm1, self.in_proj, self.out_proj, self.norm2, self.linear_in, self.linear_out)
        for part in parts:
            if not isinstance(part, Tensor) or not uses_numba(part):
                return None
            if part.numel() >= LARGE_MATRIX and torch.get_num_threads() > 1:
                return None
            found.append(part.detach().numpy())
        return tuple(found)


def step_layers(
    x: Tensor, layers: Sequence[LayerWeights], ring: KVRing, rope: Rope, active: Tensor
) -> Tensor:
    """One position per slot through a stack of layers: x [N, dim], may be overwritten -> [N, dim].

    The offsets of `ring` stay; rows of inactive slots are undefined.
    """
    fused = None if ring.k_scale is not None else _fused(x, layers)
    if fused is not None:
        keys, values, written = ring.k.numpy(), ring.v.numpy(), ring.offset.numpy()
        cos, sin = (part.view(len(x), -1).numpy() for part in rope)
        rows, takes_part = x.numpy(), active.numpy()
        for index, arrays in enumerate(fused):
            numba_cpu.step_layer(rows, arrays, keys, values, index, written, takes_part, cos, sin)
        return x
    view = window(ring, 1, active)
    for index, weights in enumerate(layers):
        qkv = _project(x, weights, heads=ring.k.shape[2])
        x = finish_layer(x, attend(ring, index, qkv, rope, view), weights)
    return x


def step_depth_layers(x: Tensor, layers: Sequence[LayerWeights], cache: Tensor, step: int) -> Tensor:
    """Step `step` of a depth transformer through its layers: x [N, dim], may be overwritten -> [N, dim].

    cache [layers, 2, N, H, context, head_dim] holds this frame's keys and values; this step adds its own.
    """
    fused = _fused(x, layers)
    if fused is not None:
        held, rows, n = cache.numpy(), x.numpy(), len(x)
        written, everyone, no_rope = np.full(n, step), np.ones(n, np.bool_), np.empty((n, 0), np.float32)
        for index, arrays in enumerate(fused):
            keys, values = held[index][:, :, None]  # a ring of one layer
            numba_cpu.step_layer(rows, arrays, keys, values, 0, written, everyone, no_rope, no_rope)
        return x
    for index, weights in enumerate(layers):
        qkv = _project(x, weights, heads=cache.shape[3])
        x = finish_layer(x, _attend_depth(qkv, cache[index, 0], cache[index, 1], step), weights)
    return x


def _fused(x: Tensor, layers: Sequence[LayerWeights]) -> list[tuple[Array, ...]] | None:
    """The layers' arrays where one Numba call runs a whole layer, else None."""
    if uses_triton(x) or not uses_numba(x):
        return None
    found = [arrays for layer in layers if (arrays := layer.arrays) is not None]
    return found if len(found) == len(layers) else None


def _project(x: Tensor, weights: LayerWeights, heads: int) -> Tensor:
    """x [N, dim] -> q, k, v [N, 1, 3, H, head_dim]."""
    return linear(rms_norm(x, weights.norm1), weights.in_proj).view(len(x), 1, 3, heads, -1)


def _attend_depth(qkv: Tensor, keys: Tensor, values: Tensor, step: int) -> Tensor:
    if uses_triton(qkv):
        from personaplex.kernels import triton_attention

        return triton_attention.attend_depth(qkv, keys, values, step)
    return reference.attend_depth(qkv, keys, values, step)


def finish_layer(x: Tensor, heads: Tensor, weights: LayerWeights) -> Tensor:
    """A layer after its attention: x [..., dim], may be overwritten, heads [N, H, T, head_dim] -> as x."""
    x = linear_add(x, heads.transpose(1, 2).reshape(x.shape), weights.out_proj)
    inner = silu_multiply(linear(rms_norm(x, weights.norm2), weights.linear_in))
    return linear_add(x, inner, weights.linear_out)
