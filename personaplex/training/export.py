"""The trained parts as a checkpoint of this project: sizes, names and shapes of its own Mimi and LM.

The ear and the mouth share codebooks without sharing a space: a codebook's vector holds the ear's in its
first part and the mouth's, small, in its second, and either side's projections read one part. Training
counts codes from 0; in the checkpoint each level's block of ids lies clear of the constant codes that
prompts hold.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from personaplex.config import (
    CODEBOOKS,
    SILENCE_CODES,
    SINE_CODES,
    LMConfig,
    MimiConfig,
    ModelConfig,
    TransformerConfig,
)
from personaplex.model.packed import pack
from personaplex.training.ear import STATES

CONFIG = ModelConfig(
    lm=LMConfig(
        temporal=TransformerConfig(dim=256, layers=6, heads=4, hidden=704, context=3_000),
        depth=TransformerConfig(dim=96, layers=2, heads=4, hidden=264, context=16),
        text_card=320,
    ),
    mimi=MimiConfig(
        filters=16,
        dim=256,
        transformer=TransformerConfig(dim=256, layers=6, heads=4, hidden=768, context=250),
        codebook_dim=192,
        codebooks=8,
    ),
)
EAR = dataclasses.replace(
    CONFIG.mimi, transformer=dataclasses.replace(CONFIG.mimi.transformer, layers=3)
)  # as the ear is trained: Mimi has as many layers on both sides, and the ear does with half of the mouth's
_CODES = 64  # of a level, as trained
_EAR = 64  # of a codebook's vector, what the ear reads; the rest is the mouth's
_SMALL = 1e-3  # of the mouth's parts, too little to sway the ear's choice of a code
_FAR = 100.0  # where the ear finds nothing: vectors of ids that are no codes
SHARPNESS = 2.5  # of the logits of codes: how a word sounds is not to be drawn anew each time
_RULED_OUT = -60.0  # logit of ids that are no codes
_TINY_SAMPLE, _TINY_COEFFICIENT = 2.0**-12, 2.0**-16  # ELU is the identity for what is tiny, to -70 dB
_LAYERS = "transformer.transformer.layers."
_EXACT = ("_codebook.embedding_sum",)  # rows of large and of small values


def first_id(level: int) -> int:
    """Id of a level's code 0: the lowest block that holds neither of the level's constant codes."""
    for start in range(0, CONFIG.mimi.bins, _CODES):
        block = range(start, start + _CODES)
        if SILENCE_CODES[level] not in block and SINE_CODES[level] not in block:
            return start
    raise AssertionError("two constants cannot lie in all blocks")


def to_ids(codes: Tensor) -> Tensor:
    """Codes [..., 8] of the agent as trained, silence among them -> ids of the checkpoint."""
    starts = torch.tensor([first_id(level) for level in range(CODEBOOKS)])
    return torch.where(codes == _CODES, torch.tensor(SILENCE_CODES), codes + starts)


def rows(trained: Tensor, level: int, constant: int, fill: Tensor | float = 0.0) -> Tensor:
    """Table of CODES rows, the constant's and perhaps the start token's -> with the checkpoint's ids.

    `fill` is the row of all ids that are never used.
    """
    card = CONFIG.lm.card
    table = torch.zeros(card + (len(trained) > _CODES + 1), trained.shape[1]) + fill
    table[first_id(level) : first_id(level) + _CODES] = trained[:_CODES]
    table[constant] = trained[_CODES]
    if len(trained) > _CODES + 1:
        table[card] = trained[_CODES + 1]
    return table


def lm_tensors(trained: dict[str, Tensor], constant: float) -> dict[str, Tensor]:
    """The language model's tensors from those of the training's `LM`, of eight depth steps.

    `constant` is channel 0 of the depth transformer.
    """
    dim = CONFIG.lm.depth.dim
    still = torch.zeros(dim)
    still[0] = constant
    out = {}
    for name, tensor in trained.items():
        head, _, index = name.removesuffix(".weight").rpartition(".")
        if head == "emb":
            stream = int(index)
            level, user = stream % CODEBOOKS, stream >= CODEBOOKS
            if user and level:  # the model does not look at them
                tensor = torch.zeros_like(tensor)
            out[name] = rows(tensor, level, (SINE_CODES if user else SILENCE_CODES)[level])
        elif head == "depformer_emb":
            out[name] = rows(tensor, int(index), SILENCE_CODES[int(index)], still)
        elif head == "linears":
            ruled_out = torch.zeros(dim)
            ruled_out[0] = _RULED_OUT / constant
            out[name] = rows(SHARPNESS * tensor, int(index), SILENCE_CODES[int(index)], ruled_out)
        else:
            out[name] = tensor
    out["depformer_emb.7.weight"] = still.repeat(CONFIG.lm.card + 1, 1)  # only steps nobody reads have it
    return out


def mimi_tensors(
    ear: dict[str, Tensor], mouth: dict[str, Tensor], basis: Tensor, size: Tensor
) -> dict[str, Tensor]:
    """The codec's tensors.

    basis [coefficients, 960] and size [coefficients], the factor of the mouth's outputs, those of its half
    frames.
    """
    out = {**_encoder(ear), **_decoder(mouth, basis, size), **_quantizer(ear, mouth)}
    for side, trained in (("encoder", ear), ("decoder", mouth)):
        for name, tensor in trained.items():
            if name.startswith(_LAYERS):
                out[f"{side}_{name}"] = tensor
    out |= _idle(ear)
    out["downsample.conv.conv.conv.weight"] = ear["down.weight"]
    out["upsample.convtr.convtr.convtr.weight"] = mouth["taps"][:, None]
    return out


def _idle(ear: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's layers behind the ear's last: they add nothing."""
    out = {}
    for index in range(EAR.transformer.layers, CONFIG.mimi.transformer.layers):
        for name, like in ear.items():
            if name.startswith(f"{_LAYERS}0."):
                part = name.removeprefix(f"{_LAYERS}0.")
                ones = part.startswith("norm") and part.endswith("weight")
                out[f"encoder_{_LAYERS}{index}.{part}"] = torch.full_like(like, float(ones))
    return out


