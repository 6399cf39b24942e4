"""The language model in plain torch over checkpoint tensors, whole sequences, nothing frozen: for gradients.

Written from the description of the architecture, apart from the engine's and the fine-tuning's own code.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from personaplex.config import CODEBOOKS, LMConfig, TransformerConfig

Weights = dict[str, Tensor]


def temporal(w: Weights, config: LMConfig, tokens: Tensor) -> Tensor:
    """tokens [N, T, 17] -> [N, T, dim] behind the last norm."""
    x = sum((_rows(w[f"emb.{s}.weight"], tokens[..., 1 + s]) for s in range(16)), torch.zeros(()))
    x = x + _rows(w["text_emb.weight"], tokens[..., 0])
    size = config.temporal
    for index in range(size.layers):
        name = f"transformer.layers.{index}"
        qkv = _norm(x, w[f"{name}.norm1.alpha"]) @ w[f"{name}.self_attn.in_proj_weight"].t()
        q, k, v = qkv.unflatten(-1, (3, size.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = _attend(_turned(q, size), _turned(k, size), v)
        x = x + heads.transpose(1, 2).flatten(2) @ w[f"{name}.self_attn.out_proj.weight"].t()
        x = x + _gated(w, f"{name}.gating", _norm(x, w[f"{name}.norm2.alpha"]))
    return _norm(x, w["out_norm.alpha"])


def depth(w: Weights, config: LMConfig, hidden: Tensor, text: Tensor, codes: Tensor) -> Tensor:
    """hidden [M, dim], text [M], codes [M, 8] -> logits [M, 8, card]."""
    size = config.depth
    steps = []
    for k in range(CODEBOOKS):
        table = w[f"depformer_emb.{k - 1}.weight"] if k else w["depformer_text_emb.weight"]
        token = codes[:, k - 1] if k else text
        steps.append(hidden @ w[f"depformer_in.{k}.weight"].t() + _rows(table, token))
    x = torch.stack(steps, 1)  # [M, 8, dim]
    for index in range(size.layers):
        name = f"depformer.layers.{index}"
        into = w[f"{name}.self_attn.in_proj_weight"].unflatten(0, (size.context, -1))[:CODEBOOKS]
        out = w[f"{name}.self_attn.out_proj.weight"].unflatten(0, (size.context, -1))[:CODEBOOKS]
        qkv = torch.einsum("mki,koi->mko", _norm(x, w[f"{name}.norm1.alpha"]), into)
        q, k, v = qkv.unflatten(-1, (3, size.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = _attend(q, k, v).transpose(1, 2).flatten(2)
        x = x + torch.einsum("mki,koi->mko", heads, out)
        normed = _norm(x, w[f"{name}.norm2.alpha"])
        parts = [_gated(w, f"{name}.gating.{k}", normed[:, k]) for k in range(CODEBOOKS)]
        x = x + torch.stack(parts, 1)
    return torch.stack([x[:, k] @ w[f"linears.{k}.weight"].t() for k in range(CODEBOOKS)], 1)


def _rows(table: Tensor, tokens: Tensor) -> Tensor:
    return table[tokens.clamp(min=0)] * (tokens >= 0)[..., None]


def _norm(x: Tensor, alpha: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8) * alpha.flatten()


def _gated(w: Weights, name: str, x: Tensor) -> Tensor:
    a, b = (x @ w[f"{name}.linear_in.weight"].t()).chunk(2, -1)
    return (F.silu(a) * b) @ w[f"{name}.linear_out.weight"].t()


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[..., T, head_dim] each."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def _turned(x: Tensor, size: TransformerConfig) -> Tensor:
    """Rotary positions of x [N, heads, T, head_dim]."""
    half = x.shape[-1] // 2
    speed = size.max_period ** (-torch.arange(half) / half)
    angle = torch.arange(x.shape[-2])[:, None] * speed
    a, b = x[..., ::2], x[..., 1::2]
    turned = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
    return turned.flatten(-2)
