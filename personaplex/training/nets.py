"""Networks of the codec in their training form: whole utterances, gradients, the checkpoint's parameter
names.

`Transformer` has the parameters of `MimiTransformer` and computes what it computes frame by frame, as long
as an utterance is shorter than the ring (10 s).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personaplex.config import TransformerConfig
from personaplex.kernels.constants import LAYER_NORM_EPS
from personaplex.kernels.kvring import Rope
from personaplex.kernels.torch_reference import apply_rope
from personaplex.model.self_attention import rope


class CausalConv(nn.Conv1d):
    """Convolution over [N, in, T] that sees the past only: K - S zeros stand before the first column."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.kernel_size[0] - self.stride[0], 0)))


class Projection(nn.Module):
    def __init__(self, inputs: int, outputs: int, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * (scale * inputs**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class SelfAttention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.in_proj_weight = nn.Parameter(torch.randn(3 * config.dim, config.dim) * config.dim**-0.5)
        self.out_proj = Projection(config.dim, config.dim)

    def forward(self, x: Tensor, turn: Rope) -> Tensor:
        """x [N, T, dim] -> [N, T, dim]."""
        config = self.config
        q, k, v = F.linear(x, self.in_proj_weight).unflatten(-1, (3, config.heads, config.head_dim)).unbind(2)
        q, k = apply_rope(q[:, :, None], turn)[:, :, 0], apply_rope(k[:, :, None], turn)[:, :, 0]
        heads = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        merged: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        return merged


class Scale(nn.Module):
    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), start))


class Layer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.norm1 = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.linear1 = Projection(config.dim, config.hidden)
        self.linear2 = Projection(config.hidden, config.dim)
        self.layer_scale_1 = Scale(config.dim, 0.4)
        self.layer_scale_2 = Scale(config.dim, 0.4)

    def forward(self, x: Tensor, turn: Rope) -> Tensor:
        x = x + self.layer_scale_1.scale * self.self_attn(self.norm1(x), turn)
        return x + self.layer_scale_2.scale * self.linear2(F.gelu(self.linear1(self.norm2(x))))


class _Layers(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))


class Transformer(nn.Module):
    """Mimi's transformer over whole utterances."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = _Layers(config)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, T, dim] at 25 Hz -> [N, T, dim]."""
        turn = rope(self.config, torch.arange(x.shape[1], device=x.device)[None])
        for layer in self.transformer.layers:
            x = layer(x, turn)
        return x


class Residual(nn.Module):
    """x + conv1(ELU(conv3(ELU(x)))) over [N, dim, T]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first = CausalConv(dim, dim // 2, 3)
        self.second = CausalConv(dim // 2, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.second(F.elu(self.first(F.elu(x))))
        return x + added
