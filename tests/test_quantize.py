"""Int8 weights and the memory they save."""

from __future__ import annotations

import pytest
import torch
from golden import CONFIG, CPU, GOLDEN, build_lm, build_mimi
from test_engine import engine as make_engine
from test_engine import speak

from personaplex.config import PRESET_7B, EngineConfig
from personaplex.engine.memory import plan_memory
from personaplex.engine.state import EngineState
from personaplex.errors import ConfigError
from personaplex.kernels.int8 import Int8Matrix
from personaplex.model import Model
from personaplex.model.hub import resolve
from personaplex.model.offload import place_quantized, resident_bytes
from personaplex.model.quantize import temporal_bytes
from personaplex.model.weights import load_model


def test_loaded_as_int8_it_still_speaks() -> None:
    """Every matrix of the temporal layers is int8, its bytes are as planned, and text logits stay close."""
    net = load_model(resolve(str(GOLDEN)), "cpu", torch.float32, weights="int8")
    layers = list(net.lm.transformer.layers)
    for layer in layers:
        for matrix in (*layer.self_attn.inputs, *layer.self_attn.outputs, layer.gating.linear_in.weight):
            assert isinstance(matrix, Int8Matrix)
    norms = sum(
        4 * 2 * p.numel() for layer in layers for p in layer.parameters()
    )  # alpha and its float32 copy
    assert sum(resident_bytes(layer) for layer in layers) == temporal_bytes(CONFIG.lm, 8) + norms
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


def test_planned_memory_is_what_is_allocated() -> None:
    net = Model(build_lm().bfloat16(), build_mimi(), CONFIG)
    for kv in ("auto", "int8"):
        state = EngineState.allocate(net, 3, kv)
        rings = (state.lm.ring, state.mimi.encoder.ring, state.mimi.decoder.ring)
        taken = sum(part.nbytes for ring in rings for part in ring.contents)
        for half in (state.mimi.encoder, state.mimi.decoder):
            taken += half.resample.nbytes + sum(kept.nbytes for kept in half.conv_state)
        assert taken == 3 * plan_memory(CONFIG, kv=kv).session


def test_what_fits_cards() -> None:
    """Of 7B: the checkpoint's own size, and the cards of 16, 24 and 141 GB."""
    plain = plan_memory(PRESET_7B)
    assert plain.weights == 16_742_817_792 + 4 * 96_151_393
    assert plan_memory(PRESET_7B, "int8").weights < 10.6e9
    card = {16: 15.5 * 2**30, 24: 23.5 * 2**30, 141: 139 * 2**30}
    assert plain.sessions(int(card[16])) == 0
    assert plan_memory(PRESET_7B, "int8", "int8").sessions(int(card[16])) >= 4
    assert plain.sessions(int(card[24])) >= 4
    assert plain.sessions(int(card[141])) >= 64
    assert plan_memory(PRESET_7B, kv="int8").sessions(int(card[141])) >= 128


def test_a_matrix_row_of_zeros_stays_zero() -> None:
    matrix = Int8Matrix.of(torch.zeros(2, 3))
    assert torch.equal(matrix.dequantize(torch.float32), torch.zeros(2, 3))
