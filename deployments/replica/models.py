"""From settings to a warm engine. The only file of this package that leads to torch, and only when called."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.fields import SLOTS_LIMIT
from deployments.parts import ReplicaSettings
from personaplex.engine.echo import EchoEngine
from personaplex.engine.interface import Loaded
from personaplex.engine.simulated import SimulatedEngine
from personaplex.engine.steptimes import StepTimes
from personaplex.errors import ConfigError
from personaplex.persona import VOICES

if TYPE_CHECKING:
    from personaplex.loading import Resolved


def load(settings: ReplicaSettings) -> Loaded:
    """Builds and warms the engine that `settings` ask for, in the calling thread.

    Raises ConfigError for settings that cannot be met here, CheckpointError for weights that cannot be had.
    """
    if settings.lora is not None and settings.model in ("echo", "simulated"):
        raise ConfigError(f"lora needs a model with weights, and {settings.model} has none")
    if settings.model == "echo":
        return Loaded(EchoEngine(settings.slots, settings.prompt_tokens), "echo", VOICES)
    if settings.step_times is not None:
        engine = SimulatedEngine(StepTimes.load(settings.step_times), settings.engine_config)
        return Loaded(engine, "simulated", VOICES)
    from personaplex.loading import load_engine  # torch: only where a model runs

    return load_engine(_resolve(settings), settings.engine_config)


def slots_that_fit(settings: ReplicaSettings) -> int:
    """`slots=auto` on this machine. Raises ConfigError when there is no such number, CheckpointError."""
    if settings.model in ("echo", "simulated"):
        raise ConfigError(f"slots=auto: the {settings.model} model has no size: give a number of slots")
    return min(_resolve(settings).slots(settings.engine_config), SLOTS_LIMIT)


def _resolve(settings: ReplicaSettings) -> Resolved:
    from personaplex.loading import ModelSpec, resolve  # torch: only where a model runs

    return resolve(
        ModelSpec(
            name=settings.model,
            repo=settings.hf_repo,
            revision=settings.hf_revision,
            moshi_weight=settings.moshi_weight,
            mimi_weight=settings.mimi_weight,
            tokenizer=settings.tokenizer,
            voice_prompt_dir=settings.voice_prompt_dir,
            lora=settings.lora,
            device=settings.device,
            dtype=settings.dtype,
            weights=settings.weights,
            kv=settings.kv,
            offload=settings.cpu_offload,
            threads=max(1, int(settings.replica_num_cpus)),
        )
    )
