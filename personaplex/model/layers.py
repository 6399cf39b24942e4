"""The pieces both transformers and the codec are made of: linear maps, norms, rotary positions, feed-forward.

Modules hold weights under the checkpoint's own names; `prepare()` turns freshly loaded weights into what the
steps read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from personaplex.config import TransformerConfig
from personaplex.model.quantize import Int8Matrix

Array = NDArray[np.float32]
Matrix = Tensor | Int8Matrix  # [out, in]

M = TypeVar("M", bound=nn.Module)


def _numba_works() -> bool:
    """Whether Numba is there and takes the NumPy that is: it refuses to be imported beside a newer one."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


NUMBA = _numba_works()

LARGE = 1 << 22  # weights of a matrix from which on it is worth more than one thread

RMS_EPS = 1e-8
LAYER_NORM_EPS = 1e-5


def uses_kernels(x: Tensor) -> bool:
    """Whether x is worked on by Triton's kernels, at fixed shapes, without a word to the host: on CUDA.

    Elsewhere plain torch does the same sums. `attention.py` and `pointwise.py` hold the kernels and name the
    counterpart of each.
    """
    return x.is_cuda


def uses_host_kernels(x: Tensor) -> bool:
    """Whether Numba's kernels (`host.py`) do the work of steps: in float32 on a CPU."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and NUMBA and not uses_kernels(x)


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """`x @ weight.T` for x [..., in], weight [out, in].

    x [N, in] is one row of each slot: on a CPU in float32 no row's result depends, even by rounding, on how
    many there are. Any other shape is a sequence of one slot.
    """
    if isinstance(weight, Int8Matrix):
        if x.is_cuda:
            return weight.product(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        return linear(x, weight.numbers(x.dtype))
    if x.dim() == 2 and uses_host_kernels(x):
        from personaplex.model import host  # only where there is Numba

        return host.product(x, weight)
    return F.linear(x, _fetched(weight, x))


def linear_add(residual: Tensor, x: Tensor, weight: Matrix) -> Tensor:
    """`residual + x @ weight.T` for residual [..., out], x [..., in]; rows as independent as in `linear`.

    Where Triton's kernels do the work the sum takes the place of `residual`, which spares a copy.
    """
    if not uses_kernels(x):
        return residual + linear(x, weight)
    rows, inner = residual.flatten(0, -2), x.flatten(0, -2)
    if isinstance(weight, Int8Matrix):
        return weight.product(inner, rows).view(residual.shape)
    return rows.addmm_(inner, _fetched(weight, x).t()).view(residual.shape)


def _fetched(weight: Tensor, x: Tensor) -> Tensor:
    """The weight on x's device: one kept on the host (see offload.py) is copied for this product only."""
    return weight if weight.device == x.device else weight.to(x.device, non_blocking=True)


class Stack(nn.ModuleList, Generic[M]):
    """A module list that knows what it holds."""

    def __iter__(self) -> Iterator[M]:
        return cast("Iterator[M]", super().__iter__())

    def __getitem__(self, index: int) -> M:  # type: ignore[override]
        return cast("M", super().__getitem__(index))

    if TYPE_CHECKING:

        def __init__(self, modules: Iterable[M]) -> None: ...


class Linear(nn.Module):
    """A bias-free linear map; `weight` is [out, in]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


class Table(nn.Module):
    """An embedding table; `prepare()` appends the row of zeros that token -1 reads."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(torch.empty(rows, dim), requires_grad=False)

    def prepare(self) -> None:
        weight = self.weight.detach()
        self.weight = nn.Parameter(
            torch.cat([weight, weight.new_zeros(1, weight.shape[1])]), requires_grad=False
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [...] int64 -> [..., dim]; -1 gives zeros, anything lower reads row 0."""
        return F.embedding(table_rows(tokens, self.rows), self.weight)


def table_rows(tokens: Tensor, rows: int) -> Tensor:
    """Row of a prepared table of `rows` real rows for each token."""
    return tokens.clamp(min=0).masked_fill_(tokens == -1, rows)


def rms_norm(x: Tensor, alpha: Tensor) -> Tensor:
    """x * alpha / rms(x) in float32, then x's type; alpha [..., dim] is float32."""
    if uses_kernels(x):
        from personaplex.model import pointwise  # only where there is Triton

        return pointwise.rms_norm(x, alpha, RMS_EPS)
    if x.dim() == 2 and uses_host_kernels(x):
        from personaplex.model import host  # only where there is Numba

        return host.rms_norm(x.contiguous(), alpha)
    return F.rms_norm(x.float(), alpha.shape, alpha, RMS_EPS).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, 1, dim), requires_grad=False)

    def prepare(self) -> None:
        """The gain in float32, whatever type the checkpoint's was rounded to."""
        self.gain = self.alpha.detach().reshape(-1).float()

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.gain)


