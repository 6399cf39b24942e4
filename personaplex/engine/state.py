"""EngineState: every tensor a tick changes, with a leading slot dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from personaplex.model import Model
from personaplex.model.lm import LMState
from personaplex.model.mimi import MimiState
from personaplex.model.sampling import SamplingState


@dataclass
class EngineState:
    lm: LMState
    mimi: MimiState
    sampling: SamplingState

    @classmethod
    def allocate(cls, model: Model, slots: int, kv: str = "auto") -> EngineState:
        """All memory of `slots` sessions, allocated once; the KV rings dominate.

        `kv`: see EngineConfig.
        """
        return cls(
            lm=model.lm.allocate(slots, torch.int8 if kv == "int8" else None),
            mimi=model.mimi.allocate(slots, model.device),
            sampling=SamplingState.allocate(slots, model.device),
        )

    def rows(self, start: int, stop: int) -> EngineState:
        """The same memory, slots start..stop-1 only."""
        return EngineState(
            self.lm.rows(start, stop), self.mimi.rows(start, stop), self.sampling.rows(start, stop)
        )

    def reset(self, slot: int) -> None:
        """Returns one slot to its initial state."""
        self.lm.reset(slot)
        self.mimi.reset(slot)
