"""Matmul of a few rows with an int8 matrix as one Triton kernel.

Codes are read once and converted to the rows' dtype in registers; sums and scales are float32. One program
computes some outputs of up to 64 rows, over all inputs in order, so a row's result depends neither on the
other rows nor on timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_OUTPUTS = 32  # of one program
_INPUTS = 8_192  # rows times inputs of one step of its loop: what the shared memory of small cards holds


def matmul(x: Tensor, codes: Tensor, scale: Tensor, residual: Tensor | None = None) -> Tensor:
    """x [rows, in], codes [out, in] int8, scale [out] float32, all contiguous -> [rows, out] in x's
    dtype. With `residual` [rows, out] the product is added to it in place.
    """
    rows, inputs = x.shape
    outputs = codes.shape[0]
    assert x.is_contiguous()
    assert codes.is_contiguous()
    out = torch.empty(rows, outputs, device=x.device, dtype=x.dtype) if residual is None else residual
    assert out.is_contiguous()
    tile = min(max(triton.next_power_of_2(rows), 16), 64)
    step = min(_INPUTS // tile, 256)
    grid = (triton.cdiv(outputs, _OUTPUTS), triton.cdiv(rows, tile))
    _matmul[grid](
        x, codes, scale, out, rows, outputs, inputs, residual is not None, tile, _OUTPUTS, step,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])
def _matmul(
    x, codes, scale, out, rows, outputs, INPUTS: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, BLOCK)
    row_in, column_in = row < rows, column < outputs
    x_place = x + row[:, None] * INPUTS + step[None, :]
    code_place = codes + column[None, :].to(tl.int64) * INPUTS + step[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, INPUTS, BLOCK):
        there = first + step < INPUTS
        a = tl.load(x_place + first, row_in[:, None] & there[None, :], other=0.0)
        b = tl.load(code_place + first, column_in[None, :] & there[:, None], other=0)
        total = tl.dot(a, b.to(a.dtype), total, input_precision="ieee")
    total *= tl.load(scale + column, column_in, other=0.0)[None, :]
    place = out + row[:, None].to(tl.int64) * outputs + column[None, :]
    mask = row_in[:, None] & column_in[None, :]
    if ADD:
        total += tl.load(place, mask, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask)
