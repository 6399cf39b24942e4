"""Multi-head self-attention: projections and rotary positions; `kernels.ops.attend` attends."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from personaplex.config import TransformerConfig
from personaplex.kernels import ops
from personaplex.kernels.kvring import Rope
from personaplex.kernels.ops import Matrix
from personaplex.kernels.torch_reference import apply_rope
from personaplex.model.layers import GatedFeedForward, Linear, RMSNorm


class SelfAttention(nn.Module):
    """Projections for `steps` sets of weights, stacked along the first axis in the checkpoint."""

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
        """Splits the stacked weights into one matrix per step."""
        self.inputs = [*self.in_proj_weight.detach().contiguous().chunk(self.steps)]
        self.outputs = [*self.out_proj.weight.detach().contiguous().chunk(self.steps)]
        del self.in_proj_weight, self.out_proj

    def project(self, x: Tensor) -> Tensor:
        """x [N, T, dim] -> q, k and v as one [N, T, 3, heads, head_dim]."""
        return ops.linear(x, self.inputs[0]).unflatten(-1, (3, self.heads, self.head_dim))

    def project_heads(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """x [1, T, dim] -> q and k, rotated, and v, each [1, heads, T, head_dim], for `ring.attend_chunk`."""
        qkv = self.project(x)
        q, k = apply_rope(qkv[:, :, :2], rope).transpose(1, 3).unbind(2)
        return q, k, qkv[:, :, 2].transpose(1, 2)

    def project_kv(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Rotated k and v, each [N, T, heads, head_dim], for a layer whose output nobody reads."""
        kv = ops.linear(x, self.inputs[0][self.dim :]).unflatten(-1, (2, self.heads, self.head_dim))
        return apply_rope(kv[:, :, :1], rope)[:, :, 0], kv[:, :, 1]

    def merge(self, heads: Tensor) -> Tensor:
        """heads [N, H, T, head_dim] -> [N, T, dim]."""
        return ops.linear(heads.transpose(1, 2).flatten(2), self.outputs[0])


def layer_weights(
    norm1: RMSNorm, attention: SelfAttention, norm2: RMSNorm, feed_forward: GatedFeedForward, step: int = 0
) -> ops.LayerWeights:
    """One pre-norm layer's prepared weights, with set `step` of its attention."""
    return ops.LayerWeights(
        norm1.gain,
        attention.inputs[step],
        attention.outputs[step],
        norm2.gain,
        feed_forward.linear_in.weight,
        feed_forward.linear_out.weight,
    )


def rope(config: TransformerConfig, positions: Tensor) -> Rope:
    """positions [N, T] int64 -> cos, sin of the rotary angles, each [N, T, 1, 1, head_dim / 2] float32."""
    half = config.head_dim // 2
    index = torch.arange(half, device=positions.device, dtype=torch.float32)
    frequencies = torch.exp(index * (-math.log(config.max_period) / half))
    angle = positions.float()[..., None, None, None] * frequencies
    return angle.cos(), angle.sin()
