"""From settings to a warm engine. The only file of this package that leads to torch, and only when called."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deployments.settings import Settings
from personaplex.config import FRAME_SIZE
from personaplex.engine.echo import EchoEngine
from personaplex.engine.interface import Stepper
from personaplex.engine.simulated import SimulatedEngine
from personaplex.engine.steptimes import StepTimes
from personaplex.errors import CheckpointError, PromptTooLong
from personaplex.persona import DEFAULT_VOICE, VOICES, Persona

if TYPE_CHECKING:
    from personaplex.model.hub import Checkpoint

logger = logging.getLogger(__name__)

WARM_UP_FRAMES = 3


@dataclass(frozen=True)
class Loaded:
    """An engine that has run, what it is called and the voices it knows."""

    engine: Stepper
    name: str
    voices: Sequence[str]


def load(settings: Settings) -> Loaded:
    """Builds and warms the engine that `settings` ask for, in the calling thread.

    Raises ConfigError for settings that cannot be met here, CheckpointError for weights that cannot be had.
    """
    if settings.model == "echo":
        return Loaded(EchoEngine(settings.slots, settings.prompt_tokens), "echo", VOICES)
    if settings.step_times is not None:
        engine = SimulatedEngine(StepTimes.load(settings.step_times), settings.engine_config)
        return Loaded(engine, "simulated", VOICES)
    loaded = _load_model(settings)
    warm_up(loaded)
    return loaded


def warm_up(loaded: Loaded) -> None:
    """One short session: caches, kernels and the default voice's prompt are paid for before anybody waits."""
    if not loaded.voices:
        return
    voice = DEFAULT_VOICE if DEFAULT_VOICE in loaded.voices else loaded.voices[0]
    engine, silence = loaded.engine, np.zeros(FRAME_SIZE, np.float32)
    try:
        slot = engine.admit(Persona(voice=voice))
    except PromptTooLong:  # where only short role texts may be asked for
        slot = engine.admit(Persona(voice=voice, text_prompt=""))
    while engine.prime() != slot:
        pass
    for _ in range(WARM_UP_FRAMES):
        engine.feed(slot, silence)
        engine.step()
    engine.close(slot)


def _load_model(settings: Settings) -> Loaded:
    import torch

    from personaplex.engine.engine import Engine
    from personaplex.model.weights import load_model
    from personaplex.offline import choose_device, choose_dtype
    from personaplex.text import Tokenizer
    from personaplex.voices import VoiceLibrary

    device = choose_device(settings.device)
    if device.type == "cpu":
        torch.set_num_threads(max(1, int(settings.replica_num_cpus)))
    checkpoint = _checkpoint(settings, on_cuda=device.type == "cuda")
    tokenizer = Tokenizer(checkpoint.tokenizer, size=checkpoint.config.lm.text_card)
    voices = VoiceLibrary(checkpoint.config.lm, checkpoint.voices)
    dtype = choose_dtype(settings.dtype, device)
    offload_slots = settings.slots if settings.cpu_offload else 0
    # The engine's thread opens no voice file, neither now nor for a session: one of them may be slow or bad.
    with ThreadPoolExecutor(1, "voices") as pool:
        verified = pool.submit(voices.verify)
        model = load_model(checkpoint, device, dtype, offload_slots, settings.weights, settings.kv)
        verified.result()
    engine = Engine(model, voices, tokenizer, settings.engine_config)
    return Loaded(engine, checkpoint.name, voices.names())


def _checkpoint(settings: Settings, on_cuda: bool) -> Checkpoint:
    from personaplex.model import hub

    resolve = functools.partial(
        hub.resolve,
        hf_repo=settings.hf_repo,
        revision=settings.hf_revision,
        moshi_weight=settings.moshi_weight,
        mimi_weight=settings.mimi_weight,
        tokenizer=settings.tokenizer,
        voice_prompt_dir=settings.voice_prompt_dir,
    )
    if settings.model != "auto":
        return resolve(settings.model)
    reason = "no CUDA device is there"
    if on_cuda:
        try:
            return resolve("7b")
        except CheckpointError as error:
            reason = str(error)
    logger.warning("serving the tiny model, which makes noise and not speech: %s", reason)
    return resolve("tiny")
