"""One tick: user audio in, agent audio out, for every active slot.

The network of one tick reads the tokens of the tick before: what the user says now can be encoded beside it.
On a GPU that happens on a stream of its own, which hides the many small kernels of the codec behind the few
large ones that read the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from personaplex.config import AGENT, CODEBOOKS
from personaplex.engine.state import EngineState
from personaplex.model import Model, lm, mimi
from personaplex.model.sampling import Caps


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
    caps: Caps,
    beside: torch.cuda.Stream | None = None,
) -> StepOutput:
    """pcm [N, 1920] float32 of the users, active [N] bool -> the agents' frames; moves `state` on.

    `beside`: the CUDA stream to encode on, joined before this returns; None to do one thing after the other.
    """
    if beside is None:
        codes = mimi.encode(model.mimi, state.mimi.encoder, pcm, active)
    else:
        beside.wait_stream(torch.cuda.current_stream(pcm.device))
        with torch.cuda.stream(beside):
            codes = mimi.encode(model.mimi, state.mimi.encoder, pcm, active)
    out = lm.step(model.lm, state.lm, None, state.sampling, active, caps, CODEBOOKS)
    # rows that are not valid may hold markers, which no codebook has
    agent = out.tokens[:, AGENT].clamp(0, model.config.lm.card - 1)
    frame = mimi.decode(model.mimi, state.mimi.decoder, agent, out.valid)
    if beside is not None:
        torch.cuda.current_stream(pcm.device).wait_stream(beside)
    lm.hear(model.lm, state.lm, codes, active)
    return StepOutput(frame, out.tokens, codes, out.valid)
