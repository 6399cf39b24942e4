"""The language model in its training form: the project's own modules, whole sequences, gradients.

Audio tokens are counted within the training's own card: 0 .. CODES - 1 are codes, SILENCE is the one vector
that prompts hold in place of the other speaker (the silence codes in the agent's streams, the sine codes in
the user's), START the start token; -1 embeds as zeros. `export.py` knows which ids they have in the
checkpoint.

Channel 0 of the depth transformer is a constant that no layer writes to: its column in `linears` is a bias,
by which ids that are never used are ruled out in the exported model.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from personaplex.config import CODEBOOKS, STREAMS, LMConfig, TransformerConfig
from personaplex.kernels.constants import RMS_EPS
from personaplex.kernels.kvring import Rope
from personaplex.kernels.torch_reference import apply_rope
from personaplex.model.depth import DepthLayer
from personaplex.model.lm import LM
from personaplex.model.self_attention import rope
from personaplex.model.temporal import TemporalLayer
from personaplex.training.articulation import CODES

SILENCE, START = CODES, CODES + 1
CARD = CODES + 1  # what can be predicted: codes and silence
CONSTANT = 2.0  # of channel 0 in the depth transformer


def training_config(config: LMConfig) -> LMConfig:
    """The same model with the training's card and the eight depth steps that are used."""
    depth = dataclasses.replace(config.depth, context=CODEBOOKS)
    return dataclasses.replace(config, card=CARD, depth=depth, depth_steps=CODEBOOKS)


