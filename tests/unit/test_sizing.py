"""Planned bytes against real allocations, and what follows for known cards."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from golden import CONFIG, build_lm, build_mimi

from personaplex.config import PRESET_7B, PRESET_TINY, EngineConfig, ModelConfig
from personaplex.engine.state import EngineState
from personaplex.model import Model
from personaplex.model.hub import resolve
from personaplex.model.lm import LM
from personaplex.model.mimi import Mimi
from personaplex.model.offload import place_quantized, resident_bytes
from personaplex.model.ring import copy_out
from personaplex.model.weights import load_model
from personaplex.sizing import VOICE_FRAMES, cached_voices, footprint, prefill_flops

GIB = 2**30


def tensors(part: Any) -> list[torch.Tensor]:
    """Every tensor of a tree of dataclasses and lists."""
    if isinstance(part, torch.Tensor):
        return [part]
    if isinstance(part, list | tuple):
        return [tensor for one in part for tensor in tensors(one)]
    if dataclasses.is_dataclass(part):
        return [t for field in dataclasses.fields(part) for t in tensors(getattr(part, field.name))]
    return []


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_session_takes_what_is_planned(dtype: str, kv: str) -> None:
    """To the byte: rings, codec, token ring, sampling; a voice's prefix likewise."""
    net = Model(build_lm().to(getattr(torch, dtype)), build_mimi(), CONFIG)
    state, planned = EngineState.allocate(net, 3, kv), footprint(CONFIG, dtype, kv=kv)
    assert sum(tensor.nbytes for tensor in tensors(state)) == 3 * planned.session
    assert sum(part.nbytes for part in copy_out(state.lm.ring, 0, 7)) == 7 * planned.position
    assert planned.voice == VOICE_FRAMES * planned.position


@pytest.mark.parametrize("weights", ["auto", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_loaded_model_takes_what_is_planned(dtype: str, weights: str) -> None:
    """To the byte, as `load_model` leaves it."""
    net = load_model(resolve("tiny"), "cpu", getattr(torch, dtype), weights=weights)
    planned = footprint(PRESET_TINY, dtype, weights).weights
    assert resident_bytes(net.lm) + resident_bytes(net.mimi) == planned


@pytest.mark.parametrize("weights", ["auto", "int8"])
def test_the_7b_model_takes_what_is_planned(weights: str) -> None:
    """The modules of the real size on the meta device, prepared."""
    with torch.device("meta"):
        lm, mimi = LM(PRESET_7B.lm).bfloat16(), Mimi(PRESET_7B.mimi)
        lm.prepare()
        mimi.prepare()
        if weights == "int8":
            place_quantized(lm, torch.device("meta"))
        state = EngineState.allocate(Model(lm, mimi, PRESET_7B), 1)
    planned = footprint(PRESET_7B, weights=weights)
    assert resident_bytes(lm) + resident_bytes(mimi) == planned.weights
    assert sum(tensor.nbytes for tensor in tensors(state)) == planned.session


def test_other_shapes_are_planned_too() -> None:
    """Sizes that no preset has, so that no factor is right by chance."""
    lm = dataclasses.replace(
        CONFIG.lm,
        temporal=dataclasses.replace(CONFIG.lm.temporal, dim=48, layers=3, heads=4, hidden=56, context=17),
        depth=dataclasses.replace(CONFIG.lm.depth, dim=24, layers=1, heads=3, hidden=40),
        text_card=77,
        card=90,
    )
    mimi = dataclasses.replace(CONFIG.mimi, filters=2, kernel=5, residual_kernel=5, last_kernel=5, bins=33)
    config = ModelConfig(lm, mimi)
    net = Model(LM(lm), Mimi(mimi), config)
    for part in (net.lm, net.mimi):
        for name, tensor in part.state_dict().items():
            tensor.fill_(1.0 if name else 0.0)
        part.prepare()
    planned = footprint(config, "float32")
    assert resident_bytes(net.lm) + resident_bytes(net.mimi) == planned.weights
    assert sum(tensor.nbytes for tensor in tensors(EngineState.allocate(net, 2))) == 2 * planned.session


def test_figures_of_the_7b_model() -> None:
    """From its description: 512 KiB per position, 14.75 GB read per tick, 13.15 GFLOP per prompt position."""
    plain = footprint(PRESET_7B)
    assert plain.position == 512 * 1024
    assert plain.tick_weights == pytest.approx(14.75e9, rel=1e-3)
    assert plain.tick_bytes(2, 10) == plain.tick_weights + 20 * 512 * 1024
    assert plain.tick_bytes(1, 5_000) == plain.tick_bytes(1, 3_000)
    assert prefill_flops(PRESET_7B.lm) == pytest.approx(13.153e9, rel=1e-4)


def test_what_fits_cards() -> None:
    """Of 7B: the cards of 16, 24 and 141 GB."""
    plain, int8 = footprint(PRESET_7B), footprint(PRESET_7B, weights="int8", kv="int8")
    card = {16: int(15.5 * GIB), 24: int(23.5 * GIB), 141: 139 * GIB}
    assert plain.slots(card[16]) == 0
    assert int8.slots(card[16]) >= 4
    assert plain.slots(card[24]) >= 4
    assert plain.slots(card[141]) >= 64
    assert footprint(PRESET_7B, kv="int8").slots(card[141]) >= 128


def test_cached_voices_take_device_memory_only_where_they_are_kept_there() -> None:
    plain = footprint(PRESET_7B)
    assert cached_voices(EngineConfig(voice_memory="host")) == 0
    voices = cached_voices(EngineConfig(voice_cache=16))
    assert voices == 16
    assert plain.slots(80 * GIB, voices) == plain.slots(80 * GIB - 16 * plain.voice)
