"""The network: Mimi, the temporal and the depth transformer. Weights in modules, state in dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from personaplex.config import ModelConfig
from personaplex.model.lm import LM
from personaplex.model.mimi import Mimi


@dataclass(frozen=True)
class Model:
    """Prepared weights on one device, and the configuration they have."""

    lm: LM
    mimi: Mimi
    config: ModelConfig

    @property
    def device(self) -> torch.device:
        return self.lm.device
