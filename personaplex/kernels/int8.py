"""Int8 forms: matrices with one float32 scale per row, vectors with one float16 scale each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from personaplex.kernels.constants import INT8_MAX, LARGEST_SCALE, SMALLEST_SCALE


@dataclass(eq=False)
class Int8Matrix:
    """A matrix [out, in]: codes [out, in] int8, scale [out] float32."""

    codes: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Int8Matrix:
        """`weight` [out, in] rounded to the nearest codes, on its device and with its memory layout."""
        wide = weight.float()
        scale = (wide.abs().amax(-1) / INT8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
        codes = (wide / scale[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
        return cls(codes, scale)

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def __getitem__(self, rows: slice) -> Int8Matrix:
        return Int8Matrix(self.codes[rows], self.scale[rows])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The matrix [out, in] in `dtype`."""
        return (self.codes * self.scale[:, None]).to(dtype)


def quantize_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., head_dim] -> int8 codes of that shape and float16 scales [...]; x is about codes * scale."""
    wide = x.float()
    scale = (wide.abs().amax(-1) * (1.0 / INT8_MAX)).clamp(SMALLEST_SCALE, LARGEST_SCALE).half()
    codes = (wide / scale.float()[..., None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return codes.to(torch.int8), scale


def dequantize_vectors(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `quantize_vectors`, in `dtype`."""
    return (codes * scale.float()[..., None]).to(dtype)
