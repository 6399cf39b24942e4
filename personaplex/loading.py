"""From a ModelSpec to a warm engine: the one path of the offline command, the server and the tests.

    found = resolve(ModelSpec("7b", kv="int8"))     files, device and dtype; no tensor is read
    loaded = load_engine(found, EngineConfig(slots=8))

More slots than the device's memory holds are refused before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from personaplex import sizing
from personaplex.config import FRAME_SIZE, EngineConfig
from personaplex.engine.engine import Engine
from personaplex.engine.interface import Loaded
from personaplex.errors import CheckpointError, ConfigError, PromptTooLong
from personaplex.kernels import ops
from personaplex.model import Model, hub
from personaplex.model.hub import DEFAULT_REPO, Checkpoint
from personaplex.model.weights import load_model
from personaplex.persona import DEFAULT_VOICE, Persona
from personaplex.sizing import Footprint
from personaplex.text import Tokenizer
from personaplex.voices import VoiceLibrary

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP_FRAMES = 3
SMALL_DIM = 256  # a model narrower than this runs faster on one CPU thread than on several
_PROBE_BYTES = 1 << 28


@dataclass(frozen=True)
class ModelSpec:
    """Which model, from where, and how it is held in memory.

    `name`: 7b (`repo` at `revision` on the Hugging Face hub), talk (small, in packages that bring it), tiny
    (built in, untrained), a directory, or auto: 7b where CUDA and its weights are available, else talk where
    its scores reach `hub.FLOOR`, else tiny. The paths replace single files. `offload` keeps what does not
    fit the GPU in host memory.
    """

    name: str = "auto"
    repo: str = DEFAULT_REPO
    revision: str | None = None
    moshi_weight: Path | None = None
    mimi_weight: Path | None = None
    tokenizer: Path | None = None
    voice_prompt_dir: Path | None = None
    lora: Path | None = None  # an adapter for exactly this language model, codec and tokenizer
    device: str = "auto"
    dtype: str = "auto"
    weights: Literal["auto", "int8"] = "auto"
    kv: Literal["auto", "int8"] = "auto"
    offload: bool = False
    threads: int | None = None  # of a CPU; unset: one for a small model, else torch's choice


@dataclass(frozen=True)
class Resolved:
    """A spec whose files exist here, on a device that exists here."""

    spec: ModelSpec
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype

    @property
    def footprint(self) -> Footprint:
        dtype = str(self.dtype).removeprefix("torch.")
        return sizing.footprint(self.checkpoint.config, dtype, self.spec.weights, self.spec.kv)

    def slots(self, config: EngineConfig, live: bool = True) -> int:
        """`slots=auto`: as many as fit into the device's free memory and, when `live`, its bandwidth.

        Raises ConfigError when not even one fits, and for live sessions on a CPU, whose limit is neither.
        """
        if live and self.device.type != "cuda":
            raise ConfigError("slots=auto counts by a GPU's memory and there is none: give a number of slots")
        memory = free_memory(self.device)
        if memory is None:
            raise ConfigError("slots=auto: this system does not say how much memory is free: give a number")
        found = self._slots(memory, config)
        if live:
            found = min(found, self.footprint.slots_in_time(bandwidth(self.device)))
        if not found:
            raise ConfigError(self._too_small(memory))
        return found

    def _slots(self, memory: int, config: EngineConfig) -> int:
        workspace = sizing.WORKSPACE if self.device.type == "cuda" else sizing.HOST_WORKSPACE
        return self.footprint.slots(memory, sizing.cached_voices(config), workspace)

    def _too_small(self, memory: int) -> str:
        needed = self.footprint.weights + self.footprint.session
        return (
            f"no slot fits: the model and one session need {needed / 1e9:.1f} GB and room to work, "
            f"{memory / 1e9:.1f} GB are free on {self.device}; try weights=int8, kv=int8, voice_memory=host"
        )

    def check_memory(self, config: EngineConfig) -> None:
        """Raises ConfigError for more slots than fit into free memory, with the number that does."""
        memory = free_memory(self.device)
        if memory is None or self.spec.offload:
            return
        fit = self._slots(memory, config)
        if config.slots <= fit:
            return
        if not fit:
            raise ConfigError(self._too_small(memory))
        weights, session = self.footprint.weights / 1e9, self.footprint.session / 1e9
        raise ConfigError(
            f"{config.slots} slots do not fit, {fit} would: {memory / 1e9:.1f} GB are free on {self.device}, "
            f"weights take {weights:.1f}, a session {session:.2f}; kv=int8 and voice_memory=host make room"
        )


@dataclass(frozen=True)
class Parts:
    """What an engine is built of."""

    model: Model
    library: VoiceLibrary
    tokenizer: Tokenizer

    def engine(self, config: EngineConfig) -> Engine:
        return Engine(self.model, self.library, self.tokenizer, config)


def resolve(spec: ModelSpec) -> Resolved:
    """Finds the files, downloading what is missing, and the device.

    Raises ConfigError for a device or dtype that is not available here, CheckpointError for missing files.
    """
    device = choose_device(spec.device)
    return Resolved(spec, _checkpoint(spec, device), device, choose_dtype(spec.dtype, device))


def load_parts(found: Resolved, config: EngineConfig, *, all_voices: bool = False) -> Parts:
    """Reads the weights onto the device. `all_voices` reads every voice file too, so that no session waits
    for a slow or damaged one. Raises ConfigError, CheckpointError."""
    found.check_memory(config)
    checkpoint, spec = found.checkpoint, found.spec
    if found.device.type == "cpu":
        small = checkpoint.config.lm.temporal.dim < SMALL_DIM
        torch.set_num_threads(spec.threads or (1 if small else torch.get_num_threads()))
    tokenizer = Tokenizer(checkpoint.tokenizer, size=checkpoint.config.lm.text_card)
    library = VoiceLibrary(checkpoint.config.lm, checkpoint.voices)
    offload_slots = config.slots if spec.offload else 0
    with ThreadPoolExecutor(1, "voices") as pool:
        verified = pool.submit(library.verify) if all_voices else None
        model = load_model(checkpoint, found.device, found.dtype, offload_slots, spec.weights, spec.kv)
        if verified is not None:
            verified.result()
    if found.device.type == "cuda" and not ops.fixed_shapes(model.lm.delays):
        logger.warning("Triton is not installed: steps run several times slower and without CUDA graphs")
    return Parts(model, library, tokenizer)


def load_engine(found: Resolved, config: EngineConfig) -> Loaded:
    """A warm engine with `config`, whose `kv` the spec decides. Raises ConfigError, CheckpointError."""
    config = dataclasses.replace(config, kv=found.spec.kv)
    parts = load_parts(found, config, all_voices=True)
    loaded = Loaded(parts.engine(config), found.checkpoint.name, parts.library.names())
    warm_up(loaded)
    return loaded


def warm_up(loaded: Loaded) -> None:
    """Runs one short session, which fills caches, loads kernels and prefills the default voice."""
    if not loaded.voices:
        return
    voice = DEFAULT_VOICE if DEFAULT_VOICE in loaded.voices else loaded.voices[0]
    engine, silence = loaded.engine, np.zeros(FRAME_SIZE, np.float32)
    try:
        slot = engine.admit(Persona(voice=voice))
    except PromptTooLong:  # where only short role texts are allowed
        slot = engine.admit(Persona(voice=voice, text_prompt=""))
    while engine.prefill() != slot:
        pass
    for _ in range(WARM_UP_FRAMES):
        engine.feed(slot, silence)
        engine.step()
    engine.close(slot)


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ConfigError for a device this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}: auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {name!r} is not supported: auto, cpu, cuda or cuda:N")
    if device.type == "cpu" and device.index:
        raise ConfigError(f"unknown device {name!r}: auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"this machine has no {name}: try --device cpu")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on CUDA and float32 on a CPU. Raises ConfigError for other names than DTYPES."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _checkpoint(spec: ModelSpec, device: torch.device) -> Checkpoint:
    if spec.name != "auto":
        return _from_hub(spec, spec.name)
    reason = "no CUDA device is there"
    if device.type == "cuda":
        try:
            return _from_hub(spec, "7b")
        except CheckpointError as error:
            reason = str(error)
    if hub.talk_is_good():
        logger.warning("serving the talk model, a toy that knows a few dozen sentences: %s", reason)
        return _from_hub(spec, "talk")
    logger.warning("serving the tiny model, which makes noise and not speech: %s", reason)
    return _from_hub(spec, "tiny")


def _from_hub(spec: ModelSpec, name: str) -> Checkpoint:
    return hub.resolve(
        name,
        hf_repo=spec.repo,
        revision=spec.revision,
        moshi_weight=spec.moshi_weight,
        mimi_weight=spec.mimi_weight,
        tokenizer=spec.tokenizer,
        voice_prompt_dir=spec.voice_prompt_dir,
        lora=spec.lora,
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes free on a GPU, or on this host within its control group; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        used -= _inactive_file((group / "memory.stat").read_text(encoding="ascii"))
    except (OSError, ValueError, StopIteration):  # no limit, or an older kind of control group
        return free
    return min(free, max(0, limit - used))


def _inactive_file(stat: str) -> int:
    """Bytes of page cache that a control group gives back when memory is short."""
    return next(int(line.split()[1]) for line in stat.splitlines() if line.startswith("inactive_file "))


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a CUDA device reads and writes in a large copy, measured now."""
    source = torch.empty(_PROBE_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    del source, target
    torch.cuda.empty_cache()
    return 2 * _PROBE_BYTES / best
