"""The language model stepped the reference's way, as the baseline of `benchmarks.engine`.

One session, one position at a time, prompts included; every step runs the depth transformer for all 16
codebooks and attends over every slot of the ring, filled or not, behind a mask. Written for this comparison,
from the same description as the engine and in plain torch; its greedy tokens equal the engine's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from personaplex.config import DELAYS, RING_COLUMNS, STREAMS, LMConfig, Sampling, TransformerConfig

Given = Sequence[int] | None


class RingCache:
    """Keys and values [1, heads, capacity, head_dim] of one layer."""

    def __init__(self, config: TransformerConfig) -> None:
        shape = (1, config.heads, config.context, config.head_dim)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.written = 0

    def add(self, key: Tensor, value: Tensor) -> Tensor:
        """Writes one position; the mask [1, 1, 1, capacity] of what its query may see."""
        capacity, position = self.keys.shape[2], self.written
        self.keys[:, :, position % capacity] = key[:, :, 0]
        self.values[:, :, position % capacity] = value[:, :, 0]
        self.written += 1
        slots = torch.arange(capacity)
        last = self.written % capacity
        delta = slots - last
        labels = torch.where(delta <= 0, self.written + delta, self.written + delta - capacity)
        labels = torch.where(slots >= self.written, -1, labels)
        mask = (labels >= 0) & (labels <= position) & (position - labels < capacity)
        return mask[None, None, None]


class NaiveLM:
    """Weights under the checkpoint's names, and the state of the one session."""

    def __init__(self, weights: dict[str, Tensor], config: LMConfig, sampling: Sampling) -> None:
        self.weights, self.config, self.sampling = weights, config, sampling
        self.rings = [RingCache(config.temporal) for _ in range(config.temporal.layers)]
        self.tokens = torch.full((STREAMS, RING_COLUMNS), -2)
        self.provided = torch.zeros(STREAMS, RING_COLUMNS, dtype=torch.bool)
        self.offset = 0

    @torch.inference_mode()
    def step(self, user: Given = None, agent: Given = None, text: int | None = None) -> Tensor | None:
        """One frame in, the frame before it out: [17], or None for the first two."""
        n, config = self.offset, self.config
        for first, codes in ((1, agent), (9, user)):
            for index, code in enumerate(codes or ()):
                self._give(first + index, n + DELAYS[first + index], code)
        if text is not None:
            self._give(0, n, text)
        for stream, delay in enumerate(DELAYS):
            if n <= delay:
                self._give(stream, n, config.audio_start if stream else config.text_start)
        self.offset += 1
        if n == 0:
            return None
        source, target = (n - 1) % RING_COLUMNS, n % RING_COLUMNS
        hidden, logits = self._temporal(self.tokens[:, source])
        drawn = [self._draw(logits, self.sampling.text_temperature, self.sampling.text_topk)]
        if self.provided[0, target]:
            token = int(self.tokens[0, target])
        else:
            token = drawn[0]
        drawn += self._depth(hidden, token, target)
        self.provided[:, source] = False
        for stream, token in enumerate(drawn):
            if not self.provided[stream, target]:
                self.tokens[stream, target] = token
        if n == 1:
            return None
        columns = [(n - 1 + delay) % RING_COLUMNS for delay in DELAYS]
        return self.tokens[torch.arange(STREAMS), columns]

    def _give(self, stream: int, position: int, token: int) -> None:
        self.tokens[stream, position % RING_COLUMNS] = token
        self.provided[stream, position % RING_COLUMNS] = True

    def _embed(self, name: str, token: int) -> Tensor:
        return self.weights[f"{name}.weight"][token][None, None]

    def _temporal(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [17] -> hidden [1, 1, dim] after the last norm, text logits [text_card]."""
        w, config = self.weights, self.config.temporal
        x = self._embed("emb.0", int(tokens[1]))
        for index in range(1, 16):
            x = x + self._embed(f"emb.{index}", int(tokens[1 + index]))
        x = x + self._embed("text_emb", int(tokens[0]))
        for index, ring in enumerate(self.rings):
            name = f"transformer.layers.{index}"
            q, k, v = self._project(
                x, w[f"{name}.norm1.alpha"], w[f"{name}.self_attn.in_proj_weight"], config
            )
            q, k = _turn(q, ring.written, config), _turn(k, ring.written, config)
            mask = ring.add(k, v)
            heads = F.scaled_dot_product_attention(q, ring.keys, ring.values, mask)
            x = x + F.linear(heads.transpose(1, 2).flatten(2), w[f"{name}.self_attn.out_proj.weight"])
            x = x + self._gated(_norm(x, w[f"{name}.norm2.alpha"]), f"{name}.gating")
        hidden = _norm(x, w["out_norm.alpha"])
        return hidden, F.linear(hidden, w["text_linear.weight"])[0, 0]

    def _depth(self, hidden: Tensor, token: int, target: int) -> list[int]:
        """All 16 codebooks, one after the other, with caches of their own for this frame."""
        w, config = self.weights, self.config.depth
        rings = [RingCache(config) for _ in range(config.layers)]
        drawn = []
        for step in range(config.context):
            table = "depformer_text_emb" if step == 0 else f"depformer_emb.{step - 1}"
            x = F.linear(hidden, w[f"depformer_in.{step}.weight"]) + self._embed(table, token)
            for index, ring in enumerate(rings):
                name = f"depformer.layers.{index}"
                rows = slice(step * 3 * config.dim, (step + 1) * 3 * config.dim)
                weight = w[f"{name}.self_attn.in_proj_weight"][rows]
                q, k, v = self._project(x, w[f"{name}.norm1.alpha"], weight, config)
                mask = ring.add(k, v)
                heads = F.scaled_dot_product_attention(q, ring.keys, ring.values, mask)
                rows = slice(step * config.dim, (step + 1) * config.dim)
                x = x + F.linear(
                    heads.transpose(1, 2).flatten(2), w[f"{name}.self_attn.out_proj.weight"][rows]
                )
                x = x + self._gated(_norm(x, w[f"{name}.norm2.alpha"]), f"{name}.gating.{step}")
            logits = F.linear(x, w[f"linears.{step}.weight"])[0, 0]
            drawn.append(self._draw(logits, self.sampling.audio_temperature, self.sampling.audio_topk))
            token = int(self.tokens[1 + step, target]) if self.provided[1 + step, target] else drawn[-1]
        return drawn

    def _project(self, x: Tensor, alpha: Tensor, weight: Tensor, config: TransformerConfig) -> list[Tensor]:
        """x [1, 1, dim] -> q, k, v, each [1, heads, 1, head_dim]."""
        qkv = F.linear(_norm(x, alpha), weight).view(1, 1, 3, config.heads, config.head_dim)
        return [part.transpose(1, 2) for part in qkv.unbind(2)]

    def _gated(self, x: Tensor, name: str) -> Tensor:
        a, b = F.linear(x, self.weights[f"{name}.linear_in.weight"]).chunk(2, -1)
        return F.linear(F.silu(a) * b, self.weights[f"{name}.linear_out.weight"])

    def _draw(self, logits: Tensor, temperature: float, topk: int) -> int:
        if temperature <= 0:
            return int(logits.argmax())
        probabilities = torch.softmax(logits / temperature, -1)
        kept, tokens = probabilities.topk(topk or len(logits))
        return int(tokens[(kept / torch.empty_like(kept).exponential_(1)).argmax()])


def _norm(x: Tensor, alpha: Tensor) -> Tensor:
    return x * (alpha * torch.rsqrt(1e-8 + x.square().mean(-1, keepdim=True)))


def _turn(x: Tensor, position: int, config: TransformerConfig) -> Tensor:
    """Rotary position of x [1, heads, 1, head_dim]."""
    half = config.head_dim // 2
    angle = position * torch.exp(torch.arange(half) * (-math.log(config.max_period) / half))
    cos, sin = angle.cos(), angle.sin()
    a, b = x.unflatten(-1, (half, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
