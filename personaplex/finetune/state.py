"""What survives a training process: adapters, optimizer, step and curves in one file, replaced whole.

A process that is killed leaves the checkpoint before; the run goes on from there as if nothing had happened.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from personaplex.errors import CheckpointError
from personaplex.files import replacing
from personaplex.finetune.adapters import Adapters

FILE = "checkpoint.pt"


@dataclass
class State:
    """`step` steps are done; `history` has a row of figures for every one that was reported; `best` is the
    lowest validation loss so far."""

    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None

    def save(self, folder: Path, adapters: Adapters, optimizer: torch.optim.Optimizer) -> None:
        """Raises OSError; the checkpoint before is then still there."""
        content = {
            "adapters": adapters.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": self.step,
            "history": self.history,
            "best": self.best,
        }
        with replacing(folder / FILE) as part, part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(
        cls, folder: Path, adapters: Adapters, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> State:
        """The state of `folder`'s run, and adapters and optimizer as they were then; a new one where there is
        none. Raises CheckpointError for a damaged file."""
        for left in folder.glob(f".{FILE}.*.part"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        path = folder / FILE
        if not path.exists():
            return cls()
        try:
            content: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
            adapters.load_state_dict(content["adapters"])
            optimizer.load_state_dict(content["optimizer"])
            return cls(content["step"], content["history"], content["best"])
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{path} is damaged: delete it to begin again") from error
