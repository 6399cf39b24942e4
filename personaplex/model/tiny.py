"""The weights of `tiny`: the full architecture at toy size, computed from the tensors' names.

Nothing here is trained. Scales are chosen so that activations stay of order one over a run of any length, the
audio stays quiet, and text tokens come with padding between them, as the real model's do.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from personaplex.config import CODEBOOKS, TEXT_EOS, TEXT_EPAD, TEXT_PAD

# Channel 0 of every position is the same constant: all tables add to it and no layer writes to it. Its column
# in `text_linear` is therefore a bias on the text logits, which the architecture has no other place for.
_CONSTANT = 4.0
_BYTE_PIECES = 256  # of tiny's vocabulary, after the four special ids
_TEXT_BIAS = {"pad": 6.5, "epad": 3.0, "special": -12.0, "byte": -12.0}


def lm_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """float32 weights of the language model for the given names and shapes."""
    return {name: torch.from_numpy(_lm_tensor(name, shape)) for name, shape in shapes.items()}


def mimi_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """float32 weights of the codec for the given names and shapes."""
    return {name: torch.from_numpy(_mimi_tensor(name, shape)) for name, shape in shapes.items()}


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def _normal(name: str, shape: tuple[int, ...], scale: float) -> np.ndarray:
    noise: np.ndarray = _generator(name).standard_normal(shape, dtype=np.float32)
    noise *= np.float32(scale)
    return noise


def _lm_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("alpha"):
        return np.ones(shape, np.float32)
    if name.startswith(("emb.", "text_emb.")):
        streams = 2 * CODEBOOKS + 1
        table = _normal(name, shape, streams**-0.5)
        table[:, 0] = _CONSTANT / streams
        return table
    if name.startswith("depformer_") and "emb" in name:
        return _normal(name, shape, 1.0)
    weight = _normal(name, shape, shape[-1] ** -0.5)
    if name == "text_linear.weight":
        weight *= 2.0
        weight[:, 0] = _text_bias(shape[0]) / 2.0  # the constant is about 2 behind the last norm
    elif name.startswith("linears."):
        weight *= 3.0
    elif name.startswith("transformer.") and ("out_proj" in name or "linear_out" in name):
        weight[0] = 0.0
    return weight


def _text_bias(text_card: int) -> np.ndarray:
    bias = np.zeros(text_card, np.float32)
    bias[: TEXT_PAD + 1 + _BYTE_PIECES] = _TEXT_BIAS["byte"]
    bias[: TEXT_EOS + 1] = _TEXT_BIAS["special"]
    bias[TEXT_EPAD], bias[TEXT_PAD] = _TEXT_BIAS["epad"], _TEXT_BIAS["pad"]
    return bias


def _mimi_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith(("_initialized", "cluster_usage")):
        return np.ones(shape, np.float32)
    if name.endswith("embedding_sum"):
        level = 0 if "rvq_first" in name else int(name.split("layers.")[1].split(".")[0])
        return _normal(name, shape, 0.8 ** min(level, CODEBOOKS))
    if ".norm" in name and name.endswith("weight"):
        return np.ones(shape, np.float32)
    if name.endswith("bias"):
        return _normal(name, shape, 0.02)
    if name.endswith("scale"):
        return np.full(shape, 0.2, np.float32)
    if "convtr" in name:  # [in, out, kernel]: two columns overlap at each output
        return _normal(name, shape, (2 * shape[0] if shape[1] > 1 else 2) ** -0.5)
    weight = _normal(name, shape, float(np.prod(shape[1:])) ** -0.5)
    if name == "encoder.model.0.conv.conv.weight":
        weight *= 8.0  # speech is far below full scale
    elif name == "decoder.model.14.conv.conv.weight":
        weight *= 0.05
    return weight
