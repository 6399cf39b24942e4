"""From settings to an engine: what a replica computes with is what was asked for. On the CPU."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch

from deployments import models
from deployments.settings import Settings
from personaplex import server
from personaplex.config import FRAME_SIZE, PRESET_7B, EngineConfig
from personaplex.engine.engine import Engine
from personaplex.errors import ConfigError
from personaplex.kernels.int8 import Int8Matrix
from personaplex.model.offload import gpu_budget
from personaplex.persona import Persona

TINY: dict[str, Any] = {"model": "tiny", "device": "cpu", "slots": 2}


def _engine(**settings: Any) -> Engine:
    return cast(Engine, models.load(Settings.load({**TINY, **settings})).engine)


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_weights_and_kv_are_of_the_kind_that_was_set(kind: str) -> None:
    """And the engine speaks, with different tokens in the end: rounding is not nothing."""
    engine = _engine(weights=kind, kv=kind)
    assert (engine._state.lm.ring.k.dtype == torch.int8) == (kind == "int8")
    matrix = engine._model.lm.transformer.layers[0].gating.linear_in.weight
    assert isinstance(matrix, Int8Matrix) == (kind == "int8")
    slot = engine.open(Persona())
    for _ in range(3):
        engine.feed(slot, np.zeros(FRAME_SIZE, np.float32))
        (output,) = engine.step()
        assert np.isfinite(output.pcm).all()
        assert np.abs(output.pcm).max() > 0


def test_every_choice_reaches_the_engine() -> None:
    """A limit below the default role text included, which once kept replicas from starting."""
    settings = Settings(
        slots=3, kv="int8", graphs=False, voice_memory="host", prompt_tokens=7, model="tiny", device="cpu"
    )
    expected = EngineConfig(slots=3, kv="int8", graphs=False, voice_memory="host", prompt_tokens=7)
    assert settings.engine_config == expected
    assert cast(Engine, models.load(settings).engine)._config == expected


def test_int8_weights_leave_nothing_to_offload() -> None:
    with pytest.raises(ConfigError, match="cpu_offload"):
        Settings.load({"weights": "int8", "cpu_offload": True})


def test_flags_of_the_server_are_settings_of_the_same_name() -> None:
    options = server._parser().parse_args(["--kv", "int8", "--weights", "int8", "--slots", "5"])
    settings = server._settings(options)
    assert (settings.kv, settings.weights, settings.slots) == ("int8", "int8", 5)
    with pytest.raises(ConfigError, match="kv"):
        server._settings(server._parser().parse_args(["--kv", "int4"]))


def test_offloading_knows_what_int8_sessions_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 7B, by hand: 32 layers, 3000 positions, 4096 numbers and 32 scales, keys and values."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (24 * 2**30, 24 * 2**30))
    places = 2 * 32 * 3_000
    budgets = {
        kv: gpu_budget(PRESET_7B.lm, 4, torch.device("cpu"), torch.bfloat16, kv) for kv in ("auto", "int8")
    }
    assert budgets["auto"] == 24 * 2**30 - 4 * places * 4_096 * 2 - 2**30
    assert budgets["int8"] == 24 * 2**30 - 4 * places * (4_096 + 32 * 2) - 2**30
