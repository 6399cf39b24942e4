"""Drawing tokens: temperature, top-k and counter-based noise, each slot by its own rules.

A draw takes the largest p_i / n_i with p = softmax(logits / temperature) over the k largest logits and
n_i ~ Exponential(1). The noise is a function of (seed, step, stream, token id) alone: a session never depends
on its neighbours, on its slot or on what ran before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personaplex.config import Sampling
from personaplex.model import layers

DRAW_STREAMS = 32  # counter stride of one step
_GOLDEN = -7046029254386353131  # 2**64 / golden ratio, as int64
UNIFORM_BITS = 23  # (x + 1/2) / 2**23 is exact in float32 and never 0 or 1


@dataclass
class SamplingState:
    """The rules of N slots, each [N]. `caps` = most candidates any slot asks for: (text, audio), 0 = all
    greedy.
    """

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
    """What the host knows of the rules of one step's slots, so that the step need not look.

    `text`, `audio`: how many candidates to look at, at least the largest top-k among them, 0 when all are
    greedy. `greedy`: whether some slot may be.
    """

    text: int
    audio: int
    greedy: bool = True

    @classmethod
    def of(cls, samplings: Sequence[Sampling], text_card: int, card: int) -> Caps:
        def cap(temperature: float, topk: int, size: int) -> int:
            return 0 if temperature <= 0 else (topk or size)

        return cls(
            text=max((cap(s.text_temperature, s.text_topk, text_card) for s in samplings), default=0),
            audio=max((cap(s.audio_temperature, s.audio_topk, card) for s in samplings), default=0),
            greedy=any(min(s.text_temperature, s.audio_temperature) <= 0 for s in samplings),
        )


@dataclass(frozen=True)
class Rule:
    """How all slots of one step draw from one vocabulary; made once a step.

    `scale` [N, 1] divides the logits, `kept` [N, cap] says which of the cap largest are in, `greedy` [N]
    whether the largest simply wins (None: for nobody).
    """

    cap: int
    scale: Tensor
    kept: Tensor
    greedy: Tensor | None

    @classmethod
    def of(cls, temperature: Tensor, topk: Tensor, cap: int, greedy: bool = True) -> Rule:
        """temperature [N]: <= 0 is greedy, if `greedy` allows; topk [N]: 0 is the whole vocabulary."""
        cold = temperature <= 0
        rank = torch.arange(cap, device=topk.device)
        kept = (topk[:, None] == 0) | (rank < topk[:, None])
        return cls(cap, torch.where(cold, 1.0, temperature)[:, None], kept, cold if greedy else None)


class Draws:
    """The draws of one step: the text token first, then `codebooks` codes."""

    def __init__(self, state: SamplingState, steps: Tensor, codebooks: int, card: int, caps: Caps) -> None:
        """steps [N] int64: the slots' step numbers. `caps` holds for all of them; kernels need none."""
        self._state, self._keys = state, draw_keys(state, steps, 1 + codebooks)
        self._fixed = _fixed_draw(state.text_temperature)
        if self._fixed is not None:
            return
        self._text = Rule.of(state.text_temperature, state.text_topk, caps.text, caps.greedy)
        self._audio = Rule.of(state.audio_temperature, state.audio_topk, caps.audio, caps.greedy)
        codes = torch.arange(card if caps.audio else 0)
        self._noise = log_noise(self._keys[:, 1:], codes)

    def text(self, logits: Tensor) -> Tensor:
        """logits [N, text_card] -> tokens [N] int64."""
        state = self._state
        if self._fixed is not None:
            return self._fixed(logits, state.text_temperature, state.text_topk, self._keys[:, 0])
        return draw(logits, self._text, lambda tokens: log_noise(self._keys[:, 0], tokens))

    def audio(self, index: int, logits: Tensor) -> Tensor:
        """logits [N, card] of codebook `index` -> codes [N] int64."""
        state = self._state
        if self._fixed is not None:
            return self._fixed(logits, state.audio_temperature, state.audio_topk, self._keys[:, 1 + index])
        return draw(logits, self._audio, lambda codes: self._noise[:, index].gather(1, codes))


def _fixed_draw(x: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
    """The kernel that draws where x is, with the slots' own rules: (logits, temperature, topk, keys)."""
    if layers.uses_kernels(x):
        from personaplex.model import pointwise  # only where there is Triton

        return pointwise.draw
    if layers.uses_host_kernels(x):
        from personaplex.model import host  # only where there is Numba

        return lambda logits, *rules: host.draw(logits.float(), *rules)  # the model may be in bfloat16
    return None


def draw(logits: Tensor, rule: Rule, noise: Callable[[Tensor], Tensor]) -> Tensor:
    """logits [N, V] -> tokens [N] int64; `noise` gives the log noise [N, c] of candidates [N, c].

    Greedy takes the lowest index on a tie.
    """
    if rule.cap == 0:
        return logits.argmax(-1)
    values, tokens = logits.float().topk(rule.cap, dim=-1)
    choice = pick(values, rule, noise(tokens))
    token = tokens.gather(1, choice[:, None])[:, 0]
    return token if rule.greedy is None else torch.where(rule.greedy, logits.argmax(-1), token)


def pick(values: Tensor, rule: Rule, log_noise: Tensor) -> Tensor:
    """Which of the descending logits `values` [N, cap] wins against the noise [N, cap]: index [N].

    argmax(p / n) = argmax(logits / temperature - log n); the softmax's constant drops out.
    """
    score = values / rule.scale - log_noise
    return torch.where(rule.kept, score, -torch.inf).argmax(-1)


def draw_keys(state: SamplingState, steps: Tensor, draws: int) -> Tensor:
    """Keys [N, draws] of one step's draws: the text token, then the codebooks; steps [N] int64."""
    if layers.uses_kernels(steps):
        from personaplex.model import pointwise  # only where there is Triton

        return pointwise.draw_keys(state.text_seed, state.audio_seed, steps, draws)
    stream = torch.arange(draws, device=steps.device)
    seeds = torch.where(stream == 0, state.text_seed[:, None], state.audio_seed[:, None])
    return _mix(_mix(seeds) ^ (steps[:, None] * DRAW_STREAMS + stream))


def log_noise(keys: Tensor, tokens: Tensor) -> Tensor:
    """Log of the Exponential(1) noise [..., c] of token ids [..., c] under keys [...].

    splitmix64 from each key, one number a token.
    """
    bits = _mix(keys[..., None] + tokens * _GOLDEN) & (2**UNIFORM_BITS - 1)
    return ((bits.float() + 0.5) / 2**UNIFORM_BITS).log().neg().log()


def _mix(x: Tensor) -> Tensor:
    """A bijection of int64 whose every output bit depends on every input bit (splitmix64's finaliser)."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * -4658895280553007687
    x = (x ^ _shift(x, 27)) * -7723592293110705685
    return x ^ _shift(x, 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift."""
    return (x >> by) & (2 ** (64 - by) - 1)
