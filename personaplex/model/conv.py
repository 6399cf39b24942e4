"""Streaming convolutions: each call takes whole frames and the state the last call left.

Modules keep the checkpoint's names. The state of a convolution of kernel K and stride S is its last K - S
input columns; that of a transposed one (K = 2 S throughout this model) is the right half of its last output,
without bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from personaplex.kernels import codec_ops


class _Conv(nn.Module):
    """One level of names around a convolution, as in the checkpoint."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.conv = conv


class _ConvTranspose(nn.Module):
    def __init__(self, convtr: nn.ConvTranspose1d) -> None:
        super().__init__()
        self.convtr = convtr


class _NestedConvTranspose(nn.Module):
    def __init__(self, convtr: _ConvTranspose) -> None:
        super().__init__()
        self.convtr = convtr


class Conv(nn.Module):
    """Causal convolution; weight [out, in, K] under `conv.conv`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.inputs, self.stride, self.overlap = inputs, stride, kernel - stride
        self.conv = _Conv(nn.Conv1d(inputs, outputs, kernel, stride, bias=bias))

    def prepare(self) -> None:
        inner = self.conv.conv
        self.weights = codec_ops.ConvWeights(inner.weight, inner.bias, self.stride)

    def forward(self, x: Tensor, state: Tensor | None, active: Tensor | None, elu: bool = False) -> Tensor:
        """x [N, in, T] -> [N, out, T / stride]; see `codec_ops.stream_conv`."""
        return codec_ops.stream_conv(x, state, self.weights, active, elu)


class ConvTranspose(nn.Module):
    """Causal transposed convolution with kernel = 2 x stride; weight [in, out, K] under `convtr.convtr`."""

    matrix: Tensor

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.outputs, self.stride = outputs, stride
        self.convtr = _ConvTranspose(nn.ConvTranspose1d(inputs, outputs, 2 * stride, stride))

    def prepare(self) -> None:
        inner = self.convtr.convtr
        weight = inner.weight.detach()  # [in, out, 2 S]
        self.register_buffer("matrix", weight.reshape(weight.shape[0], -1).t(), persistent=False)
        assert inner.bias is not None
        self.bias = nn.Parameter(inner.bias.detach(), requires_grad=False)
        self.weights = codec_ops.TransposedWeights(self.matrix, self.bias, self.stride)
        del self.convtr

    def forward(self, x: Tensor, state: Tensor, active: Tensor | None, elu: bool = False) -> Tensor:
        """x [N, in, T] -> [N, out, T * stride]; see `codec_ops.stream_conv_transposed`."""
        return codec_ops.stream_conv_transposed(x, state, self.weights, active, elu)


class Downsample(nn.Module):
    """25 Hz -> 12.5 Hz; the two columns before a stream repeat its first column."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = Conv(dim, dim, kernel=4, stride=2, bias=False)

    def prepare(self) -> None:
        self.conv.prepare()

    def forward(self, x: Tensor, state: Tensor, first: Tensor, active: Tensor | None) -> Tensor:
        """x [N, dim, 2 T] -> [N, dim, T]; state [N, dim, 2]; first [N] bool: its stream starts here."""
        codec_ops.commit(state, x[..., :1].expand_as(state), first if active is None else first & active)
        return self.conv(x, state, active)


class Upsample(nn.Module):
    """12.5 Hz -> 25 Hz, channel by channel: out[2n + j] = w[j] x[n] + w[2 + j] x[n - 1]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = nn.ConvTranspose1d(dim, dim, 4, 2, groups=dim, bias=False)
        self.convtr = _NestedConvTranspose(_ConvTranspose(inner))

    def forward(self, x: Tensor, state: Tensor, active: Tensor | None) -> Tensor:
        """x [N, dim, T] -> [N, dim, 2 T]; state [N, dim, 1] = the column before."""
        weight = self.convtr.convtr.convtr.weight[:, 0, None]  # [dim, 1, 4]
        before = torch.cat([state, x[..., :-1]], -1) if x.shape[-1] > 1 else state
        out = weight[..., :2] * x[..., None] + weight[..., 2:] * before[..., None]
        codec_ops.commit(state, x[..., -1:], active)
        return out.flatten(2)
