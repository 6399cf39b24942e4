"""The parity vectors under tests/data/golden and models built from them, for the tests."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from personaplex.config import ModelConfig
from personaplex.model import Model
from personaplex.model.lm import LM
from personaplex.model.mimi import Mimi

GOLDEN = Path(__file__).parent / "data" / "golden"
CONFIG = ModelConfig.from_json(json.loads((GOLDEN / "config.json").read_text()))
CPU = torch.device("cpu")


def arrays(name: str) -> dict[str, Any]:
    """All arrays of one .npz file; small integers come as int64."""
    with np.load(GOLDEN / f"{name}.npz") as data:
        return {k: data[k].astype(np.int64) if data[k].dtype == np.int16 else data[k] for k in data.files}


def build_lm(config: ModelConfig = CONFIG) -> LM:
    lm = LM(config.lm)
    weights = {name: tensor.float() for name, tensor in load_file(GOLDEN / "model.safetensors").items()}
    lm.load_state_dict(weights, strict=True, assign=True)
    lm.prepare()
    return lm


def build_mimi() -> Mimi:
    mimi = Mimi(CONFIG.mimi)
    mimi.load_state_dict(load_file(GOLDEN / "mimi.safetensors"), strict=True, assign=True)
    mimi.prepare()
    return mimi


@functools.cache
def model() -> Model:
    return Model(build_lm(), build_mimi(), CONFIG)


def with_context(config: ModelConfig, context: int) -> ModelConfig:
    temporal = dataclasses.replace(config.lm.temporal, context=context)
    return dataclasses.replace(config, lm=dataclasses.replace(config.lm, temporal=temporal))


def difference(ours: torch.Tensor, theirs: np.ndarray) -> float:
    """Largest absolute difference."""
    assert tuple(ours.shape) == theirs.shape
    return float((ours.double() - torch.from_numpy(theirs).double()).abs().max())
