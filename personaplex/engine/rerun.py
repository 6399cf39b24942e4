"""A slot run again on the user codes that were kept, to compare what it says now.

Row k of a kept conversation is the complete frame that step k gives (see `Output`). Step k reads the user's
codes of the steps before it only, so the kept rows are all it takes to get every row again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from personaplex.config import USER
from personaplex.engine.engine import Engine
from personaplex.engine.interface import Slot
from personaplex.engine.state import EngineState
from personaplex.engine.step import step_codes
from personaplex.model import Model


def rerun(engine: Engine, slot: Slot, tokens: NDArray[np.integer]) -> Iterator[NDArray[np.int64]]:
    """What a slot that has just gone live says to the user codes of `tokens` [n, 17]: n rows [17], each of
    them sampled anew."""
    model, state, active = _alone(engine, slot)
    for following in _following(tokens):
        yield _step(model, state, active, following)


def _following(tokens: NDArray[np.integer]) -> Iterator[NDArray[np.integer]]:
    """For each row the one after it, which holds the frame that its step began; for the last itself."""
    yield from tokens[1:]
    yield from tokens[-1:]


def _alone(engine: Engine, slot: Slot) -> tuple[Model, EngineState, torch.Tensor]:
    model, state = engine.internals(slot)
    active = torch.zeros(engine.slots, dtype=torch.bool, device=model.device)
    active[slot.index] = True
    width = slot.index + 1
    return model, state.rows(0, width), active[:width]


def _step(
    model: Model, state: EngineState, active: torch.Tensor, frame: NDArray[np.integer]
) -> NDArray[np.int64]:
    with torch.inference_mode():
        codes = torch.from_numpy(np.array(frame[USER], np.int64)).to(model.device)
        out = step_codes(model, state, codes.expand(len(active), -1), active)
        said: NDArray[np.int64] = out.tokens[-1].cpu().numpy()
    return said
