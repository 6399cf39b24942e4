"""Modules shared by both transformers and the codec: linear maps, norms, embeddings, feed-forward.

Modules hold weights under the checkpoint's own names; `prepare()` turns freshly loaded weights into what the
steps read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from personaplex.kernels import ops

M = TypeVar("M", bound=nn.Module)


class Stack(nn.ModuleList, Generic[M]):
    """A module list with a typed element."""

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
        return ops.linear(x, self.weight)


class Embedding(nn.Module):
    """An embedding table [rows, dim]; `prepare()` appends the row of zeros that token -1 reads."""

    def __init__(self, rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, dim), requires_grad=False)

    def prepare(self) -> None:
        weight = self.weight.detach()
        zeros = weight.new_zeros(1, weight.shape[1])
        self.weight = nn.Parameter(torch.cat([weight, zeros]), requires_grad=False)


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1, 1, dim), requires_grad=False)

    def prepare(self) -> None:
        """The gain in float32, whatever dtype the checkpoint was cast to."""
        self.gain = self.alpha.detach().reshape(-1).float()

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.gain)


class GatedFeedForward(nn.Module):
    """linear_out(silu(a) * b) with a, b the halves of linear_in(x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear_in = Linear(dim, 2 * hidden)
        self.linear_out = Linear(hidden, dim)
