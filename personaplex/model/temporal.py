"""The temporal transformer: one position a frame, all 17 streams summed into it."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personaplex.config import TransformerConfig
from personaplex.model import layers
from personaplex.model import ring as rings
from personaplex.model.layers import Array, Attention, GatedFeedForward, RMSNorm, Stack, angles, turned
from personaplex.model.ring import Ring


class TemporalLayer(nn.Module):
    """Pre-norm layer without biases: x + attention(norm1 x), then x + gating(norm2 x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.norm1 = RMSNorm(config.dim)
        self.norm2 = RMSNorm(config.dim)
        self.gating = GatedFeedForward(config.dim, config.hidden)

    def prepare(self) -> None:
        for part in (self.norm1, self.self_attn, self.norm2):
            part.prepare()

    @cached_property
    def arrays(self) -> tuple[Array, ...] | None:
        """The weights, see `layers.host_arrays`."""
        return layers.host_arrays(self.norm1, self.self_attn, self.norm2, self.gating)

    def finish(self, x: Tensor, heads: Tensor) -> Tensor:
        """The rest of the layer, once its heads [N, H, T, head_dim] have read the ring."""
        x = self.self_attn.add_to(x, heads)
        return self.gating.add_to(x, self.norm2(x))


class Temporal(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = Stack(TemporalLayer(config) for _ in range(config.layers))

    def prepare(self) -> None:
        for layer in self.layers:
            layer.prepare()

    def step(self, x: Tensor, ring: Ring, active: Tensor) -> Tensor:
        """x [N, dim], one position a slot, used up -> [N, dim] before the last norm; offsets move for active
        slots.
        """
        turn = angles(self.config, ring.offset[:, None])
        if layers.uses_host_kernels(x) and ring.k_scale is None and self.layers[0].arrays is not None:
            self._step_on_host(x, ring, active, turn)
        else:
            view = rings.window(ring, 1, active)
            for index, layer in enumerate(self.layers):
                qkv = layer.self_attn.project(layer.norm1(x))[:, None]
                x = layer.finish(x, rings.attend(ring, index, qkv, turn, view))
        ring.offset += active
        return x

    def _step_on_host(self, x: Tensor, ring: Ring, active: Tensor, turn: tuple[Tensor, Tensor]) -> None:
        from personaplex.model import host  # only where there is Numba

        keys, values = ring.k.numpy(), ring.v.numpy()
        cos, sin = (part.view(len(x), -1).numpy() for part in turn)
        for index, layer in enumerate(self.layers):
            assert layer.arrays is not None
            host.step_layer(
                x.numpy(), layer.arrays, keys, values, index, ring.offset.numpy(), active.numpy(), cos, sin
            )

    def prefill(self, x: Tensor, ring: Ring, slot: int, start: int) -> None:
        """x [1, T, dim] = positions start.. of one slot, all at once; only keys and values are kept.

        Each query sees what it would have seen stepping alone. The last layer stops at its keys and values.
        """
        steps = x.shape[1]
        turn = angles(self.config, torch.arange(start, start + steps, device=x.device)[None])
        mask = rings.prefill_mask(start, steps, ring.capacity, x.device)
        for index, layer in enumerate(self.layers):
            normed = layer.norm1(x)
            if index == len(self.layers) - 1:
                k, v = layer.self_attn.project_kv(normed, turn)
                rings.store(ring, slot, index, start, k[0].transpose(0, 1), v[0].transpose(0, 1))
                break
            q, k, v = (t.transpose(1, 2) for t in turned(layer.self_attn.project(normed), turn))
            old_k, old_v = rings.past(ring, slot, index, start, k.dtype)
            new_k, new_v = rings.store(ring, slot, index, start, k[0], v[0])
            heads = F.scaled_dot_product_attention(
                q,
                torch.cat([old_k, new_k[None]], 2),
                torch.cat([old_v, new_v[None]], 2),
                attn_mask=mask,
                is_causal=mask is None,
            )
            x = layer.finish(x, heads)
        ring.offset[slot] = start + steps
