"""How many bytes a model and its sessions take on a device, from their sizes alone. Knows no device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from personaplex.config import ModelConfig, TransformerConfig
from personaplex.model.lm import LM
from personaplex.model.mimi import Mimi
from personaplex.model.quantize import temporal_bytes
from personaplex.model.ring import Ring

WORKSPACE = 1_500_000_000  # libraries, graphs, activations: kept free when slots are planned


@dataclass(frozen=True)
class Memory:
    """Bytes: the weights, and what each session adds."""

    weights: int
    session: int

    def sessions(self, available: int) -> int:
        """How many full sessions fit into `available` bytes beside the weights and WORKSPACE."""
        return max(0, (available - self.weights - WORKSPACE) // self.session)


def plan_memory(config: ModelConfig, weights: str = "auto", kv: str = "auto") -> Memory:
    """For a bfloat16 model; `weights` and `kv` may be "int8" (see load_model, EngineConfig)."""
    with torch.device("meta"):
        lm = sum(tensor.numel() for tensor in LM(config.lm).state_dict().values())
        mimi = Mimi(config.mimi)
        codec = sum(tensor.numel() for tensor in mimi.state_dict().values())
        mimi.prepare()
        state = mimi.allocate(1, torch.device("meta"))
    size = 2 * lm + 4 * codec
    if weights == "int8":
        size += temporal_bytes(config.lm, 8) - temporal_bytes(config.lm, 16)
    session = _ring_bytes(config.lm.temporal, torch.int8 if kv == "int8" else torch.bfloat16)
    session += 2 * _ring_bytes(config.mimi.transformer, torch.float32)
    for half in (state.encoder, state.decoder):
        session += half.resample.nbytes + sum(state.nbytes for state in half.conv_state)
    return Memory(size, session)


def _ring_bytes(config: TransformerConfig, kind: torch.dtype) -> int:
    ring = Ring.allocate(config, 1, torch.device("meta"), kind)
    return sum(part.nbytes for part in ring.contents)
