"""Adapters while they are trained: parameters beside the frozen matrices of a prepared language model.

They start at no change at all (b is zero). `merged` lends a model with the adapters in it, for samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personaplex.errors import CheckpointError
from personaplex.kernels.int8 import Int8Matrix
from personaplex.kernels.ops import Matrix
from personaplex.model.identity import Base
from personaplex.model.lm import LM
from personaplex.model.lora import Adapter, Target


class Adapters(nn.Module):
    """One pair a [rank, in], b [out, rank] for each target, float32."""

    def __init__(self, targets: Sequence[Target], rank: int, scale: float, seed: int = 0) -> None:
        super().__init__()
        self.targets, self.rank, self.scale = tuple(targets), rank, scale
        generator = torch.Generator().manual_seed(seed)
        self._a, self._b = nn.ParameterList(), nn.ParameterList()
        for target in targets:
            bound = math.sqrt(3 / target.columns)
            drawn = torch.rand(rank, target.columns, generator=generator)
            self._a.append(nn.Parameter((2 * drawn - 1) * bound))
            self._b.append(nn.Parameter(torch.zeros(target.rows, rank)))
        self._index = {target.key: index for index, target in enumerate(self.targets)}

    def pair(self, key: str) -> tuple[Tensor, Tensor] | None:
        index = self._index.get(key)
        return None if index is None else (self._a[index], self._b[index])

    def linear(self, key: str, x: Tensor, weight: Matrix) -> Tensor:
        """x [..., in] through the frozen `weight` [out, in] and its adapter, in x's dtype."""
        y = _Int8Linear.apply(x, weight) if isinstance(weight, Int8Matrix) else F.linear(x, weight)
        pair = self.pair(key)
        if pair is None:
            return y
        a, b = pair
        return y + F.linear(F.linear(x, a.to(x.dtype)), (self.scale * b).to(x.dtype))

    def rows(self, key: str, tokens: Tensor, table: Tensor) -> Tensor:
        """Rows of an embedding table [rows + 1, dim], which ends in zeros for token -1, with its adapter."""
        known = tokens >= 0
        found = F.embedding(torch.where(known, tokens, len(table) - 1), table)
        pair = self.pair(key)
        if pair is None:
            return found
        a, b = pair
        change = self.scale * F.embedding(tokens.clamp(min=0), b) @ a
        return found + (change * known[..., None]).to(found.dtype)

    def exported(self, base: Base, training: Mapping[str, Any]) -> Adapter:
        pairs = {
            target.key: (a.detach().cpu(), b.detach().cpu())
            for target, a, b in zip(self.targets, self._a, self._b, strict=True)
        }
        return Adapter(base, self.rank, self.scale, pairs, training)

    @torch.no_grad()
    def adopt(self, name: str, adapter: Adapter) -> None:
        """Starts from another adapter of the same matrices. Raises CheckpointError when they differ."""
        if set(adapter.pairs) != set(self._index) or adapter.rank != self.rank:
            raise CheckpointError(f"the adapter {name} has another rank or other targets than this run")
        for key, (a, b) in adapter.pairs.items():
            index = self._index[key]
            self._a[index].copy_(a)
            self._b[index].copy_(b * (adapter.scale / self.scale))


class _Int8Linear(torch.autograd.Function):
    """A frozen int8 matrix: dequantized on the way there and again on the way back, kept in neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Matrix) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.weight.dequantize(grads[0].dtype), None


@contextmanager
def merged(lm: LM, adapters: Adapters) -> Iterator[None]:
    """Within the block `lm`'s own matrices have the adapters in them; behind it they are as before, exactly.

    What they were is kept in host memory meanwhile.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for target in adapters.targets:
                pair = adapters.pair(target.key)
                assert pair is not None
                place = matrix(lm, target)
                change = adapters.scale * (pair[1] @ pair[0])
                if isinstance(place, Int8Matrix):
                    kept += [(part, part.cpu().clone()) for part in (place.codes, place.scale)]
                    new = Int8Matrix.of(place.dequantize(torch.float32) + change)
                    place.codes.copy_(new.codes)
                    place.scale.copy_(new.scale)
                else:
                    kept.append((place, place.cpu().clone()))
                    place.copy_((place.float() + change).to(place.dtype))
        yield
    finally:
        with torch.no_grad():
            for place, before in reversed(kept):
                place.copy_(before)


def matrix(lm: LM, target: Target) -> Matrix:
    """The memory in which a prepared model keeps the matrix of `target`."""
    tensor, config = target.tensor, lm.config
    parts = tensor.split(".")
    if parts[0] == "emb":
        rows = config.card + 2  # each table ends in its row of zeros
        start = int(parts[1]) * rows
        return lm.audio_table[start : start + rows - 1]
    if parts[0] == "depformer_in":
        start = int(parts[1]) * target.rows
        return lm.depth_inputs.weight.detach()[start : start + target.rows]
    if "self_attn" in tensor:
        module = lm.get_submodule(tensor.partition(".self_attn")[0] + ".self_attn")
        matrices: list[Matrix] = module.inputs if "in_proj" in tensor else module.outputs  # type: ignore
        return matrices[target.step or 0]
    module = lm.get_submodule(tensor.removesuffix(".weight"))
    weight: Matrix = module.weight  # type: ignore[assignment]
    if isinstance(weight, Int8Matrix):
        return weight
    return weight.detach()[: target.rows]  # an embedding table ends in a row of zeros
