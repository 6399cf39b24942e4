"""Constants of the model and the frozen configurations built from them.

Knows no tensors. Sizes follow NVIDIA's PersonaPlex 7B (`PRESET_7B`); a checkpoint of the same architecture
with other sizes brings its own `config.json`, read by `ModelConfig.from_json`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from personaplex.errors import ConfigError

Pcm = npt.NDArray[np.float32]  # samples in [-1, 1]; one frame is float32 [1920]

SAMPLE_RATE = 24_000
FRAME_SIZE = 1_920  # samples in one frame
FRAME_RATE = 12.5  # frames per second
FRAME_SECONDS = 0.08
BURST_S = 6.0  # seconds of audio that may come, wait or run at once before any of it is lost
REBUILD_AUDIO_S = 20.0  # seconds of a user's sound that a session is rebuilt from
CATCH_UP_RATE = (
    1.05  # times real time, what is heard in the long run: room for a sound card whose clock is fast
)

CODEBOOKS = 8  # Mimi levels used, per speaker
STREAMS = 17  # text, 8 agent codebooks, 8 user codebooks
AGENT = slice(1, 9)
USER = slice(9, 17)
DELAYS = (0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1)
RING_COLUMNS = 4  # token ring: max delay + 3

TEXT_EPAD, TEXT_BOS, TEXT_EOS, TEXT_PAD = 0, 1, 2, 3
ZERO_TOKEN = -1  # embeds as zeros
UNGENERATED = -2  # marks a token-ring cell nothing was written to

SILENCE_CODES = (948, 243, 1178, 546, 1736, 1030, 1978, 2008)  # agent stream during prompts
SINE_CODES = (430, 1268, 381, 1611, 1095, 1495, 56, 472)  # user stream during prompts
SILENCE_FRAMES = 6  # before and after the text prompt


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of one streaming transformer."""

    dim: int
    layers: int
    heads: int
    hidden: int  # feed-forward width (of each half, when gated)
    context: int  # ring capacity in positions
    max_period: float = 10_000.0

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads


@dataclass(frozen=True)
class LMConfig:
    """The 17-stream language model: temporal transformer and depth transformer."""

    temporal: TransformerConfig
    depth: TransformerConfig  # its context is `depth_steps`
    card: int = 2_048
    text_card: int = 32_000
    depth_steps: int = 16

    @property
    def audio_start(self) -> int:
        return self.card

    @property
    def text_start(self) -> int:
        return self.text_card


@dataclass(frozen=True)
class MimiConfig:
    """The audio codec. `ratios` are in decoder order."""

    filters: int
    dim: int
    transformer: TransformerConfig
    codebook_dim: int
    bins: int = 2_048
    codebooks: int = 32  # stored; CODEBOOKS of them are used
    ratios: tuple[int, ...] = (8, 6, 5, 4)
    kernel: int = 7
    residual_kernel: int = 3
    last_kernel: int = 3
    compress: int = 2


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the shapes of a checkpoint."""

    lm: LMConfig
    mimi: MimiConfig

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Reads the `lm` and `mimi` keys of a checkpoint's config.json.

        Raises ConfigError for a missing key, an architecture this project does not implement, and sizes that
        no such model has: modules are built of these before its file is looked at.
        """
        try:
            return cls(lm=_lm_from_json(data["lm"]), mimi=_mimi_from_json(data["mimi"]))
        except KeyError as error:
            raise ConfigError(f"config.json: missing key {error}") from error
        except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"config.json: {error}") from error


def frames_in(seconds: float) -> int:
    """The fewest frames that last `seconds`."""
    return math.ceil(seconds / FRAME_SECONDS - 1e-9)


