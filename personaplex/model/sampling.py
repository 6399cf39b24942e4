"""Drawing tokens: temperature, top-k and counter-based noise, each slot by its own rules.

A draw takes the largest p_i / n_i with p = softmax(logits / temperature) over the k largest logits and
n_i ~ Exponential(1). The noise is a function of (seed, step, stream, token id) alone: a session never depends
on its neighbours, on its slot or on what ran before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personaplex.config import Sampling

_STREAMS = 32  # counter stride of one step
_UNIFORM_BITS = 23  # (x + 1/2) / 2**23 is exact in float32 and never 0 or 1


@dataclass
class SamplingState:
    """The rules of N slots, each [N]. `caps` = most candidates any slot asks for: (text, audio), 0 = all greedy."""

    text_temperature: Tensor
    text_topk: Tensor
    audio_temperature: Tensor
    audio_topk: Tensor
    text_seed: Tensor
    audio_seed: Tensor

    @classmethod
    def allocate(cls, slots: int, device: torch.device) -> SamplingState:
        """All slots greedy."""
        floats = [torch.zeros(slots, device=device) for _ in range(2)]
        ints = [torch.zeros(slots, dtype=torch.int64, device=device) for _ in range(4)]
        return cls(floats[0], ints[0], floats[1], ints[1], ints[2], ints[3])

    def rows(self, start: int, stop: int) -> SamplingState:
        """The same memory, slots start..stop-1 only."""
        return SamplingState(*(getattr(self, name)[start:stop] for name in self.__dataclass_fields__))

    def write(self, slot: int, sampling: Sampling) -> None:
        for name in self.__dataclass_fields__:
            getattr(self, name)[slot] = getattr(sampling, name)


@dataclass(frozen=True)
class Caps:
    """How many candidates a step looks at: at least the largest top-k among its slots; 0 when all are greedy."""

    text: int
    audio: int

    @classmethod
    def of(cls, samplings: Sequence[Sampling], text_card: int, card: int) -> Caps:
        def cap(temperature: float, topk: int, size: int) -> int:
            return 0 if temperature <= 0 else (topk or size)

        return cls(
            text=max((cap(s.text_temperature, s.text_topk, text_card) for s in samplings), default=0),
            audio=max((cap(s.audio_temperature, s.audio_topk, card) for s in samplings), default=0),
        )


def draw(logits: Tensor, temperature: Tensor, topk: Tensor, keys: Tensor, cap: int) -> Tensor:
    """logits [N, V], rules [N], keys [N] of `draw_keys` -> tokens [N] int64.

    A temperature <= 0 takes the largest logit (lowest index on a tie); top-k 0 looks at all V.
    """
    best = logits.argmax(-1)
    if cap == 0:
        return best
    values, tokens = logits.float().topk(cap, dim=-1)
    choice = pick(values, temperature, topk, exponential(keys, tokens))
    return torch.where(temperature <= 0, best, tokens.gather(1, choice[:, None])[:, 0])


def pick(values: Tensor, temperature: Tensor, topk: Tensor, noise: Tensor) -> Tensor:
    """Which of the descending logits `values` [N, c] wins against `noise` [N, c]: index [N] into c.

    argmax(p / n) = argmax(logits / temperature - log n); the softmax's constant drops out.
    """
    scale = torch.where(temperature <= 0, 1.0, temperature)[:, None]
    rank = torch.arange(values.shape[1], device=values.device)
    kept = (topk[:, None] == 0) | (rank < topk[:, None])
    score = values / scale - noise.log()
    return torch.where(kept, score, -torch.inf).argmax(-1)


def draw_keys(seeds: Tensor, steps: Tensor, stream: int) -> Tensor:
    """One key a slot for one draw; seeds, steps [N] int64."""
    return _mix(_mix(seeds) ^ (steps * _STREAMS + stream))


def exponential(keys: Tensor, tokens: Tensor) -> Tensor:
    """Exponential(1) noise [N, c] for keys [N] and token ids [N, c]."""
    bits = _mix(keys[:, None] ^ _mix(tokens)) & (2**_UNIFORM_BITS - 1)
    return -((bits.float() + 0.5) / 2**_UNIFORM_BITS).log()


def _mix(x: Tensor) -> Tensor:
    """A bijection of int64 whose every output bit depends on every input bit (splitmix64's finaliser)."""
    x = x + -7046029254386353131
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift."""
    return (x >> by) & (2 ** (64 - by) - 1)
