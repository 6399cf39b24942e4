"""The temporal transformer: one position per frame, the sum of all 17 streams."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from personaplex.config import TransformerConfig
from personaplex.kernels import ops
from personaplex.model import ring as rings
from personaplex.model.layers import GatedFeedForward, RMSNorm, Stack
from personaplex.model.ring import Ring
from personaplex.model.self_attention import SelfAttention, layer_weights, rope


class TemporalLayer(nn.Module):
    """Pre-norm layer without biases: x + attention(norm1 x), then x + gating(norm2 x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.norm1 = RMSNorm(config.dim)
        self.norm2 = RMSNorm(config.dim)
        self.gating = GatedFeedForward(config.dim, config.hidden)

    def prepare(self) -> None:
        for part in (self.norm1, self.self_attn, self.norm2):
            part.prepare()

    @cached_property
    def step_weights(self) -> ops.LayerWeights:
        return layer_weights(self.norm1, self.self_attn, self.norm2, self.gating)


class Temporal(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = Stack(TemporalLayer(config) for _ in range(config.layers))

    def prepare(self) -> None:
        for layer in self.layers:
            layer.prepare()

    def step(self, x: Tensor, ring: Ring, active: Tensor) -> Tensor:
        """One position per slot: x [N, dim], which may be overwritten -> [N, dim] before the last norm.

        Offsets advance for active slots.
        """
        weights = [layer.step_weights for layer in self.layers]
        x = ops.step_layers(x, weights, ring, rope(self.config, ring.offset[:, None]), active)
        ring.offset += active
        return x

    def prefill(self, x: Tensor, ring: Ring, slot: int, start: int, origin: int = 0) -> None:
        """x [1, T, dim], which may be overwritten = positions start.. of one slot; only k and v are kept.

        Each query sees what it would have seen stepping alone, had the slot begun at position `origin`. The
        last layer stops at its keys and values.
        """
        steps = x.shape[1]
        angles = rope(self.config, torch.arange(start, start + steps, device=x.device)[None])
        run = rings.chunk(ring, slot, start, steps, origin=origin)
        for index, layer in enumerate(self.layers):
            normed = layer.norm1(x)
            if index == len(self.layers) - 1:
                k, v = layer.self_attn.project_kv(normed, angles)
                rings.store(ring, slot, index, start, k[0].transpose(0, 1), v[0].transpose(0, 1))
                break
            q, k, v = layer.self_attn.project_heads(normed, angles)
            x = ops.finish_layer(x, rings.attend_chunk(ring, index, run, q, k, v), layer.step_weights)
        ring.offset[slot] = start + steps