def gated_hidden(dim: int, feed_forward: int) -> int:
    """Width of one half of a gated feed-forward whose nominal width is `feed_forward`."""
    return max(1, 21 * dim // 8 if feed_forward == 4 * dim else 2 * feed_forward // 3)


_SIZE_LIMIT = 2**16  # many times what the 7B model has
_SIZE_LIMITS = {
    "text_card": 2**20,
    "dim_feedforward": 2**18,
    "depformer_dim_feedforward": 2**18,
    **dict.fromkeys(("num_layers", "depformer_num_layers", "n_q"), 2**8),  # a module or more for each
}
_LONGEST_PERIOD = 1e9


def _lm_from_json(lm: Mapping[str, Any]) -> LMConfig:
    expected = {
        "n_q": 2 * CODEBOOKS,
        "norm": "rms_norm_f32",
        "gating": "silu",
        "positional_embedding": "rope",
    }
    for key, value in expected.items():
        if lm.get(key, value) != value:
            raise ConfigError(f"config.json: lm.{key} is {lm[key]!r}, only {value!r} is implemented")
    if tuple(lm.get("delays", DELAYS)) != DELAYS:
        raise ConfigError(f"config.json: lm.delays must be {list(DELAYS)}")
    dim, depth_dim, scale = _size(lm, "dim"), _size(lm, "depformer_dim"), _number(lm, "hidden_scale", 64)
    given = lm.get("depformer_dim_feedforward")
    depth_ff = _size(lm, "depformer_dim_feedforward") if given else int(scale * depth_dim)
    return LMConfig(
        temporal=_transformer(
            dim=dim,
            layers=_size(lm, "num_layers"),
            heads=_size(lm, "num_heads"),
            hidden=gated_hidden(dim, int(scale * dim)),
            context=_size(lm, "context"),
            max_period=_number(lm, "max_period", _LONGEST_PERIOD, 10_000),
        ),
        depth=_transformer(
            dim=depth_dim,
            layers=_size(lm, "depformer_num_layers"),
            heads=_size(lm, "depformer_num_heads"),
            hidden=gated_hidden(depth_dim, depth_ff),
            context=2 * CODEBOOKS,
        ),
        card=_size(lm, "card"),
        text_card=_size(lm, "text_card"),
    )


def _mimi_from_json(mimi: Mapping[str, Any]) -> MimiConfig:
    seanet, transformer, quantizer = mimi["seanet"], mimi["transformer"], mimi["quantizer"]
    if _size(mimi, "num_codebooks", CODEBOOKS) != CODEBOOKS:
        raise ConfigError(f"config.json: mimi.num_codebooks must be {CODEBOOKS}")
    if _size(seanet, "n_residual_layers", 1) != 1:
        raise ConfigError("config.json: mimi.seanet.n_residual_layers must be 1")
    if list(seanet["ratios"]) != list(MimiConfig.ratios):
        raise ConfigError(f"config.json: mimi.seanet.ratios must be {list(MimiConfig.ratios)}")
    if seanet["dimension"] != transformer["d_model"]:
        raise ConfigError("config.json: mimi.seanet.dimension and mimi.transformer.d_model must be equal")
    return MimiConfig(
        filters=_size(seanet, "n_filters"),
        dim=_size(seanet, "dimension"),
        transformer=_transformer(
            dim=_size(transformer, "d_model"),
            layers=_size(transformer, "num_layers"),
            heads=_size(transformer, "num_heads"),
            hidden=_size(transformer, "dim_feedforward"),
            context=_size(transformer, "context"),
            max_period=_number(transformer, "max_period", _LONGEST_PERIOD, 10_000),
        ),
        codebook_dim=_size(quantizer, "dimension"),
        bins=_size(quantizer, "bins"),
        codebooks=_size(quantizer, "n_q"),
        kernel=_size(seanet, "kernel_size", 7),
        residual_kernel=_size(seanet, "residual_kernel_size", 3),
        last_kernel=_size(seanet, "last_kernel_size", 3),
        compress=_size(seanet, "compress", 2),
    )


def _transformer(**sizes: Any) -> TransformerConfig:
    config = TransformerConfig(**sizes)
    if config.dim % (2 * config.heads):
        raise ConfigError(f"config.json: width {config.dim} does not divide into {config.heads} even heads")
    return config


def _size(section: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = section[key] if default is None else section.get(key, default)
    limit = _SIZE_LIMITS.get(key, _SIZE_LIMIT)
    if type(value) is not int or not 1 <= value <= limit:
        raise ConfigError(f"config.json: {key} must be a whole number from 1 to {limit}")
    return value


def _number(section: Mapping[str, Any], key: str, limit: float, default: float | None = None) -> float:
    value = section[key] if default is None else section.get(key, default)
    if type(value) not in (int, float) or not 0 < value <= limit:
        raise ConfigError(f"config.json: {key} must be a number above 0, {limit:g} at most")
    return float(value)


PRESET_7B = ModelConfig(
    lm=LMConfig(
        temporal=TransformerConfig(dim=4096, layers=32, heads=32, hidden=11_264, context=3_000),
        depth=TransformerConfig(dim=1024, layers=6, heads=16, hidden=2_816, context=16),
    ),
    mimi=MimiConfig(
        filters=64,
        dim=512,
        transformer=TransformerConfig(dim=512, layers=8, heads=8, hidden=2_048, context=250),
        codebook_dim=256,
    ),
)

PRESET_TINY = ModelConfig(
    lm=LMConfig(
        temporal=TransformerConfig(dim=64, layers=2, heads=4, hidden=176, context=3_000),
        depth=TransformerConfig(dim=32, layers=2, heads=2, hidden=88, context=16),
        text_card=512,
    ),
    mimi=MimiConfig(
        filters=4,
        dim=32,
        transformer=TransformerConfig(dim=32, layers=2, heads=2, hidden=64, context=250),
        codebook_dim=8,
    ),
)


@dataclass(frozen=True)
class Sampling:
    """How one session samples its tokens.

    A temperature <= 0 is greedy; top-k 0 samples from the whole vocabulary. A seed is any integer in
    [0, 2**63); the same seed gives the same conversation. Defaults are the reference's.
    """

    text_temperature: float = 0.7
    text_topk: int = 25
    audio_temperature: float = 0.8
    audio_topk: int = 250
    text_seed: int = 0
    audio_seed: int = 0

    def greedy(self) -> Sampling:
        return dataclasses.replace(self, text_temperature=0.0, audio_temperature=0.0)


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and limits of one engine.

    `kv` "int8" keeps the temporal transformer's keys and values as int8: half the memory of a session, and a
    little noise. `voice_memory` "host" keeps cached voices in (pinned) host memory instead of the device's.
    A session is rebuilt from the last `rebuild_windows` windows of each transformer and the last
    `rebuild_audio_s` of the user's sound; a session no longer than that is rebuilt exactly.
    """

    slots: int = 1
    kv: Literal["auto", "int8"] = "auto"
    graphs: bool = True  # on CUDA, replay ticks as captured graphs
    prefill_chunk: int = 256  # prompt positions run between two ticks
    prompt_tokens: int = 1_000  # longest text prompt, in tokens
    voice_cache: int = 32  # voices whose KV prefix is kept
    voice_memory: Literal["device", "host"] = "device"
    rebuilds: int = 16  # sessions that may be rebuilding at once; one more is refused
    rebuild_windows: int = 4
    rebuild_audio_s: float = REBUILD_AUDIO_S
    rebuild_chunk: int = 32  # frames of the codec run between two ticks

    def __post_init__(self) -> None:
        for name in ("rebuilds", "rebuild_windows", "rebuild_chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not FRAME_SECONDS <= self.rebuild_audio_s < math.inf:
            raise ConfigError(f"rebuild_audio_s must be at least one frame, got {self.rebuild_audio_s}")
        if self.slots < 1:
            raise ConfigError(f"slots must be at least 1, got {self.slots}")
        if self.kv not in ("auto", "int8"):
            raise ConfigError(f"kv must be auto or int8, got {self.kv!r}")
        if self.voice_memory not in ("device", "host"):
            raise ConfigError(f"voice_memory must be device or host, got {self.voice_memory!r}")