class Talker(nn.Module):
    """Both transformers over whole sequences, on the parameters of an `LM` that is not prepared."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.frugal = False  # layers' activations are computed again on the way back, not kept
        self.config = training_config(config)
        self.lm = LM(self.config)
        for parameter in self.lm.parameters():
            parameter.requires_grad_(True)
        self._initialise()
        self.keep_constant()

    @torch.no_grad()
    def _initialise(self) -> None:
        lm = self.lm
        for name, parameter in lm.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(1.0)
            elif name.startswith("emb."):
                parameter.normal_(0, 0.2)
            elif name.startswith("text_emb") or (name.startswith("depformer_") and "emb" in name):
                parameter.normal_(0, 0.5)
            else:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
                if "out_proj" in name or "linear_out" in name:
                    parameter.mul_(0.4)
                if name.startswith("linears"):
                    parameter.mul_(0.3)
        for layer in lm.transformer.layers:
            layer.self_attn.in_proj_weight.stacked = 3  # type: ignore[attr-defined]
        for depth in lm.depformer.layers:
            depth.self_attn.in_proj_weight.stacked = 3 * CODEBOOKS  # type: ignore[attr-defined]
            depth.self_attn.out_proj.weight.stacked = CODEBOOKS  # type: ignore[attr-defined]

    @torch.no_grad()
    def keep_constant(self) -> None:
        """Channel 0 of the depth transformer back to what the class promises; call after each step."""
        lm = self.lm
        for table in (lm.depformer_text_emb, *lm.depformer_emb):
            table.weight[:, 0] = CONSTANT
        for into in lm.depformer_in:
            into.weight[0].zero_()
        for layer in lm.depformer.layers:
            layer.self_attn.out_proj.weight.view(CODEBOOKS, -1, self.config.depth.dim)[:, 0].zero_()
            for gating in layer.gating:
                gating.linear_out.weight[0].zero_()

    def plain(self) -> list[nn.Parameter]:
        """Parameters that are tables or outputs, for which Muon is not meant."""
        lm = self.lm
        tables = [*lm.emb, lm.text_emb, lm.depformer_text_emb, *lm.depformer_emb, lm.text_linear, *lm.linears]
        return [table.weight for table in tables]

    def embed(self, text: Tensor, audio: Tensor) -> Tensor:
        """text [N, T], audio [N, T, 16] -> [N, T, dim]."""
        total = _rows(self.lm.text_emb.weight, text)
        if (audio >= 0).any():
            for stream, table in enumerate(self.lm.emb):
                total = total + _rows(table.weight, audio[..., stream])
        return total

    def temporal(self, text: Tensor, audio: Tensor) -> Tensor:
        """text [N, T], audio [N, T, 16] of the inputs -> hidden [N, T, dim] behind the last norm."""
        x = self.embed(text, audio)
        config = self.config.temporal
        turn = rope(config, torch.arange(text.shape[1], device=text.device)[None])
        for layer in self.lm.transformer.layers:
            if self.frugal and torch.is_grad_enabled():
                x = checkpoint(self._layer, layer, x, turn, use_reentrant=False)
            else:
                x = self._layer(layer, x, turn)
        return _norm(x, self.lm.out_norm.alpha)

    def _layer(self, layer: TemporalLayer, x: Tensor, turn: Rope) -> Tensor:
        config, attention = self.config.temporal, layer.self_attn
        qkv = F.linear(_norm(x, layer.norm1.alpha), attention.in_proj_weight)
        q, k, v = qkv.unflatten(-1, (3, config.heads, config.head_dim)).unbind(2)
        q, k = apply_rope(q[:, :, None], turn)[:, :, 0], apply_rope(k[:, :, None], turn)[:, :, 0]
        heads = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        x = x + F.linear(heads.transpose(1, 2).flatten(2), attention.out_proj.weight)
        a, b = F.linear(_norm(x, layer.norm2.alpha), layer.gating.linear_in.weight).chunk(2, -1)
        return x + F.linear(F.silu(a) * b, layer.gating.linear_out.weight)

    def text_logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.lm.text_linear.weight)

    def depth(self, hidden: Tensor, text: Tensor, codes: Tensor) -> Tensor:
        """hidden [M, dim], text [M] and codes [M, 8] to be predicted after it -> logits [8, M, CARD]."""
        lm, config = self.lm, self.config.depth
        inputs = [_rows(lm.depformer_text_emb.weight, text)]
        inputs += [_rows(table.weight, codes[:, k]) for k, table in enumerate(lm.depformer_emb)]
        into = torch.stack([part.weight for part in lm.depformer_in])
        x = torch.stack(inputs) + torch.matmul(hidden, into.transpose(1, 2))
        for layer in lm.depformer.layers:
            x = self._depth_layer(layer, x, config)
        out = torch.stack([part.weight for part in lm.linears])
        return torch.bmm(x, out.transpose(1, 2))

    def _depth_layer(self, layer: DepthLayer, x: Tensor, config: TransformerConfig) -> Tensor:
        """x [8, M, dim] through one layer, each step by its own weights."""
        attention = layer.self_attn
        into = attention.in_proj_weight.view(CODEBOOKS, 3 * config.dim, config.dim)
        qkv = torch.bmm(_norm(x, layer.norm1.alpha), into.transpose(1, 2))
        q, k, v = qkv.unflatten(-1, (3, config.heads, config.head_dim)).permute(2, 1, 3, 0, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        merged = heads.permute(2, 0, 1, 3).flatten(2)
        out = attention.out_proj.weight.view(CODEBOOKS, config.dim, config.dim)
        x = x + torch.bmm(merged, out.transpose(1, 2))
        wide = torch.stack([gating.linear_in.weight for gating in layer.gating])
        narrow = torch.stack([gating.linear_out.weight for gating in layer.gating])
        a, b = torch.bmm(_norm(x, layer.norm2.alpha), wide.transpose(1, 2)).chunk(2, -1)
        return x + torch.bmm(F.silu(a) * b, narrow.transpose(1, 2))


def delayed(codes: Tensor) -> Tensor:
    """codes [N, T, 8] by frames -> by positions: all but the first level one position later, START before."""
    late = torch.full_like(codes[:, :1, 1:], START)
    return torch.cat([codes[..., :1], torch.cat([late, codes[:, :-1, 1:]], dim=1)], dim=-1)


def streams(agent: Tensor, user: Tensor) -> Tensor:
    """Frames' codes [N, T, 8] twice -> audio inputs [N, T, 16]."""
    audio = torch.cat([delayed(agent), delayed(user)], dim=-1)
    assert audio.shape[-1] == STREAMS - 1
    return audio


def _rows(table: Tensor, tokens: Tensor) -> Tensor:
    return F.embedding(tokens.clamp(min=0), table) * (tokens >= 0)[..., None]


def _norm(x: Tensor, alpha: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), alpha.flatten(), RMS_EPS)
