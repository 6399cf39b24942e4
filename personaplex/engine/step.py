"""One tick: user audio in, agent audio out, for every active slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from personaplex.config import AGENT, CODEBOOKS, STREAMS, USER
from personaplex.engine.state import EngineState
from personaplex.model import Model, lm, mimi
from personaplex.model.lm import LMInputs
from personaplex.model.sampling import Caps


@dataclass(frozen=True)
class StepOutput:
    """pcm [N, 1920] float32, tokens [N, 17] and user_codes [N, 8] int64, valid [N] bool."""

    pcm: Tensor
    tokens: Tensor
    user_codes: Tensor
    valid: Tensor


def step(model: Model, state: EngineState, pcm: Tensor, active: Tensor, caps: Caps) -> StepOutput:
    """pcm [N, 1920] float32 of the users, active [N] bool -> the agents' frames; moves `state` on."""
    codes = mimi.encode(model.mimi, state.mimi.encoder, pcm, active)
    tokens = torch.zeros(pcm.shape[0], STREAMS, dtype=torch.int64, device=pcm.device)
    given = torch.zeros_like(tokens, dtype=torch.bool)
    tokens[:, USER] = codes
    given[:, USER] = True
    out = lm.step(model.lm, state.lm, LMInputs(tokens, given), state.sampling, active, caps, CODEBOOKS)
    # rows that are not valid may hold markers, which no codebook has
    agent = out.tokens[:, AGENT].clamp(0, model.config.lm.card - 1)
    frame = mimi.decode(model.mimi, state.mimi.decoder, agent, out.valid)
    return StepOutput(frame, out.tokens, codes, out.valid)
