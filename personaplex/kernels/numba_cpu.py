"""Single steps on a CPU in float32, compiled by Numba; `torch_reference` computes the same up to rounding.

torch sums one row in another order than several, and a call to it costs more than a small layer. Here every
row of a batch runs through the same instructions, so results are bit-identical whatever the batch size, and a
weight is read from memory once for all rows.

The compiler may reorder sums, but always in the same way; NaN and infinities propagate as usual. Numba caches
compiled code on disk, per CPU model.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from personaplex.kernels.constants import GOLDEN, LARGE_MATRIX, LAYER_NORM_EPS, RMS_EPS, UNIFORM_BITS

Array = NDArray[np.float32]

_GOLDEN = np.uint64(GOLDEN)
_OPTIONS = {"fastmath": {"reassoc", "contract", "nsz"}, "nogil": True, "error_model": "numpy"}


def kernel(signature: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Compiles when this module is imported, or loads what an earlier import cached on disk."""

    def compiled(function: Callable[..., Any]) -> Any:
        compiler: Any = njit
        try:
            return compiler(signature, cache=True, **_OPTIONS)(function)
        except (RuntimeError, OSError):  # no writable folder for the cache
            return compiler(signature, **_OPTIONS)(function)

    return compiled


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` for x [N, in], weight [out, in] -> [N, out]."""
    outputs, threads = weight.shape[0], torch.get_num_threads()
    out = x.new_empty(x.shape[0], outputs)
    arrays = x.contiguous().numpy(), weight.contiguous().numpy(), out.numpy()
    if threads == 1 or weight.numel() < LARGE_MATRIX:
        _matmul(*arrays, 0, outputs)
        return out
    # Parts begin where blocks of outputs do, so that each output is summed as on one thread.
    bounds = [8 * (outputs // 8 * index // threads) for index in range(threads)] + [outputs]
    work: Callable[[int, int], None] = functools.partial(_matmul, *arrays)
    parts = [_pool(threads).submit(work, start, stop) for start, stop in itertools.pairwise(bounds)]
    for part in parts:
        part.result()
    return out


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="matmul")


def step_layer(
    x: Array,
    weights: tuple[Array, ...],
    keys: Array,
    values: Array,
    layer: int,
    written: NDArray[np.int64],
    active: NDArray[np.bool_],
    cos: Array,
    sin: Array,
) -> None:
    """One position per slot through one pre-norm layer; replaces x [N, dim].

    `weights`: gain of norm1 [dim], in_proj [3 dim, dim], out_proj [dim, dim], gain of norm2, linear_in
    [2 hidden, dim], linear_out [dim, hidden]. keys, values [N, layers, H, C, head_dim] are a ring that holds
    `written` [N] positions and gains one for each slot that is `active` [N]; rows of x of inactive slots are
    undefined afterwards. cos, sin [N, head_dim / 2] are the rope of q and k; [N, 0] for none.
    """
    _step_layer(x, *weights, keys, values, layer, written, active, cos, sin)


def codec_layer(
    x: Array,
    weights: tuple[Array, ...],
    keys: Array,
    values: Array,
    layer: int,
    written: NDArray[np.int64],
    active: NDArray[np.bool_],
    cos: Array,
    sin: Array,
) -> None:
    """The two positions of a frame through one layer of the codec; replaces x [N, 2, dim].

    `weights`: gain and bias of norm1 [dim], in_proj [3 dim, dim], out_proj [dim, dim], scale 1 [dim]; gain
    and bias of norm2, linear1 [hidden, dim], linear2 [dim, hidden], scale 2. The ring is as in `step_layer`
    and gains two positions; cos, sin [N, 2, head_dim / 2].
    """
    _codec_layer(x, *weights, keys, values, layer, written, active, cos, sin)


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    """x [N, dim] contiguous, gain [dim] -> x * gain / rms(x)."""
    out = torch.empty_like(x)
    _rms_norm(x.numpy(), gain.numpy(), out.numpy())
    return out


def sample(logits: Tensor, temperature: Tensor, topk: Tensor, keys: Tensor) -> Tensor:
    """logits [N, V], temperature [N], topk [N] int64, keys [N] int64 -> tokens [N] int64."""
    tokens = topk.new_empty(len(topk))
    _sample(
        logits.numpy(), temperature.numpy(), topk.numpy(), keys.contiguous().numpy().view(np.uint64),
        tokens.numpy(),
    )  # fmt: skip
    return tokens


_1, _2, _3, _5 = (f"float32[{'' if d == 1 else ','.join(':' * (d - 1)) + ','}::1]" for d in (1, 2, 3, 5))


@kernel(f"void({_2}, {_2}, {_2}, int64, int64)")
def _matmul(x, weight, out, start, stop):
    # Two rows by eight outputs in registers. The last of an odd number of rows is paired with itself: the
    # arithmetic of a row must not depend on how many rows there are.
    rows, inner = x.shape
    whole = start + (stop - start) // 8 * 8
    for o in range(start, whole, 8):
        for n in range(0, rows, 2):
            m = min(n + 1, rows - 1)
            a = b = c = d = e = f = g = h = np.float32(0)
            p = q = r = s = t = u = v = w = np.float32(0)
            for i in range(inner):
                y, z = x[n, i], x[m, i]
                a += y * weight[o, i]
                p += z * weight[o, i]
                b += y * weight[o + 1, i]
                q += z * weight[o + 1, i]
                c += y * weight[o + 2, i]
                r += z * weight[o + 2, i]
                d += y * weight[o + 3, i]
                s += z * weight[o + 3, i]
                e += y * weight[o + 4, i]
                t += z * weight[o + 4, i]
                f += y * weight[o + 5, i]
                u += z * weight[o + 5, i]
                g += y * weight[o + 6, i]
                v += z * weight[o + 6, i]
                h += y * weight[o + 7, i]
                w += z * weight[o + 7, i]
            out[n, o], out[n, o + 1], out[n, o + 2], out[n, o + 3] = a, b, c, d
            out[n, o + 4], out[n, o + 5], out[n, o + 6], out[n, o + 7] = e, f, g, h
            out[m, o], out[m, o + 1], out[m, o + 2], out[m, o + 3] = p, q, r, s
            out[m, o + 4], out[m, o + 5], out[m, o + 6], out[m, o + 7] = t, u, v, w
    for o in range(whole, stop):
        for n in range(rows):
            a = np.float32(0)
            for i in range(inner):
                a += x[n, i] * weight[o, i]
            out[n, o] = a


@kernel(f"void({_2}, {_1}, {_2})")
def _rms_norm(x, gain, out):
    rows, dim = x.shape
    for n in range(rows):
        squares = np.float32(0)
        for i in range(dim):
            squares += x[n, i] * x[n, i]
        scale = np.float32(1 / np.sqrt(squares / dim + RMS_EPS))
        for i in range(dim):
            out[n, i] = x[n, i] * (gain[i] * scale)


@kernel()
def _rope(head, cos, sin):
    """Rotates the interleaved pairs of one head."""
    for i in range(len(cos)):
        a, b = head[2 * i], head[2 * i + 1]
        head[2 * i] = a * cos[i] - b * sin[i]
        head[2 * i + 1] = a * sin[i] + b * cos[i]


@kernel()
def _attend(query, k, v, filled, hidden, newer, scores, out):
    """query, out [head_dim], k, v [C, head_dim]: attends to the first `filled` columns, not to `hidden` and
    `newer`."""
    size = len(query)
    scale = np.float32(size**-0.5)
    largest = np.float32(-np.inf)
    for c in range(filled):
        score = np.float32(0)
        for i in range(size):
            score += query[i] * k[c, i]
        scores[c] = score * scale if c != hidden and c != newer else np.float32(-np.inf)
        largest = max(largest, scores[c])
    total = np.float32(0)
    for c in range(filled):
        scores[c] = np.exp(scores[c] - largest)
        total += scores[c]
    for c in range(filled):
        for i in range(size):
            out[i] += scores[c] * v[c, i]
    for i in range(size):
        out[i] /= total


@kernel(
    f"void({_2}, {_1}, {_2}, {_2}, {_1}, {_2}, {_2}, {_5}, {_5}, int64, int64[::1], boolean[::1], {_2}, {_2})"
)
def _step_layer(
    x, norm1, in_proj, out_proj, norm2, linear_in, linear_out,
    keys, values, layer, written, active, cos, sin,
):  # fmt: skip
    rows, dim = x.shape
    heads, capacity, size = keys.shape[2:]
    hidden = linear_out.shape[1]
    normed, scores = np.empty((rows, dim), np.float32), np.empty(capacity, np.float32)
    qkv, read = np.empty((rows, 3 * dim), np.float32), np.zeros((rows, dim), np.float32)
    both, gated = np.empty((rows, 2 * hidden), np.float32), np.empty((rows, hidden), np.float32)

    _rms_norm(x, norm1, normed)
    _matmul(normed, in_proj, qkv, 0, 3 * dim)
    for n in range(rows):
        if not active[n]:
            continue
        column = written[n] % capacity
        after = written[n] + 1
        unseen = after % capacity if after >= capacity else -1  # see kvring.py
        for h in range(heads):
            one = slice(h * size, (h + 1) * size)
            q, k, v = qkv[n, :dim][one], qkv[n, dim : 2 * dim][one], qkv[n, 2 * dim :][one]
            _rope(q, cos[n], sin[n])
            _rope(k, cos[n], sin[n])
            keys[n, layer, h, column] = k
            values[n, layer, h, column] = v
            _attend(
                q, keys[n, layer, h], values[n, layer, h], min(after, capacity), unseen, -1, scores,
                read[n, one],
            )  # fmt: skip
    _matmul(read, out_proj, normed, 0, dim)
    for n in range(rows):
        for i in range(dim):
            x[n, i] += normed[n, i]

    _rms_norm(x, norm2, normed)
    _matmul(normed, linear_in, both, 0, 2 * hidden)
    for n in range(rows):
        for i in range(hidden):
            a = both[n, i]
            gated[n, i] = a / (1 + np.exp(-a)) * both[n, hidden + i]
    _matmul(gated, linear_out, normed, 0, dim)
    for n in range(rows):
        for i in range(dim):
            x[n, i] += normed[n, i]


@kernel()
def _layer_norm(x, gain, bias, out):
    """x, out [T, dim]."""
    rows, dim = x.shape
    for t in range(rows):
        mean, squares = np.float32(0), np.float32(0)
        for i in range(dim):
            mean += x[t, i]
        mean /= dim
        for i in range(dim):
            squares += (x[t, i] - mean) * (x[t, i] - mean)
        scale = np.float32(1 / np.sqrt(squares / dim + LAYER_NORM_EPS))
        for i in range(dim):
            out[t, i] = (x[t, i] - mean) * scale * gain[i] + bias[i]


@kernel(
    f"void({_3}, {_1}, {_1}, {_2}, {_2}, {_1}, {_1}, {_1}, {_2}, {_2}, {_1}, "
    f"{_5}, {_5}, int64, int64[::1], boolean[::1], {_3}, {_3})"
)
def _codec_layer(
    x, gain1, bias1, in_proj, out_proj, scale1, gain2, bias2, linear1, linear2, scale2,
    keys, values, layer, written, active, cos, sin,
):  # fmt: skip
    rows, steps, dim = x.shape
    heads, capacity, size = keys.shape[2:]
    hidden = linear1.shape[0]
    normed, scores = np.empty((steps, dim), np.float32), np.empty(capacity, np.float32)
    qkv, read = np.empty((steps, 3 * dim), np.float32), np.empty((steps, dim), np.float32)
    inner = np.empty((steps, hidden), np.float32)
    for n in range(rows):
        if not active[n]:
            continue
        _layer_norm(x[n], gain1, bias1, normed)
        _matmul(normed, in_proj, qkv, 0, 3 * dim)
        after = written[n] + steps
        unseen = after % capacity if after >= capacity else -1  # see kvring.py
        read[:] = 0
        for h in range(heads):
            one = slice(h * size, (h + 1) * size)
            for t in range(steps):
                k, v = qkv[t, dim : 2 * dim][one], qkv[t, 2 * dim :][one]
                _rope(k, cos[n, t], sin[n, t])
                keys[n, layer, h, (written[n] + t) % capacity] = k
                values[n, layer, h, (written[n] + t) % capacity] = v
            for t in range(steps):
                q = qkv[t, :dim][one]
                _rope(q, cos[n, t], sin[n, t])
                _attend(
                    q, keys[n, layer, h], values[n, layer, h], min(after, capacity), unseen,
                    (written[n] + 1) % capacity if t == 0 else -1, scores, read[t, one],
                )  # fmt: skip
        _matmul(read, out_proj, normed, 0, dim)
        for t in range(steps):
            for i in range(dim):
                x[n, t, i] += scale1[i] * normed[t, i]
        _layer_norm(x[n], gain2, bias2, normed)
        _matmul(normed, linear1, inner, 0, hidden)
        for t in range(steps):
            for i in range(hidden):
                a = inner[t, i]
                inner[t, i] = np.float32(0.5) * a * (1 + math.erf(a * np.float32(math.sqrt(0.5))))
        _matmul(inner, linear2, normed, 0, dim)
        for t in range(steps):
            for i in range(dim):
                x[n, t, i] += scale2[i] * normed[t, i]


@kernel("uint64(uint64)")
def _mix(x):
    """The splitmix64 finalizer."""
    x += _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@kernel()
def _kth_largest(row, k):
    """The k-th largest of float32 [V], by bisection over the integers that sort as floats do."""
    ordered = row.view(np.int32).copy()
    for v in range(len(ordered)):
        ordered[v] ^= (ordered[v] >> 31) & 0x7FFFFFFF
    low, high = np.int64(-(1 << 31)), np.int64(1 << 31)  # at least k are >= low, fewer than k are >= high
    while high - low > 1:
        middle = (low + high) >> 1
        bound, count = np.int32(middle), 0
        for v in range(len(ordered)):
            count += ordered[v] >= bound
        if count >= k:
            low = middle
        else:
            high = middle
    for v in range(len(ordered)):
        if ordered[v] == low:
            return row[v]
    return row[0]  # not reached


@kernel(f"void({_2}, {_1}, int64[::1], uint64[::1], int64[::1])")
def _sample(logits, temperature, topk, keys, tokens):
    rows, size = logits.shape
    for n in range(rows):
        row, greedy = logits[n], temperature[n] <= 0
        least, room = np.float32(-np.inf), size  # of the candidates, and how many may be as small as that
        if not greedy and 0 < topk[n] < size:
            least = _kth_largest(row, topk[n])
            room = topk[n]
            for v in range(size):
                room -= row[v] > least
        best, token = np.float32(-np.inf), 0
        for v in range(size):
            score = row[v]
            if not greedy:
                if score < least or (score == least and room <= 0):
                    continue
                room -= score == least
                bits = _mix(keys[n] + np.uint64(v) * _GOLDEN) & np.uint64((1 << UNIFORM_BITS) - 1)
                uniform = (np.float32(bits) + np.float32(0.5)) / np.float32(1 << UNIFORM_BITS)
                score = score / temperature[n] - np.log(-np.log(uniform))
            if score > best:
                best, token = score, v
        tokens[n] = token