def _quantizer(ear: dict[str, Tensor], mouth: dict[str, Tensor]) -> dict[str, Tensor]:
    width = CONFIG.mimi.codebook_dim
    read = torch.zeros(CONFIG.mimi.dim, width)
    read[:, _EAR:] = mouth["project.weight"] / _SMALL
    out = {}
    for side in ("first", "rest"):
        trained = ear[f"{side}_in.weight"]
        into = torch.zeros(width, trained.shape[1])
        into[: len(trained)] = trained
        out[f"quantizer.rvq_{side}.input_proj.weight"] = into[..., None]
        out[f"quantizer.rvq_{side}.output_proj.weight"] = read[..., None]
    for level in range(CODEBOOKS):
        vectors = torch.zeros(CONFIG.mimi.bins, width)
        vectors[:, 0] = _FAR
        start = first_id(level)
        vectors[start : start + _CODES, _EAR:] = mouth["books"][level][:_CODES] * _SMALL
        if level == 0:
            vectors[start : start + STATES, :_EAR] = torch.eye(_EAR)[:STATES]
            vectors[SILENCE_CODES[0], _EAR:] = mouth["books"][0][_CODES] * _SMALL
        else:
            vectors[start : start + _CODES, :_EAR] = ear["books"][level - 1]
        layer = "rvq_first.vq.layers.0" if level == 0 else f"rvq_rest.vq.layers.{level - 1}"
        out[f"quantizer.{layer}._codebook.embedding_sum"] = vectors
        out[f"quantizer.{layer}._codebook.cluster_usage"] = torch.ones(CONFIG.mimi.bins)
        out[f"quantizer.{layer}._codebook._initialized"] = torch.ones(1)
    return out


