"""Bytes of a model and its sessions, and the slots of a card, by arithmetic from ModelConfig. Knows no torch.

`Footprint` counts every tensor that a prepared model and an engine's state allocate; tests hold it against
real allocations. All figures in bytes, bytes per second and seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

from personaplex.config import (
    CODEBOOKS,
    FRAME_SECONDS,
    RING_COLUMNS,
    STREAMS,
    EngineConfig,
    LMConfig,
    MimiConfig,
    ModelConfig,
    TransformerConfig,
)

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
WORKSPACE = 1_500_000_000  # CUDA graphs, libraries, activations: kept free beside weights and sessions
HOST_WORKSPACE = 100_000_000  # the same on a CPU
CONTEXT = 1_500_000_000  # CUDA's own, of a card nothing runs on yet
VOICE_FRAMES = 125  # of a released voice: ten seconds
BANDWIDTH_SHARE = 0.5  # of a card's bandwidth, for a whole tick at its 99th percentile
INT64, FLOAT32, SCALE32, SCALE16 = 8, 4, 4, 2


@dataclass(frozen=True)
class Footprint:
    """What a model takes on one device, and what each session adds."""

    weights: int  # of the prepared model
    session: int  # every tensor of one slot
    position: int  # of these: keys and values of one position of the temporal transformer
    window: int  # keys and values of a full window
    tick_weights: int  # weights that one tick reads

    @property
    def voice(self) -> int:
        """A cached prefix of a released voice."""
        return VOICE_FRAMES * self.position

    def slots(self, memory: int, voices: int = 0, workspace: int = WORKSPACE) -> int:
        """Sessions with full windows that fit into `memory`, beside `voices` cached prefixes."""
        taken = self.weights + workspace + voices * self.voice
        return max(0, (memory - taken) // self.session)

    def slots_in_time(self, bandwidth: float) -> int:
        """Sessions with full windows that a tick can read in one frame at BANDWIDTH_SHARE of `bandwidth`."""
        readable = FRAME_SECONDS * BANDWIDTH_SHARE * bandwidth
        return max(0, int((readable - self.tick_weights) / self.window))

    def tick_bytes(self, slots: int, context: int) -> int:
        """Read by one tick over `slots` sessions with `context` positions each."""
        return self.tick_weights + slots * min(context * self.position, self.window)


def footprint(
    config: ModelConfig, dtype: str = "bfloat16", weights: str = "auto", kv: str = "auto"
) -> Footprint:
    """For weights in `dtype`; `weights` and `kv` "auto" or "int8" as of ModelSpec."""
    lm, element = config.lm, DTYPE_BYTES[dtype]
    temporal = _temporal_bytes(lm.temporal, element, weights == "int8")
    position = _position_bytes(lm.temporal, element, kv == "int8")
    window = lm.temporal.context * position
    return Footprint(
        weights=temporal + _lm_rest(lm, element) + FLOAT32 * _mimi_parameters(config.mimi),
        session=window + _session_rest(config),
        position=position,
        window=window,
        tick_weights=temporal + _tick_rest(lm, element),
    )


def cached_voices(config: EngineConfig) -> int:
    """Voice prefixes an engine may come to hold on its device."""
    return config.voice_cache if config.voice_memory == "device" else 0


def prefill_flops(config: LMConfig) -> int:
    """Floating-point operations per prompt position: twice the temporal transformer's weights."""
    return 2 * _matrices(config.temporal) * config.temporal.layers


def _matrices(config: TransformerConfig) -> int:
    """Weights of one gated layer's matrices."""
    return 4 * config.dim**2 + 3 * config.dim * config.hidden


def _temporal_bytes(config: TransformerConfig, element: int, int8: bool) -> int:
    outputs = 5 * config.dim + 2 * config.hidden  # rows of a layer's matrices, each with a scale
    layer = _matrices(config) + SCALE32 * outputs if int8 else element * _matrices(config)
    return config.layers * layer


def _position_bytes(config: TransformerConfig, element: int, int8: bool) -> int:
    vector = config.head_dim + SCALE16 if int8 else element * config.head_dim
    return 2 * config.layers * config.heads * vector


