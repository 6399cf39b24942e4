"""SEANet: the convolutional encoder and decoder around Mimi's transformers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from personaplex.config import MimiConfig
from personaplex.model.conv import Conv, ConvTranspose


class Residual(nn.Module):
    """x + conv1(ELU(conv3(ELU(x))))."""

    def __init__(self, dim: int, config: MimiConfig) -> None:
        super().__init__()
        hidden = dim // config.compress
        self.block = nn.ModuleDict(
            {"1": Conv(dim, hidden, config.residual_kernel), "3": Conv(hidden, dim, kernel=1)}
        )

    def prepare(self) -> None:
        for conv in self.block.values():
            cast("Conv", conv).prepare()

    def forward(self, x: Tensor, state: Tensor, active: Tensor | None) -> Tensor:
        inner = self.block["1"](x, state, active, elu=True)
        return x + self.block["3"](inner, None, active, elu=True)


class Seanet(nn.Module):
    """A chain of layers under the checkpoint's indices (ELUs have an index but no weights).

    `conv_state` holds one tensor for each layer that keeps columns between frames, in order.
    """

    def __init__(self, layers: dict[int, nn.Module]) -> None:
        super().__init__()
        self.model = nn.ModuleDict({str(index): layer for index, layer in layers.items()})

    def prepare(self) -> None:
        for layer in self.model.values():
            cast("Conv | ConvTranspose | Residual", layer).prepare()

    def state_shapes(self) -> Iterator[tuple[int, int]]:
        """(channels, columns) of each layer's state."""
        for layer in self.model.values():
            if isinstance(layer, Residual):
                layer = layer.block["1"]
            if isinstance(layer, ConvTranspose):
                yield layer.outputs, layer.stride
            else:
                assert isinstance(layer, Conv)
                yield layer.inputs, layer.overlap

    def reach(self) -> int:
        """Input columns that `conv_state` depends on: older ones have left no trace in it."""
        needed = 0  # columns between two layers, from the last layer up
        for layer in reversed(list(self.model.values())):
            if isinstance(layer, Residual):
                layer = layer.block["1"]
            if isinstance(layer, ConvTranspose):
                needed = -(-needed // layer.stride) + 1
            else:
                assert isinstance(layer, Conv)
                needed = needed * layer.stride + layer.overlap
        return needed

    def forward(self, x: Tensor, conv_state: list[Tensor], active: Tensor | None) -> Tensor:
        """x [N, channels, T] through all layers, with an ELU before every plain layer but the first."""
        for index, (layer, state) in enumerate(zip(self.model.values(), conv_state, strict=True)):
            if isinstance(layer, Residual):
                x = layer(x, state, active)
            else:
                x = layer(x, state, active, elu=index > 0)
        return x


def encoder(config: MimiConfig) -> Seanet:
    """1 channel at 24 kHz -> `dim` channels at 25 Hz."""
    width = config.filters
    layers: dict[int, nn.Module] = {0: Conv(1, width, config.kernel)}
    index = 1
    for ratio in reversed(config.ratios):
        layers[index] = Residual(width, config)
        layers[index + 2] = Conv(width, 2 * width, 2 * ratio, ratio)
        width, index = 2 * width, index + 3
    layers[index + 1] = Conv(width, config.dim, config.last_kernel)
    return Seanet(layers)


def decoder(config: MimiConfig) -> Seanet:
    """`dim` channels at 25 Hz -> 1 channel at 24 kHz."""
    width = config.filters * 2 ** len(config.ratios)
    layers: dict[int, nn.Module] = {0: Conv(config.dim, width, config.kernel)}
    index = 1
    for ratio in config.ratios:
        layers[index + 1] = ConvTranspose(width, width // 2, ratio)
        layers[index + 2] = Residual(width // 2, config)
        width, index = width // 2, index + 3
    layers[index + 1] = Conv(width, 1, config.last_kernel)
    return Seanet(layers)
