"""For a GPU that cannot hold the whole model: part of the temporal layers stays in the host's memory.

Their matrices are pinned there and copied over each time they are used (`layers.linear`), which costs the bus
about a second for 12 to 25 GB: meant for the offline command, not for live sessions. Results do not change.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from personaplex.config import LMConfig
from personaplex.errors import CheckpointError
from personaplex.model.layers import Attention, Linear, Stack
from personaplex.model.lm import LM

log = logging.getLogger(__name__)

_WORKSPACE = 1 << 30  # the codec, activations, one layer in transit


def place(lm: LM, device: torch.device, budget: int) -> int:
    """Moves a prepared model from the CPU to `device`, at most `budget` bytes of it; the layers left behind.

    Everything but the temporal layers always moves, then as many of these as fit, first ones first. Raises
    CheckpointError when not even the former fits.
    """
    layers = list(lm.transformer.layers)
    lm.transformer.layers = Stack([])
    budget -= resident_bytes(lm)
    if budget < 0:
        raise CheckpointError("the GPU is too small for this model even with --cpu-offload: try --device cpu")
    _move(lm, device)
    staying = 0
    for layer in layers:
        size = resident_bytes(layer)
        if not staying and size <= budget:
            budget -= size
            _move(layer, device)
        else:
            staying += 1
            _pin(layer, device)
    lm.transformer.layers = Stack(layers)
    if staying:
        log.info("%d of %d temporal layers stay in host memory", staying, len(layers))
    return staying


def gpu_budget(config: LMConfig, slots: int, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes of `device` that weights may take, beside the key-value rings of `slots` sessions."""
    free, _ = torch.cuda.mem_get_info(device)
    temporal = config.temporal
    ring = 2 * temporal.layers * temporal.dim * temporal.context * dtype.itemsize
    return free - slots * ring - _WORKSPACE


def _matrices(module: nn.Module) -> list[Tensor]:
    """What `prepare` leaves outside of parameters and buffers."""
    attentions = [m for m in module.modules() if isinstance(m, Attention)]
    return [w for attention in attentions for w in (*attention.inputs, *attention.outputs)]


def resident_bytes(module: nn.Module) -> int:
    """Bytes of a prepared module's weights."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers(), *_matrices(module)))


def _move(module: nn.Module, device: torch.device) -> None:
    module.to(device)
    for attention in (m for m in module.modules() if isinstance(m, Attention)):
        attention.inputs = [w.to(device) for w in attention.inputs]
        attention.outputs = [w.to(device) for w in attention.outputs]


def _pin(layer: nn.Module, device: torch.device) -> None:
    """Leaves a layer's matrices on the host, where the device can fetch them; its norms move."""
    for module in layer.modules():
        if isinstance(module, Attention):
            module.inputs = [_pinned(w, device) for w in module.inputs]
            module.outputs = [_pinned(w, device) for w in module.outputs]
        elif isinstance(module, Linear):
            module.weight = nn.Parameter(_pinned(module.weight.detach(), device), requires_grad=False)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.detach().to(device), requires_grad=False))


def _pinned(weight: Tensor, device: torch.device) -> Tensor:
    return weight.pin_memory() if device.type == "cuda" else weight
