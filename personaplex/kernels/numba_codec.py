"""The codec's convolutions and quantizer on a CPU in float32, compiled by Numba: steps of all slots, and
blocks of one.

A call costs a few microseconds, where torch takes a hundred for the copies and calls of one small layer. As
in `numba_cpu`, every slot of a batch runs through the same instructions, so results are bit-identical
whatever the batch, and whichever slots of it are active.

`elu` applies an ELU to what comes in; states keep columns behind it. Slots that are not active keep their
state, and their output is zero.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from personaplex.kernels.numba_cpu import Array, kernel

_TILE = 480  # columns
_MANY_COLUMNS = 32  # of output, from which they and not the channels are summed side by side


def conv(
    x: Tensor,
    state: Tensor | None,
    weight: tuple[Array, Array],
    bias: Array,
    stride: int,
    active: Tensor,
    elu: bool,
) -> Tensor:
    """x [N, in, T], state [N, in, K - stride] (None: K = stride), active [N] bool -> [N, out, T / stride].

    `weight` comes as [out, in K] and as [in K, out].
    """
    by_output, by_input = weight
    slots, inputs, length = x.shape
    out = x.new_empty(slots, len(bias), length // stride)
    kept = x.new_empty(slots, inputs, 0) if state is None else state
    many = out.shape[2] >= _MANY_COLUMNS
    run, matrix = (_conv_columns, by_output) if many else (_conv_channels, by_input)
    run(x.contiguous().numpy(), kept.numpy(), matrix, bias, stride, active.numpy(), elu, out.numpy())
    return out


def conv_transposed(
    x: Tensor, state: Tensor, weight: tuple[Array, Array], bias: Array, active: Tensor, elu: bool
) -> Tensor:
    """x [N, in, T], state [N, out, stride], active [N] bool -> [N, out, T * stride].

    `weight` comes as [out 2 stride, in] and as [in, out 2 stride].
    """
    by_output, by_input = weight
    slots, _, columns = x.shape
    out = x.new_empty(slots, len(bias), columns * state.shape[2])
    many = columns >= _MANY_COLUMNS
    run, matrix = (_transposed_columns, by_output) if many else (_transposed_channels, by_input)
    run(x.contiguous().numpy(), state.numpy(), matrix, bias, active.numpy(), elu, out.numpy())
    return out


def nearest(residual: Tensor, vectors: tuple[Array, Array], half_norms: Array) -> Tensor:
    """Codes [N, levels] int64 of residual [N, dim], level by level; of equal distances the lowest code.

    `vectors` come as [levels, bins, dim] and as [levels, dim, bins]; half_norms [levels, bins] = |v|^2 / 2.
    """
    codes = torch.empty(len(residual), len(half_norms), dtype=torch.int64)
    _nearest(residual.clone().numpy(), *vectors, half_norms, codes.numpy())
    return codes


@kernel()
def _elu(x, out):
    """x, out [columns]: ELU, by a polynomial that the compiler can run on several numbers at once.

    exp(x) - 1 = 2^n (p(r) + 1) - 1 for x = n ln 2 + r, with p(r) = exp(r) - 1 to 1e-8 for |r| <= ln(2) / 2.
    """
    for i in range(len(x)):
        value = x[i]
        low = max(min(value, np.float32(0)), np.float32(-20))  # below that it is -1 in float32
        n = np.float32(np.int32(low * np.float32(1.44269504) - np.float32(0.5)))  # rounded, as low <= 0
        r = low - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4)
        p = p * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        p = p * r * r + r
        scale = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
        out[i] = scale * p + (scale - np.float32(1)) if value <= 0 else value


@kernel()
def _take(x, elu, out):
    """x, out [columns]: what comes in, behind an ELU if there is one."""
    if elu:
        _elu(x, out)
    else:
        out[:] = x


@kernel()
def _line(x, state, elu, line):
    """x [T] behind what was kept, state [kept], as line [kept + T]; and keeps the last columns of that."""
    kept = len(state)
    line[:kept] = state
    _take(x, elu, line[kept:])
    state[:] = line[len(line) - kept :]


@kernel()
def _tap(line, at, stride, tap):
    """Every stride-th number of `line` from `at` on."""
    if stride == 1:
        tap[:] = line[at : at + len(tap)]
    else:
        for t in range(len(tap)):
            tap[t] = line[at + t * stride]


@kernel()
def _accumulate(factors, rows, total):
    """total [width] += factors [count] @ rows [count, width], four at a time: `total` stays in cache."""
    count = len(factors)
    for j in range(0, count - 3, 4):
        e, f, g, h = factors[j], factors[j + 1], factors[j + 2], factors[j + 3]
        a, b, c, d = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
        for i in range(len(total)):
            total[i] += (e * a[i] + f * b[i]) + (g * c[i] + h * d[i])
    for j in range(count // 4 * 4, count):
        e, a = factors[j], rows[j]
        for i in range(len(total)):
            total[i] += e * a[i]


_1, _2, _3 = "float32[::1]", "float32[:,::1]", "float32[:,:,::1]"


@kernel(f"void({_3}, {_3}, {_2}, {_1}, int64, boolean[::1], boolean, {_3})")
def _conv_columns(x, state, weight, bias, stride, active, elu, out):
    """weight [out, in K]: many columns of one output channel at once, few enough for the cache."""
    slots, inputs, length = x.shape
    outputs, columns = out.shape[1:]
    size = weight.shape[1] // inputs
    lines = np.empty((inputs, size - stride + length), np.float32)
    taps = np.empty((inputs * size, min(columns, _TILE)), np.float32)
    for n in range(slots):
        if not active[n]:
            out[n] = 0
            continue
        for i in range(inputs):
            _line(x[n, i], state[n, i], elu, lines[i])
        for first in range(0, columns, _TILE):
            width = min(_TILE, columns - first)
            for i in range(inputs):
                for k in range(size):
                    _tap(lines[i], first * stride + k, stride, taps[i * size + k][:width])
            for o in range(outputs):
                total = out[n, o, first : first + width]
                total[:] = bias[o]
                _accumulate(weight[o], taps, total)


@kernel(f"void({_3}, {_3}, {_2}, {_1}, int64, boolean[::1], boolean, {_3})")
def _conv_channels(x, state, weight, bias, stride, active, elu, out):
    """weight [in K, out]: all output channels of one column at once."""
    slots, inputs, length = x.shape
    outputs, columns = out.shape[1:]
    size = weight.shape[0] // inputs
    lines = np.empty((inputs, size - stride + length), np.float32)
    taps, sums = np.empty(inputs * size, np.float32), np.empty(outputs, np.float32)
    for n in range(slots):
        if not active[n]:
            out[n] = 0
            continue
        for i in range(inputs):
            _line(x[n, i], state[n, i], elu, lines[i])
        for t in range(columns):
            for i in range(inputs):
                for k in range(size):
                    taps[i * size + k] = lines[i, t * stride + k]
            sums[:] = bias
            _accumulate(taps, weight, sums)
            for o in range(outputs):
                out[n, o, t] = sums[o]


@kernel(f"void({_3}, {_3}, {_2}, {_1}, boolean[::1], boolean, {_3})")
def _transposed_columns(x, state, weight, bias, active, elu, out):
    """weight [out 2 stride, in]: all columns of one output channel at once."""
    slots, inputs, columns = x.shape
    outputs, stride = state.shape[1:]
    lines, sums = np.empty((inputs, columns), np.float32), np.empty((2 * stride, columns), np.float32)
    for n in range(slots):
        if not active[n]:
            out[n] = 0
            continue
        for i in range(inputs):
            _take(x[n, i], elu, lines[i])
        for o in range(outputs):
            sums[:] = 0
            for j in range(2 * stride):
                _accumulate(weight[o * 2 * stride + j], lines, sums[j])
            for j in range(stride):
                now, later = sums[j], sums[stride + j]
                out[n, o, j] = now[0] + state[n, o, j] + bias[o]
                for t in range(1, columns):
                    out[n, o, t * stride + j] = now[t] + later[t - 1] + bias[o]
                state[n, o, j] = later[columns - 1]


@kernel(f"void({_3}, {_3}, {_2}, {_1}, boolean[::1], boolean, {_3})")
def _transposed_channels(x, state, weight, bias, active, elu, out):
    """weight [in, out 2 stride]: all output channels of one column at once."""
    slots, inputs, columns = x.shape
    outputs, stride = state.shape[1:]
    lines, factors = np.empty((inputs, columns), np.float32), np.empty(inputs, np.float32)
    sums = np.empty(outputs * 2 * stride, np.float32)
    for n in range(slots):
        if not active[n]:
            out[n] = 0
            continue
        for i in range(inputs):
            _take(x[n, i], elu, lines[i])
        for t in range(columns):
            for i in range(inputs):
                factors[i] = lines[i, t]
            sums[:] = 0
            _accumulate(factors, weight, sums)
            for o in range(outputs):
                for j in range(stride):
                    at = o * 2 * stride + j
                    out[n, o, t * stride + j] = sums[at] + state[n, o, j] + bias[o]
                    state[n, o, j] = sums[at + stride]


@kernel(f"void({_2}, {_3}, {_3}, {_2}, int64[:,::1])")
def _nearest(residual, vectors, by_dim, half_norms, codes):
    rows, dim = residual.shape
    levels, bins, _ = vectors.shape
    scores = np.empty(bins, np.float32)
    for n in range(rows):
        left = residual[n]
        for level in range(levels):
            scores[:] = 0
            _accumulate(left, by_dim[level], scores)
            best, code = np.float32(np.inf), 0
            for b in range(bins):
                distance = half_norms[level, b] - scores[b]
                if distance < best:
                    best, code = distance, b
            for i in range(dim):
                left[i] -= vectors[level, code, i]
            codes[n, level] = code
