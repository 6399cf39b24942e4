"""The codec's operations, which pick their backend as those of `ops` do.

Each takes a step of all slots, where `active` [N] bool says whose states change and whose rows of the result
are defined, or with None a block of one slot. On a CPU no slot's result depends on another: Numba's kernels
run every slot alike, torch runs the active ones one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from personaplex.kernels import ops
from personaplex.kernels.constants import LAYER_NORM_EPS
from personaplex.kernels.kvring import KVRing, Rope
from personaplex.kernels.ops import Array

try:  # as in `ops`
    from personaplex.kernels import numba_codec, numba_cpu
except ImportError:
    numba_codec = numba_cpu = None  # type: ignore[assignment]

_FEW_COLUMNS = 16  # of a convolution's output; see `conv1d`
_LARGE_STEP, _LARGE_BLOCK = 1 << 20, 1 << 23  # products of a convolution; see `_is_small`


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """x [N, in, T], weight [out, in, K] -> [N, out, (T - K) / stride + 1].

    On a GPU a convolution with few output columns is a matmul with a large matrix (33 MB for the widest):
    convolution libraries split the work by outputs and would leave most of the chip idle, matmul libraries
    also split the sum.
    """
    columns = (x.shape[-1] - weight.shape[-1]) // stride + 1
    if not ops.uses_triton(x) or columns > _FEW_COLUMNS:
        return F.conv1d(x, weight, bias, stride)
    windows = x.unfold(-1, weight.shape[-1], stride).transpose(1, 2).flatten(2)  # [N, T', in K]
    return F.linear(windows, weight.flatten(1), bias).transpose(1, 2)


@dataclass(eq=False)
class ConvWeights:
    """A streaming convolution: kernel K >= stride, so that K - stride columns are kept between calls."""

    weight: Tensor  # [out, in, K]
    bias: Tensor | None  # [out]
    stride: int

    @functools.cached_property
    def arrays(self) -> tuple[tuple[Array, Array], Array]:
        """The weights for the Numba kernel: as [out, in K] and [in K, out], and the bias."""
        weight = self.weight.detach().flatten(1)
        bias = weight.new_zeros(len(weight)) if self.bias is None else self.bias.detach()
        return (weight.numpy(), weight.t().contiguous().numpy()), bias.numpy()


@dataclass(eq=False)
class TransposedWeights:
    """A streaming transposed convolution of kernel 2 x stride."""

    matrix: Tensor  # [out * 2 * stride, in]
    bias: Tensor  # [out]
    stride: int

    @functools.cached_property
    def arrays(self) -> tuple[tuple[Array, Array], Array]:
        """The weights for the Numba kernel: as [out 2 stride, in] and [in, out 2 stride], and the bias."""
        weight = self.matrix.detach()
        both = weight.contiguous().numpy(), weight.t().contiguous().numpy()
        return both, self.bias.detach().numpy()


def stream_conv(
    x: Tensor, state: Tensor | None, weights: ConvWeights, active: Tensor | None, elu: bool = False
) -> Tensor:
    """Causal convolution of the next columns: x [N, in, T] -> [N, out, T / stride], T a multiple of stride.

    state [N, in, K - stride], the columns before x, is read and updated; None for K = stride. `elu` applies
    an ELU to x, before it is kept as well.
    """
    columns = x.shape[-1] // weights.stride
    if _is_small(x, weights.weight, columns, active):
        return numba_codec.conv(x, state, *weights.arrays, weights.stride, _everyone(x, active), elu)
    if active is None or ops.uses_triton(x):
        return _stream_conv(x, state, weights, active, elu)

    def work(row: slice) -> Tensor:
        return _stream_conv(x[row], None if state is None else state[row], weights, None, elu)

    return _one_by_one(work, active, x.new_zeros(len(x), len(weights.weight), columns))


def _stream_conv(
    x: Tensor, state: Tensor | None, weights: ConvWeights, active: Tensor | None, elu: bool
) -> Tensor:
    if elu:
        x = F.elu(x)
    if state is not None:
        x = torch.cat([state, x], dim=-1)
        commit(state, x[..., -state.shape[-1] :], active)
    return conv1d(x, weights.weight, weights.bias, weights.stride)


def _is_small(x: Tensor, weight: Tensor, columns: int, active: Tensor | None) -> bool:
    """Whether Numba runs this convolution of x to `columns` columns, which it does faster than torch."""
    if not _numba_runs(x):
        return False
    return weight.numel() * columns < (_LARGE_BLOCK if active is None else _LARGE_STEP)


def _numba_runs(x: Tensor) -> bool:
    return not ops.uses_triton(x) and ops.uses_numba(x)


def _everyone(x: Tensor, active: Tensor | None) -> Tensor:
    return torch.ones(len(x), dtype=torch.bool) if active is None else active


def stream_conv_transposed(
    x: Tensor, state: Tensor, weights: TransposedWeights, active: Tensor | None, elu: bool = False
) -> Tensor:
    """Causal transposed convolution: x [N, in, T] -> [N, out, T * stride]; see `stream_conv`.

    state [N, out, stride] is the right half of the last column's output, without bias.
    """
    columns = x.shape[-1]
    if _is_small(x, weights.matrix, columns, active):
        return numba_codec.conv_transposed(x, state, *weights.arrays, _everyone(x, active), elu)
    if active is None or ops.uses_triton(x):
        return _stream_conv_transposed(x, state, weights, active, elu)

    def work(row: slice) -> Tensor:
        return _stream_conv_transposed(x[row], state[row], weights, None, elu)

    return _one_by_one(work, active, x.new_zeros(len(x), len(weights.bias), columns * weights.stride))


def _stream_conv_transposed(
    x: Tensor, state: Tensor, weights: TransposedWeights, active: Tensor | None, elu: bool
) -> Tensor:
    """With K = 2 S it is one matmul whose halves overlap by one step."""
    if elu:
        x = F.elu(x)
    n, _, steps = x.shape
    outputs, stride = len(weights.bias), weights.stride
    halves = ops.linear(x.transpose(1, 2), weights.matrix).view(n, steps, outputs, 2, stride)
    now, later = halves.permute(3, 0, 2, 1, 4)  # each [N, out, T, stride]
    carried = torch.cat([state[:, :, None], later[:, :, :-1]], dim=2)
    commit(state, later[:, :, -1], active)
    return (now + carried).reshape(n, outputs, steps * stride) + weights.bias[:, None]


@dataclass(eq=False)
class Codebooks:
    """The levels of a residual quantizer."""

    vectors: Tensor  # [levels, bins, dim]
    half_norms: Tensor  # [levels, bins], |v|^2 / 2

    @functools.cached_property
    def arrays(self) -> tuple[tuple[Array, Array], Array]:
        """For the Numba kernel: vectors as [levels, bins, dim] and [levels, dim, bins], and half_norms."""
        vectors = self.vectors.detach()
        both = vectors.contiguous().numpy(), vectors.transpose(1, 2).contiguous().numpy()
        return both, self.half_norms.detach().numpy()


def nearest(residual: Tensor, codebooks: Codebooks) -> Tensor:
    """residual [N, dim] -> codes [N, levels] int64: level by level the nearest vector, which is then taken
    off; of equal distances the lowest code.
    """
    if _numba_runs(residual):
        return numba_codec.nearest(residual, *codebooks.arrays)
    codes = []
    for vectors, half_norms in zip(codebooks.vectors, codebooks.half_norms, strict=True):
        code = (half_norms - ops.linear(residual, vectors)).argmin(-1)
        residual = residual - F.embedding(code, vectors)
        codes.append(code)
    return torch.stack(codes, dim=-1)


def commit(target: Tensor, new: Tensor, active: Tensor | None) -> None:
    """target = new for the active slots; active [N] bool, None for all."""
    if active is None:
        target.copy_(new)
    else:
        torch.where(active.view(-1, *[1] * (new.dim() - 1)), new, target, out=target)


def _one_by_one(work: Callable[[slice], Tensor], active: Tensor, out: Tensor) -> Tensor:
    """`out` [N, ...] with the result of `work` in the rows of the active slots."""
    for index in active.nonzero()[:, 0].tolist():
        row = slice(index, index + 1)
        out[row] = work(row)
    return out


@dataclass(eq=False)
class CodecLayerWeights:
    """x + scale1 * attention(norm1 x), then x + scale2 * linear2(gelu(linear1(norm2 x)))."""

    norm1: tuple[Tensor, Tensor]  # gain and bias [dim] of a LayerNorm
    in_proj: Tensor  # [3 dim, dim]
    out_proj: Tensor  # [dim, dim]
    scale1: Tensor  # [dim]
    norm2: tuple[Tensor, Tensor]
    linear1: Tensor  # [hidden, dim]
    linear2: Tensor  # [dim, hidden]
    scale2: Tensor  # [dim]

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The weights for the fused Numba kernel."""
        first = (*self.norm1, self.in_proj, self.out_proj, self.scale1)
        parts = (*first, *self.norm2, self.linear1, self.linear2, self.scale2)
        return tuple(part.detach().contiguous().numpy() for part in parts)


