"""Int8 weights."""

from __future__ import annotations

import pytest
import torch
from golden import CONFIG, CPU, GOLDEN, build_lm
from sessions import engine as make_engine
from sessions import speak

from personaplex import sizing
from personaplex.config import EngineConfig
from personaplex.errors import ConfigError
from personaplex.kernels.int8 import Int8Matrix
from personaplex.model.hub import resolve
from personaplex.model.offload import place_quantized, resident_bytes
from personaplex.model.weights import load_model


def test_loaded_as_int8_it_still_speaks() -> None:
    """Every matrix of the temporal layers is int8, its bytes are as planned, and text logits stay close."""
    net = load_model(resolve(str(GOLDEN)), "cpu", torch.float32, weights="int8")
    layers = list(net.lm.transformer.layers)
    for layer in layers:
        for matrix in (*layer.self_attn.inputs, *layer.self_attn.outputs, layer.gating.linear_in.weight):
            assert isinstance(matrix, Int8Matrix)
    planned = sizing.footprint(CONFIG, "float32", weights="int8").weights
    assert resident_bytes(net.lm) + resident_bytes(net.mimi) == planned
    exact = build_lm()
    x = torch.randn(2, CONFIG.lm.temporal.dim, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        hidden = [
            m.transformer.step(x.clone(), m.allocate(2).ring, torch.ones(2).bool()) for m in (exact, net.lm)
        ]
    assert 0 < (hidden[0] - hidden[1]).norm() / hidden[0].norm() < 0.03
    assert speak(make_engine(1, net), 5).shape == (5, 17)


def test_rows_of_an_int8_product_do_not_depend_on_the_batch() -> None:
    lm = build_lm()
    place_quantized(lm, CPU)
    x = torch.randn(5, CONFIG.lm.temporal.dim, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = lm.transformer.step(x.clone(), lm.allocate(5).ring, torch.ones(5).bool())
        for row in range(5):
            alone = lm.transformer.step(x[row : row + 1].clone(), lm.allocate(1).ring, torch.ones(1).bool())
            assert torch.equal(alone, whole[row : row + 1])


def test_int8_and_offloading_exclude_each_other() -> None:
    for wrong in ({"weights": "int8", "offload_slots": 1}, {"weights": "int4"}):
        with pytest.raises(ConfigError):
            load_model(resolve("tiny"), "cpu", torch.float32, **wrong)  # type: ignore[arg-type]
    for wrong in ({"kv": "int4"}, {"voice_memory": "disk"}):
        with pytest.raises(ConfigError):
            EngineConfig(**wrong)  # type: ignore[arg-type]


def test_a_matrix_row_of_zeros_stays_zero() -> None:
    matrix = Int8Matrix.of(torch.zeros(2, 3))
    assert torch.equal(matrix.dequantize(torch.float32), torch.zeros(2, 3))
