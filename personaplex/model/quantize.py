"""Weights of the temporal transformer as int8: half the bytes of bfloat16, for smaller cards.

Each row of a matrix (one output) is int8 codes times one float32 scale, rounded to the nearest; activations
stay as they are and products are summed in float32. What this costs in quality has to be tried on the real
weights; `python -m benchmarks.gpu_checks` measures it on random ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personaplex.config import LMConfig

_STEPS = 127
_KERNEL_ROWS = 128  # beyond as many rows the product is bound by arithmetic, and cuBLAS is better at it


@dataclass(eq=False)
class Int8Matrix:
    """A matrix [out, in]: codes [out, in] int8, scale [out] float32."""

    codes: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int8Matrix:
        """The nearest to `weight` [out, in], on its device and laid out as it is."""
        wide = weight.float()
        scale = (wide.abs().amax(-1) / _STEPS).clamp(min=torch.finfo(torch.float32).tiny)
        codes = (wide / scale[:, None]).round_().clamp_(-_STEPS, _STEPS).to(torch.int8)
        return cls(codes, scale)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def __getitem__(self, rows: slice) -> Int8Matrix:
        return Int8Matrix(self.codes[rows], self.scale[rows])

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """The matrix it stands for."""
        return (self.codes * self.scale[:, None]).to(dtype)

    def product(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`x @ self.T` for x [rows, in] on a GPU, plus `residual` [rows, out] if given -> [rows, out] in x's
        type."""
        if x.shape[0] <= _KERNEL_ROWS:
            from personaplex.model import int8  # only where there is Triton

            return int8.matmul(x.contiguous(), self.codes, self.scale, residual)
        out = F.linear(x, self.numbers(x.dtype))
        return out if residual is None else residual + out


def quantise_layer(layer: nn.Module) -> None:
    """Replaces the four matrices of one prepared temporal layer, where they are."""
    attention, gating = layer.get_submodule("self_attn"), layer.get_submodule("gating")
    for name in ("inputs", "outputs"):
        setattr(attention, name, [Int8Matrix.of(weight) for weight in getattr(attention, name)])
    for part in ("linear_in", "linear_out"):
        module = gating.get_submodule(part)
        weight = module.weight
        assert isinstance(weight, Tensor)
        del module.weight
        module.__dict__["weight"] = Int8Matrix.of(weight.detach())
    layer.__dict__.pop("arrays", None)  # a view of what was


def temporal_bytes(config: LMConfig, bits: int) -> int:
    """Bytes of the temporal layers' matrices at 8 or 16 bits a weight, scales included."""
    dim, hidden = config.temporal.dim, config.temporal.hidden
    weights = config.temporal.layers * (4 * dim * dim + 3 * dim * hidden)
    outputs = config.temporal.layers * (5 * dim + 2 * hidden)
    return weights * bits // 8 + (4 * outputs if bits == 8 else 0)
