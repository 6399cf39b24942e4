"""Weights of the temporal transformer as int8: half the bytes of bfloat16, for smaller cards.

Each row of a matrix (one output) is int8 codes times one float32 scale, rounded to nearest; activations keep
their dtype and matmuls sum in float32. What this costs in quality has to be measured on the real weights;
`python -m benchmarks.gpu.checks` measures it on random ones.
"""

from __future__ import annotations

from torch import Tensor, nn

from personaplex.kernels.int8 import Int8Matrix


def quantize_layer(layer: nn.Module) -> None:
    """Replaces the four matrices of one prepared temporal layer, on their device."""
    attention, gating = layer.get_submodule("self_attn"), layer.get_submodule("gating")
    for name in ("inputs", "outputs"):
        setattr(attention, name, [Int8Matrix.of(weight) for weight in getattr(attention, name)])
    for part in ("linear_in", "linear_out"):
        module = gating.get_submodule(part)
        weight = module.weight
        assert isinstance(weight, Tensor)
        del module.weight
        module.__dict__["weight"] = Int8Matrix.of(weight.detach())
    layer.__dict__.pop("step_weights", None)  # cached from the matrices that were
