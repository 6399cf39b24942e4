"""The depth transformer: the codes of one frame, one after the other, with weights of their own at each step.

Its keys and values live for one frame only. The caller draws the tokens; `DepthPass` holds what is between.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personaplex.config import TransformerConfig
from personaplex.model.layers import Attention, GatedFeedForward, RMSNorm, Stack


class DepthLayer(nn.Module):
    """Pre-norm layer; the norms are shared by all steps, attention and feed-forward are not."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        steps = config.context
        self.self_attn = Attention(config, steps)
        self.norm1 = RMSNorm(config.dim)
        self.norm2 = RMSNorm(config.dim)
        self.gating = Stack(GatedFeedForward(config.dim, config.hidden) for _ in range(steps))

    def prepare(self) -> None:
        for part in (self.norm1, self.self_attn, self.norm2, *self.gating):
            part.prepare()


class Depth(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = Stack(DepthLayer(config) for _ in range(config.layers))

    def prepare(self) -> None:
        for layer in self.layers:
            layer.prepare()


class DepthPass:
    """One frame's walk through the steps."""

    def __init__(self, depth: Depth) -> None:
        self.depth = depth
        self.done = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def step(self, x: Tensor) -> Tensor:
        """x [N, 1, dim] = input of the next step -> [N, 1, dim].

        The ring holds `context` steps and, being full at the last one, no longer shows the first (see
        ring.py).
        """
        step, layers = self.done, self.depth.layers
        skip = 1 if step + 1 == self.depth.config.context else 0
        for index, layer in enumerate(layers):
            q, k, v = layer.self_attn.project(layer.norm1(x), step).transpose(1, 3).unbind(2)
            if step:
                k = torch.cat([self.keys[index], k], dim=2)
                v = torch.cat([self.values[index], v], dim=2)
                self.keys[index], self.values[index] = k, v
            else:
                self.keys.append(k)
                self.values.append(v)
            heads = F.scaled_dot_product_attention(q, k[:, :, skip:], v[:, :, skip:])
            x = x + layer.self_attn.merge(heads, step)
            x = x + layer.gating[step](layer.norm2(x))
        self.done += 1
        return x
