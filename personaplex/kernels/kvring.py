"""What kernels know of a KV ring: its tensors, and which positions a query sees.

A ring of capacity C keeps position p in column p % C. With E positions written, the reference labels the
column it would write next as a future one, so a full ring shows its newest C - 1 positions (`visible`). That
rule is part of the model: trained weights have seen it, codes and tokens depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]  # cos, sin of the rotary angles, each [N, T, 1, 1, head_dim / 2] float32


class KVRing(Protocol):
    """Keys and values k, v [N, layers, H, C, head_dim]; offset [N] int64 = positions written.

    In an int8 ring k and v are codes, and k_scale, v_scale [N, layers, H, C] float16 their units.
    """

    k: Tensor
    v: Tensor
    offset: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    @property
    def capacity(self) -> int: ...

    @property
    def contents(self) -> tuple[Tensor, ...]:
        """k and v, then k_scale and v_scale of an int8 ring."""

    def rows(self, start: int, stop: int) -> KVRing:
        """The same memory, slots start..stop-1 only."""


@dataclass(frozen=True)
class Window:
    """What each query of one step may read; built once per step, shared by all layers.

    The Triton kernels read `active` alone and derive the rest on the device.
    """

    active: Tensor  # [N] bool
    columns: Tensor | None = None  # [N, T] columns this step writes
    rows: tuple[tuple[int, int, Tensor | None], ...] = ()  # per active slot: index, filled columns, mask


def window(ring: KVRing, steps: int, active: Tensor) -> Window:
    """The window of a step that writes `steps` positions to each active slot; active [N] bool."""
    capacity = ring.capacity
    positions = ring.offset[:, None] + torch.arange(steps, device=active.device)
    rows: list[tuple[int, int, Tensor | None]] = []
    for row, (offset, takes_part) in enumerate(zip(ring.offset.tolist(), active.tolist(), strict=True)):
        if not takes_part:
            continue
        written = offset + steps
        filled = min(written, capacity)
        if steps == 1 and written < capacity:
            rows.append((row, filled, None))
        else:
            one = slice(row, row + 1)
            seen = visible(ring.offset[one] + steps, positions[one], capacity)
            rows.append((row, filled, seen[:, None, :, :filled]))
    return Window(active, positions % capacity, tuple(rows))


def visible(written: Tensor, queries: Tensor, capacity: int) -> Tensor:
    """The reference's rule. written [N] = E, queries [N, T] positions -> bool [N, T, capacity] by column."""
    columns = torch.arange(capacity, device=written.device)
    newest = written[:, None] - 1
    held = newest - torch.remainder(newest - columns, capacity)  # position in each column
    seen = (held >= 0) & ((written[:, None] < capacity) | (held > written[:, None] - capacity))
    return seen[:, None, :] & (held[:, None, :] <= queries[..., None])
