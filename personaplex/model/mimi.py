"""Mimi, the streaming audio codec: 1920 samples <-> 8 codes a frame, float32 throughout.

`encode` and `decode` take one frame per slot and are independent of each other; each reads and updates its
half of a `MimiState`. `encode_block` and `decode_block` take many frames of one slot in one call and leave
the state that as many steps leave (rounding aside); either way may follow the other at any frame. All slots
run as one batch, on CUDA of fixed shape; on a CPU a session's codes do not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from personaplex.config import MimiConfig, TransformerConfig
from personaplex.kernels import codec_ops
from personaplex.kernels.constants import LAYER_NORM_EPS
from personaplex.kernels.kvring import Rope
from personaplex.model import ring as rings
from personaplex.model import seanet
from personaplex.model.conv import Downsample, Upsample
from personaplex.model.layers import Linear, Stack
from personaplex.model.ring import Ring
from personaplex.model.rvq import SplitQuantizer
from personaplex.model.self_attention import SelfAttention, rope

STEPS = 2  # 25 Hz steps in one frame


@dataclass
class CodecState:
    """One direction of the codec for N slots: columns each convolution keeps, and the transformer's ring."""

    conv_state: list[Tensor]  # [N, channels, columns] each
    resample: Tensor  # [N, dim, 2] before downsampling, [N, dim, 1] before upsampling
    ring: Ring

    def rows(self, start: int, stop: int) -> CodecState:
        """The same memory, slots start..stop-1 only."""
        return CodecState(
            [s[start:stop] for s in self.conv_state], self.resample[start:stop], self.ring.rows(start, stop)
        )

    def reset(self, slot: int) -> None:
        for state in self.conv_state:
            state[slot].zero_()
        self.resample[slot].zero_()
        self.ring.reset(slot)


@dataclass
class MimiState:
    encoder: CodecState
    decoder: CodecState

    def rows(self, start: int, stop: int) -> MimiState:
        return MimiState(self.encoder.rows(start, stop), self.decoder.rows(start, stop))

    def reset(self, slot: int) -> None:
        """Back to the start of a stream, both directions."""
        self.encoder.reset(slot)
        self.decoder.reset(slot)


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim), requires_grad=False)


