"""Sampling parameters of all slots, as tensors: temperature, top-k and seeds.

A token is the argmax of p_i / n_i with p = softmax(logits / temperature) over the k largest logits and
n_i ~ Exponential(1). The noise is a function of (seed, step, stream, token id) alone: a session never depends
on its neighbours, on its slot or on what ran before it. `kernels.ops` samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from personaplex.config import Sampling


@dataclass
class SamplingState:
    """The sampling parameters of N slots, each [N]; temperatures float32, the rest int64."""

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
