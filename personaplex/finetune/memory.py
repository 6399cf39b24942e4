"""Bytes and operations of a training step by arithmetic, from the model's sizes. Knows no torch.

Counted is what autograd keeps between the two passes with adapters on attention and feed-forward, the frozen
weights, and 16 bytes for each of the adapters' parameters (value, gradient, two moments). Workspace, the
allocator's waste and the samples' KV cache come on top. A test holds the activations against real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from personaplex.config import CODEBOOKS, LMConfig, ModelConfig, TransformerConfig
from personaplex.sizing import DTYPE_BYTES, FLOAT32, footprint

OPTIMIZER_BYTES = 16
TEXT_PIECE, DEPTH_PIECE = 512, 128  # positions worked on at once with checkpointing


@dataclass(frozen=True)
class Step:
    """Bytes of one training step; `flops` floating-point operations of it."""

    weights: int
    adapters: int
    activations: int
    flops: int

    @property
    def total(self) -> int:
        return self.weights + self.adapters + self.activations


def training_step(
    config: ModelConfig,
    positions: int,
    parameters: int,
    *,
    dtype: str = "bfloat16",
    weights: str = "auto",
    checkpointing: bool = False,
) -> Step:
    """A step over `positions` positions, all sequences of a piece together, with so many adapter
    parameters."""
    lm, element = config.lm, DTYPE_BYTES[dtype]
    frozen = footprint(config, dtype, weights).weights
    if checkpointing:
        kept = positions * lm.temporal.dim * element * (lm.temporal.layers + 2)
        kept += positions * lm.temporal.dim * element  # hidden states on their way to the depth transformer
        again = positions * _layer(lm.temporal, element)
        pieces = max(
            min(positions, DEPTH_PIECE) * _depth(lm, element), min(positions, TEXT_PIECE) * _text(lm)
        )
        activations = kept + max(again, pieces)
    else:
        each = lm.temporal.layers * _layer(lm.temporal, element) + _depth(lm, element) + _text(lm)
        activations = positions * each
    passes = 3 if checkpointing else 2  # forward once or twice, and back to the inputs
    return Step(
        weights=frozen,
        adapters=OPTIMIZER_BYTES * parameters,
        activations=activations,
        flops=2 * passes * positions * _matmuls(lm) + 4 * positions * parameters,
    )


def adapter_parameters(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """Of adapters of matrices [rows, columns]."""
    return sum(rank * (rows + columns) for rows, columns in shapes)


def _layer(config: TransformerConfig, element: int) -> int:
    """Kept of one layer and position: inputs of both norms and of four matrices, q, k and v before and behind
    the rotation, heads twice, and the four halves of the feed-forward."""
    wide = 4 if element < FLOAT32 else 0  # what is computed in float32 is kept so too
    return element * (11 * config.dim + 4 * config.hidden) + wide * 4 * config.dim


def _depth(config: LMConfig, element: int) -> int:
    """Kept of the depth transformer's eight steps for one position, with their logits."""
    layers = config.depth.layers * (_layer(config.depth, element) - 2 * element * config.depth.dim)
    return CODEBOOKS * (layers + config.card * FLOAT32)


def _text(config: LMConfig) -> int:
    """Kept of the text head for one position: log probabilities."""
    return config.text_card * FLOAT32


def _matmuls(config: LMConfig) -> int:
    """Weights that one position passes."""
    temporal = config.temporal.layers * _matrices(config.temporal)
    depth = CODEBOOKS * (config.depth.layers * _matrices(config.depth) + config.depth.dim * config.card)
    return temporal + depth + CODEBOOKS * config.depth.dim * config.temporal.dim + _head(config)


def _matrices(config: TransformerConfig) -> int:
    return 4 * config.dim**2 + 3 * config.dim * config.hidden


def _head(config: LMConfig) -> int:
    return config.temporal.dim * config.text_card