class MimiLayer(nn.Module):
    """Pre-norm layer: x + s1 * attention(norm1 x), then x + s2 * linear2(gelu(linear1(norm2 x)))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.norm1 = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.norm2 = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.linear1 = Linear(config.dim, config.hidden)
        self.linear2 = Linear(config.hidden, config.dim)
        self.layer_scale_1 = LayerScale(config.dim)
        self.layer_scale_2 = LayerScale(config.dim)

    def prepare(self) -> None:
        self.self_attn.prepare()
        inputs, outputs = self.self_attn.inputs[0], self.self_attn.outputs[0]
        assert isinstance(inputs, Tensor)  # the codec is not quantized
        assert isinstance(outputs, Tensor)
        self.weights = codec_ops.CodecLayerWeights(
            norm1=(self.norm1.weight, self.norm1.bias),
            in_proj=inputs,
            out_proj=outputs,
            scale1=self.layer_scale_1.scale,
            norm2=(self.norm2.weight, self.norm2.bias),
            linear1=self.linear1.weight,
            linear2=self.linear2.weight,
            scale2=self.layer_scale_2.scale,
        )

    def forward(self, x: Tensor, angles: Rope, ring: Ring, layer: int, active: Tensor) -> Tensor:
        return codec_ops.step_codec_layer(x, self.weights, ring, layer, angles, active)

    def prefill(self, x: Tensor, angles: Rope, ring: Ring, layer: int, run: rings.Chunk) -> Tensor:
        q, k, v = self.self_attn.project_heads(self.norm1(x), angles)
        return codec_ops.finish_codec_layer(x, rings.attend_chunk(ring, layer, run, q, k, v), self.weights)


class _Layers(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.layers = Stack(MimiLayer(config) for _ in range(config.layers))


class MimiTransformer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.transformer = _Layers(config)
        self.config = config

    def prepare(self) -> None:
        for layer in self.transformer.layers:
            layer.prepare()

    def forward(self, x: Tensor, ring: Ring, active: Tensor) -> Tensor:
        """x [N, dim, 2] -> [N, dim, 2]; the ring advances by two positions for active slots."""
        angles = rope(self.config, ring.offset[:, None] + torch.arange(STEPS, device=x.device))
        x = x.transpose(1, 2)
        for index, layer in enumerate(self.transformer.layers):
            x = layer(x, angles, ring, index, active)
        ring.offset += STEPS * active
        return x.transpose(1, 2)

    def prefill(self, x: Tensor, ring: Ring, slot: int, start: int) -> Tensor:
        """x [1, dim, T] = positions start.. of one slot, T even -> [1, dim, T]; each as if stepped."""
        steps = x.shape[-1]
        run = rings.chunk(ring, slot, start, steps, call=STEPS)
        angles = rope(self.config, torch.arange(start, start + steps, device=x.device)[None])
        x = x.transpose(1, 2)
        for index, layer in enumerate(self.transformer.layers):
            x = layer.prefill(x, angles, ring, index, run)
        ring.offset[slot] = start + steps
        return x.transpose(1, 2)


class Mimi(nn.Module):
    """The codec's weights, under the checkpoint's names until `prepare()`."""

    def __init__(self, config: MimiConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = seanet.encoder(config)
        self.decoder = seanet.decoder(config)
        self.encoder_transformer = MimiTransformer(config.transformer)
        self.decoder_transformer = MimiTransformer(config.transformer)
        self.downsample = Downsample(config.dim)
        self.upsample = Upsample(config.dim)
        self.quantizer = SplitQuantizer(config)

    def prepare(self) -> None:
        """Derives what the steps read; call once, after the weights are loaded.

        Convolutions of this process keep the whole of float32 from then on: TF32, which CUDA would use for
        them, has 10 bits, and a code is the nearest of 2048 vectors by a margin that may be smaller.
        """
        torch.backends.cudnn.allow_tf32 = False
        self.encoder.prepare()
        self.decoder.prepare()
        self.encoder_transformer.prepare()
        self.decoder_transformer.prepare()
        self.downsample.prepare()
        self.quantizer.prepare()
        self.requires_grad_(False)

    def allocate(self, slots: int, device: torch.device) -> MimiState:
        """State of `slots` streams at their start."""
        return MimiState(
            encoder=self._codec_state(self.encoder, 2, slots, device),
            decoder=self._codec_state(self.decoder, 1, slots, device),
        )

    def _codec_state(self, net: seanet.Seanet, columns: int, slots: int, device: torch.device) -> CodecState:
        return CodecState(
            conv_state=[torch.zeros(slots, *shape, device=device) for shape in net.state_shapes()],
            resample=torch.zeros(slots, self.config.dim, columns, device=device),
            ring=Ring.allocate(self.config.transformer, slots, device, torch.float32),
        )


def encode(mimi: Mimi, state: CodecState, pcm: Tensor, active: Tensor) -> Tensor:
    """pcm [N, 1920] float32, active [N] bool -> codes [N, 8] int64 (undefined for inactive slots)."""
    first = state.ring.offset == 0
    x = mimi.encoder(pcm[:, None], state.conv_state, active)
    x = mimi.encoder_transformer(x, state.ring, active)
    latent = mimi.downsample(x, state.resample, first, active)
    return mimi.quantizer.encode(latent[..., 0])


def decode(mimi: Mimi, state: CodecState, codes: Tensor, active: Tensor) -> Tensor:
    """codes [N, 8] int64, active [N] bool -> pcm [N, 1920] float32, zeros for inactive slots."""
    x = mimi.upsample(mimi.quantizer.decode(codes)[..., None], state.resample, active)
    x = mimi.decoder_transformer(x, state.ring, active)
    return mimi.decoder(x, state.conv_state, active)[:, 0] * active[:, None]


def encode_block(
    mimi: Mimi, state: CodecState, slot: int, start: int, pcm: Tensor, codes_wanted: bool = True
) -> Tensor:
    """pcm [T * 1920] float32: frames start.. of one slot's stream -> codes [T, 8] int64.

    `start` is what the slot's state has taken so far, in frames. Without `codes_wanted` only the state
    advances and the result is empty, [0, 8].
    """
    one = state.rows(slot, slot + 1)
    first = one.ring.offset == 0
    x = mimi.encoder(pcm[None, None], one.conv_state, None)
    x = mimi.encoder_transformer.prefill(x, one.ring, 0, STEPS * start)
    latent = mimi.downsample(x, one.resample, first, None)
    wanted = latent[0].t() if codes_wanted else latent[0, :, :0].t()
    return mimi.quantizer.encode(wanted)


def decode_block(
    mimi: Mimi, state: CodecState, slot: int, start: int, codes: Tensor, pcm_wanted: bool = True
) -> Tensor:
    """codes [T, 8] int64: frames start.. of one slot's stream -> pcm [T * 1920] float32.

    `start` is what the slot's state has taken so far, in frames. Without `pcm_wanted` only the state advances
    and the result is empty: convolutions then run over the few columns their state depends on.
    """
    one = state.rows(slot, slot + 1)
    x = mimi.upsample(mimi.quantizer.decode(codes).t()[None], one.resample, None)
    x = mimi.decoder_transformer.prefill(x, one.ring, 0, STEPS * start)
    if pcm_wanted:
        return mimi.decoder(x, one.conv_state, None)[0, 0]
    mimi.decoder(x[..., -mimi.decoder.reach() :], one.conv_state, None)
    return x.new_empty(0)
