"""CPU offload, for a GPU that cannot hold the whole model: some temporal layers stay in host memory.

Their matrices are pinned there and copied to the device at each use (`kernels.ops.linear`). That transfer is
paid in every frame, so this is meant for the offline command, not for live sessions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from personaplex.errors import CheckpointError
from personaplex.kernels.int8 import Int8Matrix
from personaplex.model.layers import Stack
from personaplex.model.lm import LM
from personaplex.model.quantize import quantize_layer

log = logging.getLogger(__name__)


def place(lm: LM, device: torch.device, budget: int) -> int:
    """Moves at most `budget` bytes of a prepared model from the CPU to `device`; the number of layers left.

    Everything but the temporal layers always moves, then as many of these as fit, in order. Raises
    CheckpointError when not even the former fits.
    """
    layers = list(lm.transformer.layers)
    lm.transformer.layers = Stack([])
    budget -= resident_bytes(lm)
    if budget < 0:
        raise CheckpointError("the GPU is too small for this model even with --cpu-offload: try --device cpu")
    move(lm, device)
    staying = 0
    for layer in layers:
        size = resident_bytes(layer)
        if not staying and size <= budget:
            budget -= size
            move(layer, device)
        else:
            staying += 1
            _pin(layer, device)
    lm.transformer.layers = Stack(layers)
    if staying:
        log.info("%d of %d temporal layers stay in host memory", staying, len(layers))
    return staying


def place_quantized(lm: LM, device: torch.device) -> None:
    """Moves a prepared model from the CPU to `device`, its temporal layers as int8 (see quantize.py).

    Layer by layer, so that the device never holds more than one of them in full.
    """
    for layer in lm.transformer.layers:
        move(layer, device)
        quantize_layer(layer)
    move(lm, device)


def resident_bytes(module: nn.Module) -> int:
    """Bytes of a prepared module's weights."""
    return sum(tensor.nbytes for _, tensor in _tensors(module))


def move(module: nn.Module, device: torch.device) -> None:
    """Moves everything a prepared module reads."""
    for put, tensor in _tensors(module):
        put(tensor.to(device).contiguous() if device.type != "cpu" else tensor)  # the CPU's layout differs
    _forget(module)


def _pin(layer: nn.Module, device: torch.device) -> None:
    """Leaves a layer's matrices in pinned host memory and moves the rest, which is small."""
    for put, tensor in _tensors(layer):
        if tensor.dim() != 2:
            put(tensor.to(device))
        elif device.type == "cuda":
            put(tensor.pin_memory())
    _forget(layer)


def _forget(module: nn.Module) -> None:
    """Drops what layers have cached of the tensors they had."""
    for part in module.modules():
        part.__dict__.pop("step_weights", None)


def _tensors(module: nn.Module) -> list[tuple[Callable[[Tensor], None], Tensor]]:
    """Every tensor a prepared module reads, with a way to replace it.

    `prepare` keeps some as plain attributes and in lists, where torch's own `Module.to` does not look.
    """
    found: list[tuple[Callable[[Tensor], None], Tensor]] = []
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            found.append((partial(_set_parameter, part, name), parameter.detach()))
        for name, buffer in part.named_buffers(recurse=False):
            found.append((partial(setattr, part, name), buffer))
        for name, value in vars(part).items():
            if isinstance(value, Int8Matrix):
                found += [(partial(setattr, value, n), getattr(value, n)) for n in ("codes", "scale")]
            elif isinstance(value, Tensor):
                found.append((partial(setattr, part, name), value))
            elif isinstance(value, list):
                for index, item in enumerate(value):
                    if isinstance(item, Int8Matrix):
                        found += [(partial(setattr, item, n), getattr(item, n)) for n in ("codes", "scale")]
                    elif isinstance(item, Tensor):
                        found.append((partial(value.__setitem__, index), item))
    return found


def _set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=False))