def _lm_rest(lm: LMConfig, element: int) -> int:
    """All of the language model but the temporal layers' matrices."""
    dim, depth, steps = lm.temporal.dim, lm.depth.dim, lm.depth_steps
    audio_rows, text_rows = lm.card + 2, lm.text_card + 2  # with the start token and the row of zeros
    tables = dim * (2 * CODEBOOKS * audio_rows + text_rows)
    tables += depth * ((steps - 1) * audio_rows + text_rows)
    heads = dim * lm.text_card + _depth_parameters(lm, steps)
    norms = _norms(lm)  # kept as loaded, and as float32 gains
    return element * (tables + heads + norms) + FLOAT32 * norms + INT64 * 2 * STREAMS


def _tick_rest(lm: LMConfig, element: int) -> int:
    """What a tick reads beside the temporal layers: the text head and the agent's depth steps."""
    heads = lm.temporal.dim * lm.text_card + _depth_parameters(lm, CODEBOOKS)
    return element * heads + FLOAT32 * _norms(lm)


def _depth_parameters(lm: LMConfig, steps: int) -> int:
    """Of the first `steps` depth steps: layers, input projections and code heads."""
    return steps * (lm.depth.layers * _matrices(lm.depth) + lm.depth.dim * (lm.temporal.dim + lm.card))


def _norms(lm: LMConfig) -> int:
    return (2 * lm.temporal.layers + 1) * lm.temporal.dim + 2 * lm.depth.layers * lm.depth.dim


def _session_rest(config: ModelConfig) -> int:
    """State of one slot beside the temporal transformer's keys and values."""
    mimi, cells = config.mimi, STREAMS * RING_COLUMNS
    codec = 2 * mimi.transformer.context * _position_bytes(mimi.transformer, FLOAT32, False)
    codec += FLOAT32 * (3 * mimi.dim + sum(channels * columns for channels, columns in conv_states(mimi)))
    offsets = INT64 * 4  # of three rings and the token ring
    sampling = 2 * FLOAT32 + 4 * INT64
    return codec + cells * INT64 + cells + offsets + sampling


def conv_states(config: MimiConfig) -> list[tuple[int, int]]:
    """(channels, columns) that each convolution of encoder and decoder keeps between frames."""
    residual, width = config.residual_kernel - 1, config.filters
    found = [(1, config.kernel - 1)]
    for ratio in reversed(config.ratios):
        found += [(width, residual), (width, ratio)]
        width *= 2
    found += [(width, config.last_kernel - 1), (config.dim, config.kernel - 1)]
    for ratio in config.ratios:
        width //= 2
        found += [(width, ratio), (width, residual)]
    return [*found, (width, config.last_kernel - 1)]


def _mimi_parameters(config: MimiConfig) -> int:
    """Of the prepared codec: what the sums of the codebooks are made into, used levels only."""
    total = 2 * _codec_transformer(config.transformer) + 4 * config.dim * (config.dim + 1)
    total += CODEBOOKS * config.bins * (config.codebook_dim + 1) + 4 * config.codebook_dim * config.dim
    width = config.filters
    total += _conv(1, width, config.kernel)
    for ratio in reversed(config.ratios):
        total += _residual(width, config) + _conv(width, 2 * width, 2 * ratio)
        width *= 2
    total += _conv(width, config.dim, config.last_kernel) + _conv(config.dim, width, config.kernel)
    for ratio in config.ratios:
        width //= 2
        total += 2 * width * width * 2 * ratio + width + _residual(width, config)
    return total + _conv(width, 1, config.last_kernel)


def _codec_transformer(config: TransformerConfig) -> int:
    dim = config.dim
    return config.layers * (4 * dim**2 + 2 * dim * config.hidden + 6 * dim)  # norms and layer scales


def _conv(inputs: int, outputs: int, kernel: int) -> int:
    return outputs * (inputs * kernel + 1)


def _residual(width: int, config: MimiConfig) -> int:
    hidden = width // config.compress
    return _conv(width, hidden, config.residual_kernel) + _conv(hidden, width, 1)
