"""The depth transformer: the codes of one frame, one after the other, with weights of their own at each step.

Its keys and values live for one frame only. The caller draws the tokens; `DepthPass` holds what is between.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personaplex.config import TransformerConfig
from personaplex.model import layers
from personaplex.model.layers import Array, Attention, GatedFeedForward, RMSNorm, Stack, linear_add


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
        for part in (self.norm1, self.self_attn, self.norm2):
            part.prepare()

    @cached_property
    def arrays(self) -> list[tuple[Array, ...] | None]:
        """The weights of each step, see `layers.host_arrays`."""
        return [
            layers.host_arrays(self.norm1, self.self_attn, self.norm2, gating, step)
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

    @cached_property
    def on_host(self) -> bool:
        """Whether `host.step_layer` can take all layers."""
        return all(arrays is not None for layer in self.layers for arrays in layer.arrays)


class DepthPass:
    """One frame's walk through the steps."""

    def __init__(self, depth: Depth) -> None:
        self.depth = depth
        self.done = 0
        self.held: list[Tensor] = []  # each layer's keys and values so far, [N, 2, heads, steps, head_dim];
        # on a CPU in float32 all layers', [2, N, layers, heads, context, head_dim]

    def step(self, x: Tensor) -> Tensor:
        """x [N, dim] = input of the next step, used up -> [N, dim]."""
        step = self.done
        if layers.uses_host_kernels(x) and self.depth.on_host:
            return self._step_on_host(x)
        for index, layer in enumerate(self.depth.layers):
            qkv = layer.self_attn.project(layer.norm1(x), step)  # [N, 3, heads, head_dim]
            heads = self._attend_fixed(index, qkv) if layers.uses_kernels(x) else self._attend(index, qkv)
            x = linear_add(x, heads.reshape(x.shape), layer.self_attn.outputs[step])
            x = layer.gating[step].add_to(x, layer.norm2(x))
        self.done += 1
        return x

    def _step_on_host(self, x: Tensor) -> Tensor:
        from personaplex.model import host  # only where there is Numba

        n, config, parts = len(x), self.depth.config, self.depth.layers
        if not self.done:
            shape = (2, n, len(parts), config.heads, config.context, config.head_dim)
            self.held.append(torch.empty(shape))
        keys, values = self.held[0].numpy()
        written, active, unturned = np.full(n, self.done), np.ones(n, np.bool_), np.empty((n, 0), np.float32)
        for index, layer in enumerate(parts):
            arrays = layer.arrays[self.done]
            assert arrays is not None
            host.step_layer(x.numpy(), arrays, keys, values, index, written, active, unturned, unturned)
        self.done += 1
        return x

    def _attend(self, index: int, qkv: Tensor) -> Tensor:
        """Layer `index` of this step, qkv [N, 3, heads, head_dim] -> [N, heads, 1, head_dim].

        The ring holds `context` steps and, being full at the last one, no longer shows the first (ring.py).
        """
        qkv = qkv[..., None, :]
        if self.done:
            self.held[index] = torch.cat([self.held[index], qkv[:, 1:]], dim=3)
        else:
            self.held.append(qkv[:, 1:])
        skip = 1 if self.done + 1 == self.depth.config.context else 0
        k, v = self.held[index][:, :, :, skip:].unbind(1)
        return F.scaled_dot_product_attention(qkv[:, 0], k, v)

    def _attend_fixed(self, index: int, qkv: Tensor) -> Tensor:
        """The same by one kernel, over memory for all steps, [2, N, heads, context, head_dim] a layer."""
        from personaplex.model import attention  # only where there is Triton

        if not self.done:
            n, _, heads, size = qkv.shape
            self.held.append(qkv.new_empty(2, n, heads, self.depth.config.context, size))
        keys, values = self.held[index].unbind(0)
        return attention.attend_step(qkv[:, None], keys, values, self.done)
