"""One tick: user audio in, agent audio out, for every active slot.

The language model of one tick reads the tokens of the tick before, so the user's frame can be encoded at the
same time. On a GPU that happens on a side stream, which hides the many small kernels of the codec behind the
few large ones that read the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from personaplex.config import AGENT, CODEBOOKS
from personaplex.engine.state import EngineState
from personaplex.model import Model, lm, mimi


@dataclass(frozen=True)
class StepOutput:
    """pcm [N, 1920] float32, tokens [N, 17] and user_codes [N, 8] int64, valid [N] bool."""

    pcm: Tensor
    tokens: Tensor
    user_codes: Tensor
    valid: Tensor


def step(
    model: Model,
    state: EngineState,
    pcm: Tensor,
    active: Tensor,
    side_stream: torch.cuda.Stream | None = None,
) -> StepOutput:
    """pcm [N, 1920] float32 of the users, active [N] bool -> the agents' frames; advances `state`.

    `side_stream`: the CUDA stream to encode on, joined before this returns; None runs everything in order.
    """
    if side_stream is None:
        codes = mimi.encode(model.mimi, state.mimi.encoder, pcm, active)
    else:
        side_stream.wait_stream(torch.cuda.current_stream(pcm.device))
        with torch.cuda.stream(side_stream):
            codes = mimi.encode(model.mimi, state.mimi.encoder, pcm, active)
    out = lm.step(model.lm, state.lm, None, state.sampling, active, CODEBOOKS)
    # rows that are not valid may hold markers, which no codebook has
    agent = out.tokens[:, AGENT].clamp(0, model.config.lm.card - 1)
    frame = mimi.decode(model.mimi, state.mimi.decoder, agent, out.valid)
    if side_stream is not None:
        torch.cuda.current_stream(pcm.device).wait_stream(side_stream)
    lm.append_user_codes(model.lm, state.lm, codes, active)
    return StepOutput(frame, out.tokens, codes, out.valid)


def step_codes(
    model: Model,
    state: EngineState,
    user_codes: Tensor,
    active: Tensor,
) -> lm.LMOutput:
    """`step` with user codes [N, 8] in place of sound; advances the language model, not the codec."""
    out = lm.step(model.lm, state.lm, None, state.sampling, active, CODEBOOKS)
    lm.append_user_codes(model.lm, state.lm, user_codes, active)
    return out