class Attention(nn.Module):
    """Projections of multi-head attention, for `steps` sets of weights stacked along the first axis."""

    def __init__(self, config: TransformerConfig, steps: int = 1) -> None:
        super().__init__()
        self.heads, self.head_dim, self.dim = config.heads, config.head_dim, config.dim
        self.in_proj_weight = nn.Parameter(
            torch.empty(steps * 3 * config.dim, config.dim), requires_grad=False
        )
        self.out_proj = Linear(config.dim, steps * config.dim)
        self.steps = steps
        self.inputs: list[Matrix] = []
        self.outputs: list[Matrix] = []

    def prepare(self) -> None:
        """Splits the stacked weights into one matrix a step."""
        self.inputs = [*self.in_proj_weight.detach().contiguous().chunk(self.steps)]
        self.outputs = [*self.out_proj.weight.detach().contiguous().chunk(self.steps)]
        del self.in_proj_weight, self.out_proj

    def project(self, x: Tensor, step: int = 0) -> Tensor:
        """x [N, T, dim] -> q, k and v as one [N, T, 3, heads, head_dim]; T may be left out."""
        return linear(x, self.inputs[step]).unflatten(-1, (3, self.heads, self.head_dim))

    def project_kv(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """k rotated by `turn` and v, each [N, T, heads, head_dim], for a layer whose output nobody reads."""
        kv = linear(x, self.inputs[0][self.dim :]).unflatten(-1, (2, self.heads, self.head_dim))
        return rotate(kv[:, :, :1], *turn)[:, :, 0], kv[:, :, 1]

    def merge(self, heads: Tensor) -> Tensor:
        """heads [N, H, T, head_dim] -> [N, T, dim]."""
        return linear(heads.transpose(1, 2).flatten(2), self.outputs[0])

    def add_to(self, residual: Tensor, heads: Tensor) -> Tensor:
        """residual [N, T, dim] + the heads [N, H, T, head_dim], merged; of one position T may be left out."""
        return linear_add(residual, heads.transpose(1, 2).reshape(residual.shape), self.outputs[0])


class GatedFeedForward(nn.Module):
    """residual + linear_out(silu(a) * b) with a, b the halves of linear_in(x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear_in = Linear(dim, 2 * hidden)
        self.linear_out = Linear(hidden, dim)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + the feed-forward of x, both [..., dim]."""
        return linear_add(residual, silu_multiply(self.linear_in(x)), self.linear_out.weight)


def host_arrays(
    norm1: RMSNorm, attention: Attention, norm2: RMSNorm, gating: GatedFeedForward, step: int = 0
) -> tuple[Array, ...] | None:
    """A layer's weights as `host.step_layer` takes them, which runs on one thread; None when more threads do
    better, or when the weights are not all float32 on the CPU.
    """
    parts: list[Array] = []
    for part in (
        *(norm1.gain, attention.inputs[step], attention.outputs[step]),
        *(norm2.gain, gating.linear_in.weight, gating.linear_out.weight),
    ):
        if not isinstance(part, Tensor) or not uses_host_kernels(part):
            return None
        if part.numel() >= LARGE and torch.get_num_threads() > 1:
            return None
        parts.append(part.detach().numpy())
    return tuple(parts)


def silu_multiply(x: Tensor) -> Tensor:
    """x [..., 2 h] = (a, b) -> silu(a) * b [..., h]."""
    if uses_kernels(x):
        from personaplex.model import pointwise  # only where there is Triton

        return pointwise.silu_multiply(x)
    a, b = x.chunk(2, dim=-1)
    return F.silu(a).mul_(b)


def turned(qkv: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [N, T, 3, heads, head_dim] -> q and k rotated by `turn` and v, each [N, T, heads, head_dim]."""
    q, k = rotate(qkv[:, :, :2], *turn).unbind(2)
    return q, k, qkv[:, :, 2]


def angles(config: TransformerConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary angles in float32: positions [N, T] int64 -> cos, sin, each [N, T, 1, 1, head_dim / 2]."""
    half = config.head_dim // 2
    index = torch.arange(half, device=positions.device, dtype=torch.float32)
    frequencies = torch.exp(index * (-math.log(config.max_period) / half))
    angle = positions.float()[..., None, None, None] * frequencies
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, T, ..., H, head_dim] with its interleaved pairs rotated by `angles`, in float32."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)