def _encoder(ear: dict[str, Tensor]) -> dict[str, Tensor]:
    """Samples side by side down to 200 Hz, then the ear's own layers."""
    out: dict[str, Tensor] = {}
    width = CONFIG.mimi.filters
    weight = torch.zeros(width, 1, CONFIG.mimi.kernel)
    weight[0, 0, -1] = _TINY_SAMPLE
    _put(out, "encoder.model.0", weight)
    held, index = 1, 1  # samples a column holds
    for ratio in tuple(reversed(CONFIG.mimi.ratios))[:2]:
        _identity(out, f"encoder.model.{index}", width)
        weight = torch.zeros(2 * width, width, 2 * ratio)
        for step in range(ratio):
            for sample in range(held):
                weight[held * step + sample, sample, ratio + step] = 1.0
        _put(out, f"encoder.model.{index + 2}", weight)
        held, width, index = held * ratio, 2 * width, index + 3
    _identity(out, f"encoder.model.{index}", width)
    bank = ear["bank.weight"][:, 0]  # [channels, samples]
    spread = torch.zeros(len(bank), width, bank.shape[1] // held)
    spread[:, :held] = bank.view(len(bank), -1, held).transpose(1, 2) / _TINY_SAMPLE
    _put(out, f"encoder.model.{index + 2}", spread, ear["bank.bias"])
    for name, part in ((".block.1", "residual.first"), (".block.3", "residual.second")):
        _put(out, f"encoder.model.{index + 3}{name}", ear[f"{part}.weight"], ear[f"{part}.bias"])
    _put(out, f"encoder.model.{index + 5}", ear["pool.weight"], ear["pool.bias"])
    _put(out, f"encoder.model.{index + 7}", ear["last.weight"], ear["last.bias"])
    return out


def _decoder(mouth: dict[str, Tensor], basis: Tensor, size: Tensor) -> dict[str, Tensor]:
    """The mouth's last layer, the basis as the first transposed convolution, then samples in turn."""
    out: dict[str, Tensor] = {}
    width = 16 * CONFIG.mimi.filters
    scale = size * _TINY_COEFFICIENT
    _put(out, "decoder.model.0", mouth["last.weight"] * scale[:, None, None], mouth["last.bias"] * scale)
    first, *others = CONFIG.mimi.ratios
    held = basis.shape[1] // first
    weight = torch.zeros(width, width // 2, 2 * first)
    shapes = basis * (_TINY_SAMPLE / _TINY_COEFFICIENT)
    weight[:, :held, :first] = shapes.view(width, first, held).transpose(1, 2)
    _put(out, "decoder.model.2", weight, kind="convtr.convtr", outputs=1)
    width, index = width // 2, 3
    for ratio in others:
        _identity(out, f"decoder.model.{index}", width)
        held //= ratio
        weight = torch.zeros(width, width // 2, 2 * ratio)
        for step in range(ratio):
            for sample in range(held):
                weight[held * step + sample, sample, step] = 1.0
        _put(out, f"decoder.model.{index + 2}", weight, kind="convtr.convtr", outputs=1)
        width, index = width // 2, index + 3
    _identity(out, f"decoder.model.{index}", width)
    weight = torch.zeros(1, width, CONFIG.mimi.last_kernel)
    weight[0, 0, -1] = 1 / _TINY_SAMPLE
    _put(out, f"decoder.model.{index + 2}", weight)
    return out


def _put(
    out: dict[str, Tensor],
    name: str,
    weight: Tensor,
    bias: Tensor | None = None,
    kind: str = "conv.conv",
    outputs: int = 0,
) -> None:
    """One layer; without a bias zeros, as many as `weight` has along axis `outputs`."""
    out[f"{name}.{kind}.weight"] = weight
    out[f"{name}.{kind}.bias"] = torch.zeros(weight.shape[outputs]) if bias is None else bias


def _identity(out: dict[str, Tensor], name: str, width: int) -> None:
    """A residual layer that adds nothing."""
    _put(out, f"{name}.block.1", torch.zeros(width // 2, width, 3))
    _put(out, f"{name}.block.3", torch.zeros(width, width // 2, 1))


def config_json() -> dict[str, Any]:
    """What `ModelConfig.from_json` reads back as CONFIG."""
    lm, mimi = CONFIG.lm, CONFIG.mimi
    return {
        "lm": {
            "dim": lm.temporal.dim,
            "num_layers": lm.temporal.layers,
            "num_heads": lm.temporal.heads,
            "hidden_scale": 4.125,
            "context": lm.temporal.context,
            "depformer_dim": lm.depth.dim,
            "depformer_num_layers": lm.depth.layers,
            "depformer_num_heads": lm.depth.heads,
            "card": lm.card,
            "text_card": lm.text_card,
        },
        "mimi": {
            "seanet": {"n_filters": mimi.filters, "dimension": mimi.dim, "ratios": list(mimi.ratios)},
            "transformer": {
                "d_model": mimi.transformer.dim,
                "num_layers": mimi.transformer.layers,
                "num_heads": mimi.transformer.heads,
                "dim_feedforward": mimi.transformer.hidden,
                "context": mimi.transformer.context,
            },
            "quantizer": {"dimension": mimi.codebook_dim, "bins": mimi.bins, "n_q": mimi.codebooks},
        },
    }


def write(folder: Path, lm: dict[str, Tensor], mimi: dict[str, Tensor], tokenizer: bytes) -> None:
    """A model directory that `--model FOLDER` loads; see packed.py."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(), indent=1) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer)
    pack(lm, folder / "model.packed")
    pack(mimi, folder / "mimi.packed", exact=_EXACT)
