"""The depth transformer: the codes of one frame, one after the other, with weights of their own at each step.

Its keys and values live for one frame only. The caller samples the tokens; `DepthPass` holds the state in
between.
"""

from __future__ import annotations

from functools import cached_property

from torch import Tensor, nn

from personaplex.config import TransformerConfig
from personaplex.kernels import ops
from personaplex.model.layers import GatedFeedForward, RMSNorm, Stack
from personaplex.model.self_attention import SelfAttention, layer_weights


class DepthLayer(nn.Module):
    """Pre-norm layer; the norms are shared by all steps, attention and feed-forward are not."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        steps = config.context
        self.self_attn = SelfAttention(config, steps)
        self.norm1 = RMSNorm(config.dim)
        self.norm2 = RMSNorm(config.dim)
        self.gating = Stack(GatedFeedForward(config.dim, config.hidden) for _ in range(steps))

    def prepare(self) -> None:
        for part in (self.norm1, self.self_attn, self.norm2):
            part.prepare()

    @cached_property
    def step_weights(self) -> list[ops.LayerWeights]:
        """By depth step."""
        return [
            layer_weights(self.norm1, self.self_attn, self.norm2, gating, step)
            for step, gating in enumerate(self.gating)
        ]


class Depth(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = Stack(DepthLayer(config) for _ in range(config.layers))

    def prepare(self) -> None:
        for layer in self.layers:
            layer.prepare()


class DepthPass:
    """The steps of one frame, for N slots."""

    def __init__(self, depth: Depth) -> None:
        self._depth, self._done = depth, 0
        self._cache: Tensor | None = None  # see `ops.step_depth_layers`

    def step(self, x: Tensor) -> Tensor:
        """x [N, dim] = input of the next step, which may be overwritten -> [N, dim]."""
        if self._cache is None:
            size, layers = self._depth.config, len(self._depth.layers)
            self._cache = x.new_empty(layers, 2, len(x), size.heads, size.context, size.head_dim)
        weights = [layer.step_weights[self._done] for layer in self._depth.layers]
        x = ops.step_depth_layers(x, weights, self._cache, self._done)
        self._done += 1
        return x
