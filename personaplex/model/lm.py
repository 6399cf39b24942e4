"""The language model over 17 token streams, and its step.

A session's tokens live in a ring of 4 columns [17, 4]; the step whose offset is n generates column n % 4 from
column n - 1. Delayed streams (DELAYS) are one column to the right of their frame. Cells that were given, not
sampled, are marked `provided`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from personaplex.config import CODEBOOKS, DELAYS, RING_COLUMNS, STREAMS, UNGENERATED, USER, LMConfig
from personaplex.kernels import ops
from personaplex.model.depth import Depth, DepthPass
from personaplex.model.layers import Embedding, Linear, RMSNorm, Stack
from personaplex.model.ring import Ring
from personaplex.model.sampling import SamplingState
from personaplex.model.temporal import Temporal

MAX_DELAY = max(DELAYS)


@dataclass
class LMState:
    """Everything a step changes, for N slots."""

    tokens: Tensor  # [N, 17, 4] int64, the token ring
    provided: Tensor  # [N, 17, 4] bool
    offset: Tensor  # [N] int64: steps since the reset, n
    ring: Ring  # the temporal transformer's; its offset is max(n - 1, 0)

    def rows(self, start: int, stop: int) -> LMState:
        """The same memory, slots start..stop-1 only."""
        return LMState(
            self.tokens[start:stop],
            self.provided[start:stop],
            self.offset[start:stop],
            self.ring.rows(start, stop),
        )

    def reset(self, slot: int) -> None:
        self.tokens[slot] = UNGENERATED
        self.provided[slot] = False
        self.offset[slot] = 0
        self.ring.reset(slot)


@dataclass(frozen=True)
class LMInputs:
    """Tokens given to a step: tokens [N, 17] int64 of the frame; given [N, 17] bool says which are."""

    tokens: Tensor
    given: Tensor


@dataclass(frozen=True)
class LMOutput:
    """tokens [N, 17] of frame n - 1; `valid` [N] is False for inactive slots and the first two steps.

    The rest is what they were sampled from: hidden [N, dim], text_logits [N, text_card], audio_logits: one
    [N, card] per depth step.
    """

    tokens: Tensor
    valid: Tensor
    hidden: Tensor
    text_logits: Tensor
    audio_logits: list[Tensor]


class LM(nn.Module):
    """The weights, under the checkpoint's names until `prepare()`."""

    audio_table: Tensor
    delays: Tensor
    starts: Tensor

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        temporal, depth = config.temporal, config.depth
        self.emb = Stack(Embedding(config.card + 1, temporal.dim) for _ in range(2 * CODEBOOKS))
        self.text_emb = Embedding(config.text_card + 1, temporal.dim)
        self.transformer = Temporal(temporal)
        self.out_norm = RMSNorm(temporal.dim)
        self.text_linear = Linear(temporal.dim, config.text_card)
        self.depformer_in = Stack(Linear(temporal.dim, depth.dim) for _ in range(config.depth_steps))
        self.depformer_text_emb = Embedding(config.text_card + 1, depth.dim)
        steps = config.depth_steps
        self.depformer_emb = Stack(Embedding(config.card + 1, depth.dim) for _ in range(steps - 1))
        self.depformer = Depth(depth)
        self.linears = Stack(Linear(depth.dim, config.card) for _ in range(config.depth_steps))

    def prepare(self) -> None:
        """Derives what the steps read; call once, after the weights are loaded."""
        for table in (*self.emb, self.text_emb, self.depformer_text_emb, *self.depformer_emb):
            table.prepare()
        stacked = torch.cat([table.weight.detach() for table in self.emb])
        self.register_buffer("audio_table", stacked, persistent=False)
        self.register_buffer("delays", torch.tensor(DELAYS, device=self.device), persistent=False)
        starts = [self.config.text_start] + [self.config.audio_start] * (STREAMS - 1)
        self.register_buffer("starts", torch.tensor(starts, device=self.device), persistent=False)
        del self.emb
        self.transformer.prepare()
        self.depformer.prepare()
        self.out_norm.prepare()
        self.depth_inputs = Linear(self.config.temporal.dim, self.config.depth_steps * self.config.depth.dim)
        self.depth_inputs.weight = nn.Parameter(
            torch.cat([m.weight for m in self.depformer_in]), requires_grad=False
        )
        del self.depformer_in
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.out_norm.alpha.device

    @property
    def dtype(self) -> torch.dtype:
        return self.out_norm.alpha.dtype

    def allocate(self, slots: int, kv: torch.dtype | None = None) -> LMState:
        """State of `slots` sessions before their first step; keys and values in the weights' dtype, or as
        `kv` (see Ring.allocate).
        """
        shape = (slots, STREAMS, RING_COLUMNS)
        return LMState(
            tokens=torch.full(shape, UNGENERATED, dtype=torch.int64, device=self.device),
            provided=torch.zeros(shape, dtype=torch.bool, device=self.device),
            offset=torch.zeros(slots, dtype=torch.int64, device=self.device),
            ring=Ring.allocate(self.config.temporal, slots, self.device, kv or self.dtype),
        )

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [..., 17] int64 -> [..., dim]: audio streams summed in order, then text."""
        return ops.embed(tokens, self.audio_table, self.text_emb.weight)

    def depth_hidden(self, hidden: Tensor, steps: int) -> Tensor:
        """hidden [N, dim] -> its part [steps, N, depth dim] in the inputs of the first depth steps."""
        wide = ops.linear(hidden, self.depth_inputs.weight[: steps * self.config.depth.dim])
        return wide.unflatten(-1, (steps, -1)).transpose(0, 1)

    def depth_input(self, step: int, part: Tensor, token: Tensor) -> Tensor:
        """part [N, depth dim] of `depth_hidden`, token [N] sampled before depth step `step` -> its input."""
        table = self.depformer_emb[step - 1] if step else self.depformer_text_emb
        return ops.add_embedding(part, table.weight, token)


def step(
    lm: LM,
    state: LMState,
    inputs: LMInputs | None,
    sampling: SamplingState,
    active: Tensor,
    depth_steps: int,
) -> LMOutput:
    """One frame for every active slot (active [N] bool); `depth_steps` 8 when all user codes are given, else
    16.

    With offset n: the given tokens enter column n (+ delay), the network reads column n - 1 and samples
    column n, and frame n - 1 is complete. The step at n = 0 runs nothing and the frame given to it is lost.

    The step does not read the user codes of its own frame: they may follow by `append_user_codes`.
    """
    n = state.offset
    if inputs is not None:
        columns = (n[:, None] + lm.delays) % RING_COLUMNS
        _write(state, slice(None), columns, inputs.tokens, inputs.given & active[:, None])
    target = (n % RING_COLUMNS)[:, None].expand(-1, STREAMS)
    starting = n[:, None] <= lm.delays
    _write(state, slice(None), target, lm.starts, starting & active[:, None])

    runs = active & (n > 0)
    source = (n - 1).clamp(min=0) % RING_COLUMNS
    previous = source[:, None].expand(-1, STREAMS)
    x = lm.embed(_read(state.tokens, previous))
    hidden = lm.out_norm(lm.transformer.step(x, state.ring, runs))

    target_tokens, target_provided = _read(state.tokens, target), _read(state.provided, target)
    text_logits = lm.text_linear(hidden)
    keys = ops.noise_keys(sampling.text_seed, sampling.audio_seed, n, 1 + depth_steps)
    text = ops.sample(text_logits, sampling.text_temperature, sampling.text_topk, keys[:, 0])
    frame = [torch.where(target_provided[:, 0], target_tokens[:, 0], text)]
    audio_logits = []
    depth = DepthPass(lm.depformer)
    for index, part in enumerate(lm.depth_hidden(hidden, depth_steps)):
        logits = lm.linears[index](depth.step(lm.depth_input(index, part, frame[-1])))
        code = ops.sample(logits, sampling.audio_temperature, sampling.audio_topk, keys[:, index + 1])
        frame.append(torch.where(target_provided[:, index + 1], target_tokens[:, index + 1], code))
        audio_logits.append(logits)

    written = torch.cat([torch.stack(frame, dim=1), target_tokens[:, len(frame) :]], dim=1)
    state.tokens.scatter_(2, target[..., None], torch.where(runs[:, None], written, target_tokens)[..., None])
    provided = _read(state.provided, previous) & ~runs[:, None]
    state.provided.scatter_(2, previous[..., None], provided[..., None])

    whole = (n[:, None] - MAX_DELAY + lm.delays) % RING_COLUMNS
    valid = active & (n > MAX_DELAY)
    tokens = _read(state.tokens, whole)
    state.offset += active
    return LMOutput(tokens, valid, hidden, text_logits, audio_logits)


def append_user_codes(lm: LM, state: LMState, codes: Tensor, active: Tensor) -> None:
    """Adds the user codes [N, 8] of the frame that the active slots last stepped through."""
    n = state.offset - active.long()
    delays = lm.delays[USER]
    columns = (n[:, None] + delays) % RING_COLUMNS
    kept = (n[:, None] > 0) | (delays > 0)  # the very first column holds start tokens
    _write(state, USER, columns, codes, kept & active[:, None])


def _read(ring: Tensor, columns: Tensor) -> Tensor:
    """ring [N, streams, 4] at columns [N, streams] -> [N, streams]."""
    return ring.gather(2, columns[..., None])[..., 0]


def _write(state: LMState, streams: slice, columns: Tensor, tokens: Tensor, where: Tensor) -> None:
    """Writes tokens into columns of some streams of the token ring and marks them provided, where `where`.

    columns, tokens and where broadcast to [N, streams].
    """
    index, ring, provided = columns[..., None], state.tokens[:, streams], state.provided[:, streams]
    ring.scatter_(2, index, torch.where(where, tokens, _read(ring, columns))[..., None])
    provided.scatter_(2, index, (where | _read(provided, columns))[..., None])
