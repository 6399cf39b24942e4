"""Streaming convolutions: each call takes whole frames and the state the last call left.

Modules keep the checkpoint's names. The state of a convolution of kernel K and stride S is its last K - S
input columns; that of a transposed one (K = 2 S throughout this model) is the right half of its last output,
without bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from personaplex.kernels import ops


def commit(target: Tensor, new: Tensor, active: Tensor | None) -> None:
    """target = new for the active slots; active [N] bool, None for all."""
    if active is None:
        target.copy_(new)
    else:
        torch.where(active.view(-1, *[1] * (new.dim() - 1)), new, target, out=target)


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

    def forward(self, x: Tensor, state: Tensor | None, active: Tensor | None) -> Tensor:
        """x [N, in, T] -> [N, out, T / stride]; state [N, in, K - S] is read and updated."""
        if state is not None:
            x = torch.cat([state, x], dim=-1)
            commit(state, x[..., -self.overlap :], active)
        inner = self.conv.conv
        return ops.conv1d(x, inner.weight, inner.bias, self.stride)


class ConvTranspose(nn.Module):
    """Causal transposed convolution with kernel = 2 x stride; weight [in, out, K] under `convtr.convtr`."""

    matrix: Tensor

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.outputs, self.stride = outputs, stride
        self.convtr = _ConvTranspose(nn.ConvTranspose1d(inputs, outputs, 2 * stride, stride))

    def prepare(self) -> None:
        """A transposed convolution with K = 2 S is one matmul whose halves overlap by one step."""
        inner = self.convtr.convtr
        weight = inner.weight.detach()  # [in, out, 2 S]
        self.register_buffer("matrix", weight.reshape(weight.shape[0], -1).t(), persistent=False)
        assert inner.bias is not None
        self.bias = nn.Parameter(inner.bias.detach(), requires_grad=False)
        del self.convtr

    def forward(self, x: Tensor, state: Tensor, active: Tensor | None) -> Tensor:
        """x [N, in, T] -> [N, out, T * stride]; state [N, out, stride] is read and updated."""
        n, _, steps = x.shape
        halves = ops.linear(x.transpose(1, 2), self.matrix).view(n, steps, self.outputs, 2, self.stride)
        now, later = halves.permute(3, 0, 2, 1, 4)  # each [N, out, T, stride]
        carried = torch.cat([state[:, :, None], later[:, :, :-1]], dim=2)
        commit(state, later[:, :, -1], active)
        return (now + carried).reshape(n, self.outputs, steps * self.stride) + self.bias[:, None]


class Downsample(nn.Module):
    """25 Hz -> 12.5 Hz; the two columns before a stream repeat its first column."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = Conv(dim, dim, kernel=4, stride=2, bias=False)

    def forward(self, x: Tensor, state: Tensor, first: Tensor, active: Tensor | None) -> Tensor:
        """x [N, dim, 2 T] -> [N, dim, T]; state [N, dim, 2]; first [N] bool: its stream starts here."""
        padded = torch.where(first[:, None, None], x[..., :1], state)
        joined = torch.cat([padded, x], dim=-1)
        commit(state, joined[..., -2:], active)
        return ops.conv1d(joined, self.conv.conv.conv.weight, None, 2)


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
        commit(state, x[..., -1:], active)
        return out.flatten(2)
