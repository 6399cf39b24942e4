"""Whole models on a GPU: `make gpu` runs these, and the kernels' comparisons, before anything is timed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.gpu import checks
from benchmarks.gpu.setup import make_engine, persona, random_model, talk
from personaplex import sizing
from personaplex.model.offload import resident_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
CUDA = torch.device("cuda")
CONFIG = checks.mid_config()


def test_the_device_says_what_the_cpu_says() -> None:
    found = checks.against_cpu(CUDA)
    assert found["frames_equal"] == found["frames"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_ticks_are_bit_identical_to_eager_ones(dtype: torch.dtype) -> None:
    found = checks.captured_against_eager(random_model(CONFIG, CUDA, dtype), slots=5)
    assert found["captured"] == [1, 2, 4, 5]
    assert found["equal"]


def test_the_same_seeds_say_the_same_again() -> None:
    """Four sampled sessions, twice: no kernel's result depends on timing."""
    model = random_model(CONFIG, CUDA, torch.bfloat16)
    heard = []
    for _ in range(2):
        engine = make_engine(model, 4, voice_frames=20)
        heard.append(talk(engine, [engine.open(persona(index)) for index in range(4)], 20))
    assert (heard[0] == heard[1]).all()


@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_memory_is_as_planned(kv: str) -> None:
    """The allocator rounds each tensor up to 512 bytes, large ones to 2 MiB."""
    context = dataclasses.replace(CONFIG.lm.temporal, context=3_000)
    config = dataclasses.replace(CONFIG, lm=dataclasses.replace(CONFIG.lm, temporal=context))
    model = random_model(config, CUDA, torch.bfloat16)
    planned = sizing.footprint(config, kv=kv)
    assert resident_bytes(model.lm) + resident_bytes(model.mimi) == planned.weights
    before = torch.cuda.memory_allocated()
    engine = make_engine(model, 16, kv=kv, graphs=False)
    taken = torch.cuda.memory_allocated() - before
    assert engine.slots * planned.session <= taken < 1.05 * engine.slots * planned.session + (64 << 20)
