"""From settings to an engine: what a replica computes with is what was asked for. On the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from deployments import command
from deployments.replica import models
from deployments.settings import Settings
from personaplex import loading, server, sizing
from personaplex.config import FRAME_SIZE, PRESET_7B, PRESET_TINY, EngineConfig
from personaplex.engine.engine import Engine
from personaplex.errors import ConfigError
from personaplex.finetune.adapters import Adapters
from personaplex.finetune.merge import merge
from personaplex.kernels.int8 import Int8Matrix
from personaplex.model.hub import resolve
from personaplex.model.identity import base_of
from personaplex.model.lora import targets, write_adapter
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


def test_more_slots_than_fit_are_refused_with_the_number_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a tensor is read; the number it names is taken, and one more is not."""
    spec = sizing.footprint(PRESET_TINY, "float32")
    room = spec.weights + sizing.HOST_WORKSPACE + EngineConfig.voice_cache * spec.voice + 3 * spec.session
    monkeypatch.setattr(loading, "free_memory", lambda _: room + 1_000)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "load_model", lambda *_: pytest.fail("weights were read"))
        with pytest.raises(ConfigError, match="4 slots do not fit, 3 would"):
            models.load(Settings.load({**TINY, "slots": 4}))
    assert models.load(Settings.load({**TINY, "slots": 3})).engine.slots == 3
    monkeypatch.setattr(loading, "free_memory", lambda _: spec.weights)
    with pytest.raises(ConfigError, match="no slot fits"):
        models.load(Settings.load({**TINY, "slots": 1}))


def resolved(device: str, **spec: Any) -> loading.Resolved:
    """7B where nothing is downloaded and no card is needed: only sizes are asked for."""
    tiny = loading.resolve(loading.ModelSpec("tiny", device="cpu", **spec))
    checkpoint = dataclasses.replace(tiny.checkpoint, config=PRESET_7B)
    return dataclasses.replace(tiny, checkpoint=checkpoint, device=torch.device(device), dtype=torch.bfloat16)


def test_auto_is_what_a_card_holds_and_can_read_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H200 memory decides, on an L40S the time to read the windows, as `python -m k8s slots` says."""
    card = {"memory": 139 * 10**9, "bandwidth": 4.8e12}
    monkeypatch.setattr(loading, "free_memory", lambda _: card["memory"])
    monkeypatch.setattr(loading, "bandwidth", lambda _: card["bandwidth"])
    found, config = resolved("cuda"), EngineConfig()
    large = found.slots(config)
    assert large == found.footprint.slots(card["memory"], voices=config.voice_cache)
    assert resolved("cuda", kv="int8").slots(config) > 1.7 * large
    assert found.slots(EngineConfig(voice_memory="host")) > large
    found.check_memory(EngineConfig(slots=large))
    with pytest.raises(ConfigError, match=f"{large + 1} slots do not fit, {large} would"):
        found.check_memory(EngineConfig(slots=large + 1))
    card |= {"memory": 47 * 10**9, "bandwidth": 864e9}
    assert found.slots(config, live=False) > found.slots(config) == found.footprint.slots_in_time(864e9)
    card["memory"] = 16 * 10**9
    with pytest.raises(ConfigError, match="no slot fits"):
        found.slots(config)


def test_auto_is_for_one_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="python -m k8s slots"):
        Settings.load({"slots": "auto"})
    monkeypatch.setenv("PERSONAPLEX_SLOTS", "auto")
    with pytest.raises(ConfigError, match="python -m k8s slots"):
        Settings.load({})
    with pytest.raises(ConfigError, match="give a number"):
        models.slots_that_fit(Settings.load(TINY))  # on a CPU
    with pytest.raises(ConfigError, match="give a number"):
        models.slots_that_fit(Settings.load({"model": "echo", "slots": 1}))


@pytest.mark.parametrize("asked", [["--slots", "auto"], ["--set", "slots=auto"]])
def test_the_server_puts_a_number_in_the_place_of_auto(
    monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    monkeypatch.setattr(command, "_slots_that_fit", lambda settings: 7 if settings.kv == "int8" else 3)
    assert server._settings(server._parser().parse_args([*asked, "--kv", "int8"])).slots == 7


def test_auto_is_looked_up_in_a_process_of_its_own() -> None:
    """Whose refusal comes through as what it is."""
    with pytest.raises(ConfigError, match="the echo model has no size"):
        command._slots_that_fit(Settings.load({"model": "echo", "slots": 1}))


def test_a_bfloat16_model_speaks_on_a_cpu() -> None:
    """Where no kernel takes the operands torch does the work, sampling included."""
    engine = _engine(dtype="bfloat16", slots=1)
    slot = engine.open(Persona())
    engine.feed(slot, np.zeros(FRAME_SIZE, np.float32))
    assert engine.step()[0].tokens.shape == (17,)


def test_page_cache_does_not_count_as_taken() -> None:
    assert loading._inactive_file("anon 5\ninactive_file 4096\nactive_file 7\n") == 4096


def test_a_replica_with_an_adapter_says_what_one_with_the_merged_checkpoint_says(tmp_path: Path) -> None:
    path = tmp_path / "adapter.safetensors"
    adapters = Adapters(targets(PRESET_TINY.lm), 2, 1.0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.fill_(0.05)
    write_adapter(path, adapters.exported(base_of(resolve("tiny")), {}))
    merge(resolve("tiny", lora=path), tmp_path / "merged")
    said = []
    chosen: list[dict[str, Any]] = [{}, {"lora": path}, {"model": str(tmp_path / "merged")}]
    for one in chosen:
        engine = _engine(slots=1, **one)
        slot = engine.admit(Persona("NATM1", "Be brief."))
        while engine.prefill() != slot:
            pass
        frames = []
        for _ in range(6):
            engine.feed(slot, np.zeros(1920, np.float32))
            frames += [output.tokens.tolist() for output in engine.step()]
        said.append(frames)
    assert said[1] == said[2] != said[0]


def test_an_adapter_needs_weights(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_bytes(b"")
    with pytest.raises(ConfigError, match="lora needs a model with weights, and echo has none"):
        _engine(model="echo", lora=tmp_path / "adapter")