def step_codec_layer(
    x: Tensor, weights: CodecLayerWeights, ring: KVRing, layer: int, rope: Rope, active: Tensor
) -> Tensor:
    """The two positions of a frame through a layer of the codec: x [N, 2, dim] -> the same. The offsets of
    `ring` stay.
    """
    if ops.uses_triton(x):
        return _step_codec_layer(x, weights, ring, layer, rope, active)
    if _numba_runs(x):
        out = x.clone(memory_format=torch.contiguous_format)
        cos, sin = (part.flatten(2).numpy() for part in rope)
        contents = ring.k.numpy(), ring.v.numpy(), layer, ring.offset.numpy()
        numba_cpu.codec_layer(out.numpy(), weights.arrays, *contents, active.numpy(), cos, sin)
        return out

    def work(row: slice) -> Tensor:
        angles, part = (rope[0][row], rope[1][row]), ring.rows(row.start, row.stop)
        return _step_codec_layer(x[row], weights, part, layer, angles, active[row])

    return _one_by_one(work, active, torch.zeros_like(x))


def _step_codec_layer(
    x: Tensor, weights: CodecLayerWeights, ring: KVRing, layer: int, rope: Rope, active: Tensor
) -> Tensor:
    heads, head_dim = ring.k.shape[2], ring.k.shape[4]
    normed = F.layer_norm(x, x.shape[-1:], *weights.norm1, LAYER_NORM_EPS)
    qkv = ops.linear(normed, weights.in_proj).unflatten(-1, (3, heads, head_dim))
    read = ops.attend(ring, layer, qkv, rope, ops.window(ring, x.shape[1], active))
    return finish_codec_layer(x, read, weights)


def finish_codec_layer(x: Tensor, heads: Tensor, weights: CodecLayerWeights) -> Tensor:
    """A layer after its attention: x [N, T, dim], heads [N, H, T, head_dim] -> as x."""
    x = torch.addcmul(x, weights.scale1, ops.linear(heads.transpose(1, 2).flatten(2), weights.out_proj))
    inner = F.gelu(ops.linear(F.layer_norm(x, x.shape[-1:], *weights.norm2, LAYER_NORM_EPS), weights.linear1))
    return torch.addcmul(x, weights.scale2, ops.linear(inner, weights.linear2))
