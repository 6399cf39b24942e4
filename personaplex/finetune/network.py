"""The language model over whole sequences, differentiable in its adapters: logits and losses.

The weights are those of a prepared, frozen model, in its dtype or int8; `engine` steps through the same ones.
A sequence is shorter than the temporal transformer's context, so that attention is plain causal. Of the depth
transformer the agent's eight steps are run, at positions that count. With `checkpointing` a layer keeps its
input alone and is computed again on the way back; depth transformer and text head then work in pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from personaplex.config import AGENT, CODEBOOKS, STREAMS, TEXT_EPAD, TEXT_PAD
from personaplex.finetune.adapters import Adapters
from personaplex.finetune.memory import DEPTH_PIECE, TEXT_PIECE
from personaplex.kernels.constants import RMS_EPS
from personaplex.kernels.kvring import Rope
from personaplex.kernels.torch_reference import apply_rope, rms_norm
from personaplex.model.depth import DepthLayer
from personaplex.model.lm import LM
from personaplex.model.self_attention import rope
from personaplex.model.temporal import TemporalLayer


@dataclass
class Batch:
    """N sequences of T positions; what pads the shorter ones counts nothing.

    `inputs` and `targets` [N, T, 17] int64 are the positions and the ones behind them; `text_weight` [N, T]
    and `audio_weight` [N, T, 8] float32 say what each predicted token counts. Where a voice came as
    `embeddings[i]` [prefix, dim], they are the inputs of the first positions.
    """

    inputs: Tensor
    targets: Tensor
    text_weight: Tensor
    audio_weight: Tensor
    embeddings: list[Tensor | None]

    def to(self, device: torch.device) -> Batch:
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "embeddings"}
        return Batch(**moved, embeddings=self.embeddings)


# What `Network.forward` adds up over a batch, in order.
SUMS = ("text", "audio", "words", "words_right", "words_count", "padding", "padding_count", "semantic",
        "acoustic", "frames")  # fmt: skip


class Network(nn.Module):
    """A frozen `lm` with adapters. Only the adapters are parameters of this module."""

    def __init__(self, lm: LM, adapters: Adapters, checkpointing: bool = False) -> None:
        super().__init__()
        self.adapters, self.checkpointing = adapters, checkpointing
        self.__dict__["lm"] = lm  # no submodule: what looks for parameters is to find the adapters
        self.lm: LM

    def forward(self, batch: Batch) -> Tensor:
        """Sums [len(SUMS)] float32: weighted cross entropies of text and audio, then what is measured."""
        hidden = self.hidden(batch.inputs, batch.embeddings)
        counts = batch.text_weight > 0
        text = self._in_pieces(
            self._text_sums,
            TEXT_PIECE,
            hidden[counts],
            batch.targets[..., 0][counts],
            batch.text_weight[counts],
        )
        counts = (batch.audio_weight > 0).any(-1)
        audio = self._in_pieces(
            self._audio_sums,
            DEPTH_PIECE,
            hidden[counts],
            batch.targets[..., 0][counts],
            batch.targets[..., AGENT][counts],
            batch.audio_weight[counts],
        )
        return torch.cat([text[:1], audio[:1], text[1:], audio[1:]])

    def hidden(self, inputs: Tensor, embeddings: list[Tensor | None]) -> Tensor:
        """inputs [N, T, 17] -> [N, T, dim] behind the last norm."""
        x = self.embed(inputs)
        if any(one is not None for one in embeddings):
            given = [
                row if one is None else torch.cat([one.to(row.device, row.dtype), row[len(one) :]])
                for row, one in zip(x, embeddings, strict=True)
            ]
            x = torch.stack(given)
        turn = rope(self.lm.config.temporal, torch.arange(x.shape[1], device=x.device)[None])
        for index, layer in enumerate(self.lm.transformer.layers):
            x = self._kept(self._temporal_layer, index, layer, x, turn)
        return rms_norm(x, self.lm.out_norm.gain, RMS_EPS)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [..., 17] -> [..., dim]: audio streams summed in order, then text."""
        lm, total = self.lm, None
        for stream, table in enumerate(lm.audio_table.chunk(STREAMS - 1)):
            row = self.adapters.rows(f"emb.{stream}.weight", tokens[..., 1 + stream], table)
            total = row if total is None else total + row
        assert total is not None
        return total + self.adapters.rows("text_emb.weight", tokens[..., 0], lm.text_emb.weight)

    def text_logits(self, hidden: Tensor) -> Tensor:
        return self.adapters.linear("text_linear.weight", hidden, self.lm.text_linear.weight)

    def depth_logits(self, hidden: Tensor, text: Tensor, codes: Tensor) -> Tensor:
        """hidden [M, dim], text [M] and codes [M, 8] of the target position -> logits [8, M, card]."""
        lm, adapters, width = self.lm, self.adapters, self.lm.config.depth.dim
        parts = []
        for step, into in enumerate(lm.depth_inputs.weight[: CODEBOOKS * width].split(width)):
            name = f"depformer_emb.{step - 1}.weight" if step else "depformer_text_emb.weight"
            table = lm.depformer_emb[step - 1] if step else lm.depformer_text_emb
            token = codes[:, step - 1] if step else text
            part = adapters.linear(f"depformer_in.{step}.weight", hidden, into)
            parts.append(part + adapters.rows(name, token, table.weight))
        x = torch.stack(parts)
        for index, layer in enumerate(lm.depformer.layers):
            x = self._depth_layer(index, layer, x)
        return torch.stack(
            [
                adapters.linear(f"linears.{step}.weight", x[step], lm.linears[step].weight)
                for step in range(CODEBOOKS)
            ]
        )

    def _temporal_layer(self, index: int, layer: TemporalLayer, x: Tensor, turn: Rope) -> Tensor:
        """x [N, T, dim] -> the same."""
        name, linear, attention = f"transformer.layers.{index}", self.adapters.linear, layer.self_attn
        normed = rms_norm(x, layer.norm1.gain, RMS_EPS)
        qkv = linear(f"{name}.self_attn.in_proj_weight", normed, attention.inputs[0])
        qkv = qkv.unflatten(-1, (3, attention.heads, attention.head_dim))
        q, k = apply_rope(qkv[:, :, :2], turn).transpose(1, 3).unbind(2)
        heads = F.scaled_dot_product_attention(q, k, qkv[:, :, 2].transpose(1, 2), is_causal=True)
        flat = heads.transpose(1, 2).flatten(2)
        x = x + linear(f"{name}.self_attn.out_proj.weight", flat, attention.outputs[0])
        normed = rms_norm(x, layer.norm2.gain, RMS_EPS)
        wide = linear(f"{name}.gating.linear_in.weight", normed, layer.gating.linear_in.weight)
        a, b = wide.chunk(2, -1)
        return x + linear(f"{name}.gating.linear_out.weight", F.silu(a) * b, layer.gating.linear_out.weight)

    def _depth_layer(self, index: int, layer: DepthLayer, x: Tensor) -> Tensor:
        """x [8, M, dim], each step with its own weights -> the same."""
        name, linear, attention = f"depformer.layers.{index}", self.adapters.linear, layer.self_attn

        def each(y: Tensor, run: Callable[[int, Tensor], Tensor]) -> Tensor:
            return torch.stack([run(step, part) for step, part in enumerate(y)])

        normed = rms_norm(x, layer.norm1.gain, RMS_EPS)
        qkv = each(
            normed, lambda s, y: linear(f"{name}.self_attn.in_proj_weight@{s}", y, attention.inputs[s])
        )
        qkv = qkv.unflatten(-1, (3, attention.heads, attention.head_dim))
        q, k, v = qkv.permute(2, 1, 3, 0, 4)  # each [M, heads, 8, head_dim]
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True).permute(2, 0, 1, 3).flatten(2)
        x = x + each(
            heads, lambda s, y: linear(f"{name}.self_attn.out_proj.weight@{s}", y, attention.outputs[s])
        )
        normed = rms_norm(x, layer.norm2.gain, RMS_EPS)

        def gated(s: int, y: Tensor) -> Tensor:
            gating, key = layer.gating[s], f"{name}.gating.{s}"
            a, b = linear(f"{key}.linear_in.weight", y, gating.linear_in.weight).chunk(2, -1)
            return linear(f"{key}.linear_out.weight", F.silu(a) * b, gating.linear_out.weight)

        return x + each(normed, gated)

    def _text_sums(self, hidden: Tensor, text: Tensor, weight: Tensor) -> Tensor:
        logits = self.text_logits(hidden).float()
        each = F.cross_entropy(logits, text, reduction="none")
        loss, shown = (each * weight).sum(), each.detach()
        padding = (text == TEXT_PAD) | (text == TEXT_EPAD)
        right = (logits.detach().argmax(-1) == text) & ~padding
        measured = [shown[~padding].sum(), right.sum(), (~padding).sum(), shown[padding].sum(), padding.sum()]
        return torch.stack([loss, *(value.to(loss.dtype) for value in measured)])

    def _audio_sums(self, hidden: Tensor, text: Tensor, codes: Tensor, weight: Tensor) -> Tensor:
        logits = self.depth_logits(hidden, text, codes).float()
        each = F.cross_entropy(logits.flatten(0, 1), codes.t().flatten(), reduction="none")
        each = each.view(CODEBOOKS, -1)
        loss, shown = (each * weight.t()).sum(), each.detach() * (weight.t() > 0)
        frames = weight[:, 0].gt(0).sum().to(loss.dtype)
        return torch.stack([loss, shown[0].sum(), shown[1:].sum() / (CODEBOOKS - 1), frames])

    def _in_pieces(self, sums: Callable[..., Tensor], size: int, *parts: Tensor) -> Tensor:
        """`sums` over all rows of `parts`, with checkpointing over so many at a time."""
        if not self._again() or len(parts[0]) <= 1:
            return sums(*parts)
        pieces = zip(*(part.split(size) for part in parts), strict=True)
        return torch.stack([self._kept(sums, *piece) for piece in pieces]).sum(0)

    def _kept(self, run: Callable[..., Tensor], *given: object) -> Tensor:
        if not self._again():
            return run(*given)
        out: Tensor = checkpoint(run, *given, use_reentrant=False)
        return out

    def _again(self) -> bool:
        return self.checkpointing and torch.is_grad_enabled()
