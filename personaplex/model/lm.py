"""The language model over 17 token streams, and its step.

A session's tokens live in a ring of 4 columns [17, 4]; column n % 4 is being generated in the step whose
offset is n, its input is column n - 1. Delayed streams (DELAYS) stand one column to the right of their frame.
Cells that were given, not drawn, are marked `provided`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personaplex.config import CODEBOOKS, DELAYS, RING_COLUMNS, STREAMS, UNGENERATED, USER, LMConfig
from personaplex.model import layers
from personaplex.model.depth import Depth, DepthPass
from personaplex.model.layers import Linear, RMSNorm, Stack, Table, linear, table_rows
from personaplex.model.ring import Ring
from personaplex.model.sampling import Caps, Draws, SamplingState
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
    """Tokens given to a step: tokens [N, 17] int64 of the frame, given [N, 17] bool which of them count."""

    tokens: Tensor
    given: Tensor


@dataclass(frozen=True)
class LMOutput:
    """tokens [N, 17] of frame n - 1; `valid` [N] is False for inactive slots and the first two steps.

    The rest is what the draws were made from: hidden [N, dim], text_logits [N, text_card], audio_logits: one
    [N, card] a depth step.
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
        self.emb = Stack(Table(config.card + 1, temporal.dim) for _ in range(2 * CODEBOOKS))
        self.text_emb = Table(config.text_card + 1, temporal.dim)
        self.transformer = Temporal(temporal)
        self.out_norm = RMSNorm(temporal.dim)
        self.text_linear = Linear(temporal.dim, config.text_card)
        self.depformer_in = Stack(Linear(temporal.dim, depth.dim) for _ in range(config.depth_steps))
        self.depformer_text_emb = Table(config.text_card + 1, depth.dim)
        self.depformer_emb = Stack(Table(config.card + 1, depth.dim) for _ in range(config.depth_steps - 1))
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
        if layers.uses_kernels(tokens):
            from personaplex.model import pointwise  # only where there is Triton

            flat = tokens.reshape(-1, STREAMS)
            return pointwise.embed(flat, self.audio_table, self.text_emb.weight).view(*tokens.shape[:-1], -1)
        rows = self.config.card + 1
        base = torch.arange(2 * CODEBOOKS, device=tokens.device) * (rows + 1)
        audio = F.embedding(table_rows(tokens[..., 1:], rows) + base, self.audio_table)
        first, *others = audio.unbind(-2)
        total = first.clone()
        for stream in others:
            total += stream
        return total.add_(self.text_emb(tokens[..., 0]))

    def depth_hidden(self, hidden: Tensor, steps: int) -> Tensor:
        """hidden [N, dim] -> its part [steps, N, depth dim] in the inputs of the first depth steps."""
        wide = linear(hidden, self.depth_inputs.weight[: steps * self.config.depth.dim])
        return wide.unflatten(-1, (steps, -1)).transpose(0, 1)

    def depth_input(self, step: int, part: Tensor, token: Tensor) -> Tensor:
        """part [N, depth dim] of `depth_hidden`, token [N] drawn before depth step `step` -> its input."""
        table = self.depformer_emb[step - 1] if step else self.depformer_text_emb
        if layers.uses_kernels(part):
            from personaplex.model import pointwise  # only where there is Triton

            return pointwise.add_row(part, table.weight, token)
        embedded: Tensor = table(token)
        return part + embedded


def step(
    lm: LM,
    state: LMState,
    inputs: LMInputs | None,
    sampling: SamplingState,
    active: Tensor,
    caps: Caps,
    depth_steps: int,
) -> LMOutput:
    """One frame for every active slot (active [N] bool); `depth_steps` 8 when all user codes are given, else
    16.

    With offset n: the given tokens enter column n (+ delay), the network reads column n - 1, draws column n,
    and frame n - 1 comes out whole. The step at n = 0 runs nothing and the frame given to it is lost.

    No part of this reads what the user's streams are given in the same step: codes that are not among
    `inputs` yet may follow by `hear`.
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
    draws = Draws(sampling, n, depth_steps, lm.config.card, caps)
    drawn = [torch.where(target_provided[:, 0], target_tokens[:, 0], draws.text(text_logits))]
    audio_logits = []
    depth = DepthPass(lm.depformer)
    for index, part in enumerate(lm.depth_hidden(hidden, depth_steps)):
        logits = lm.linears[index](depth.step(lm.depth_input(index, part, drawn[-1])))
        token = draws.audio(index, logits)
        drawn.append(torch.where(target_provided[:, index + 1], target_tokens[:, index + 1], token))
        audio_logits.append(logits)

    written = torch.cat([torch.stack(drawn, dim=1), target_tokens[:, len(drawn) :]], dim=1)
    state.tokens.scatter_(2, target[..., None], torch.where(runs[:, None], written, target_tokens)[..., None])
    provided = _read(state.provided, previous) & ~runs[:, None]
    state.provided.scatter_(2, previous[..., None], provided[..., None])

    whole = (n[:, None] - MAX_DELAY + lm.delays) % RING_COLUMNS
    valid = active & (n > MAX_DELAY)
    tokens = _read(state.tokens, whole)
    state.offset += active
    return LMOutput(tokens, valid, hidden, text_logits, audio_logits)


def hear(lm: LM, state: LMState, codes: Tensor, active: Tensor) -> None:
    """Gives the last `step` of the active slots the user's codes [N, 8] of its frame, after the fact."""
    n = state.offset - active.long()
    delays = lm.delays[USER]
    columns = (n[:, None] + delays) % RING_COLUMNS
    kept = (n[:, None] > 0) | (delays > 0)  # a start token stands in the very first column
    _write(state, USER, columns, codes, kept & active[:, None])


def _read(ring: Tensor, columns: Tensor) -> Tensor:
    """ring [N, streams, 4] at columns [N, streams] -> [N, streams]."""
    return ring.gather(2, columns[..., None])[..., 0]


def _write(state: LMState, streams: slice, columns: Tensor, tokens: Tensor, where: Tensor) -> None:
    """Puts tokens at columns of some streams of the token ring and marks them provided, where `where`; all
    [N, streams] or like it.
    """
    index, ring, provided = columns[..., None], state.tokens[:, streams], state.provided[:, streams]
    ring.scatter_(2, index, torch.where(where, tokens, _read(ring, columns))[..., None])
    provided.scatter_(2, index, (where | _read(provided, columns))[..., None])
