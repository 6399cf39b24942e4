"""A slot run again from codes that were kept: to compare what it says now, or to go on from there.

Row k of a kept conversation is the complete frame that step k gives (see `Output`). Step k reads the user's
codes of the steps before it only, so the kept rows are all it takes to get every row again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from personaplex.config import AGENT, CODEBOOKS, STREAMS, USER
from personaplex.engine.engine import Engine
from personaplex.engine.interface import Slot
from personaplex.engine.state import EngineState
from personaplex.engine.step import step_codes
from personaplex.model import Model
from personaplex.model.lm import LMInputs
from personaplex.model.mimi import decode, encode


def rerun(engine: Engine, slot: Slot, tokens: NDArray[np.integer]) -> Iterator[NDArray[np.int64]]:
    """What a slot that has just gone live says to the user codes of `tokens` [n, 17]: n rows [17], each of
    them sampled anew."""
    model, state, active = _alone(engine, slot)
    for following in _following(tokens):
        yield _step(model, state, active, following, forced=False)


def resume(engine: Engine, slot: Slot, tokens: NDArray[np.integer]) -> None:
    """Brings a slot that has just gone live to where a conversation of `tokens` [n, 17] was after n steps.

    The kept tokens are forced, so that another version goes on from the same words. Of what is in no row,
    the newest column's first tokens are sampled with the session's own noise, and the user's last frame is
    the one before it again. The codec's states are those after the kept codes; its encoder hears the user as
    Mimi renders them, for the sound itself was not kept.
    """
    model, state, active = _alone(engine, slot)
    mimi, user = model.mimi, model.mimi.allocate(1, model.device).decoder
    first = active[slot.index : slot.index + 1]
    last = len(tokens) - 1
    for number, following in enumerate(_following(tokens)):
        _step(model, state, active, following, forced=number < last)
        with torch.inference_mode():
            rows = state.rows(slot.index, slot.index + 1)
            agent, heard = (_codes(model, part) for part in (tokens[number, AGENT], following[USER]))
            decode(mimi, rows.mimi.decoder, agent, first)
            encode(mimi, rows.mimi.encoder, decode(mimi, user, heard, first), first)
    engine.skip(slot, len(tokens))


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
    model: Model, state: EngineState, active: torch.Tensor, frame: NDArray[np.integer], forced: bool
) -> NDArray[np.int64]:
    with torch.inference_mode():
        row = torch.from_numpy(np.array(frame, np.int64)).to(model.device)
        given = torch.zeros(len(active), STREAMS, dtype=torch.bool, device=model.device)
        given[:, : 1 + CODEBOOKS] = forced
        tokens = row.expand(len(active), -1)
        out = step_codes(model, state, tokens[:, USER], LMInputs(tokens, given), active)
        said: NDArray[np.int64] = out.tokens[-1].cpu().numpy()
    return said


def _codes(model: Model, codes: NDArray[np.integer]) -> torch.Tensor:
    return torch.from_numpy(np.array(codes, np.int64)).to(model.device)[None]
