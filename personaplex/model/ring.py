"""Ring caches of keys and values, and attention over what each slot has filled.

A ring of capacity C keeps position p in column p % C. With E positions written, the reference labels the
column it would write next as a future one, so a full ring shows its newest C - 1 positions (`visible`). That
rule is part of the model: trained weights have seen it, codes and tokens depend on it.

Writes may be garbage for slots that do not take part in a step: a step writes at columns nobody reads until
the slot's own offset moves on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from personaplex.config import TransformerConfig


@dataclass
class Ring:
    """Keys and values of one transformer, [N, layers, heads, C, head_dim] each; offset [N] = positions
    written.
    """

    k: Tensor
    v: Tensor
    offset: Tensor

    @classmethod
    def allocate(
        cls, config: TransformerConfig, slots: int, device: torch.device, dtype: torch.dtype
    ) -> Ring:
        shape = (slots, config.layers, config.heads, config.context, config.head_dim)
        return cls(
            k=torch.zeros(shape, device=device, dtype=dtype),
            v=torch.zeros(shape, device=device, dtype=dtype),
            offset=torch.zeros(slots, device=device, dtype=torch.int64),
        )

    @property
    def capacity(self) -> int:
        return self.k.shape[3]

    def rows(self, start: int, stop: int) -> Ring:
        """The same memory, slots start..stop-1 only."""
        return Ring(self.k[start:stop], self.v[start:stop], self.offset[start:stop])

    def reset(self, slot: int) -> None:
        """Empties one slot. Contents are zeroed, so that nothing of the last user survives, NaN included."""
        self.k[slot].zero_()
        self.v[slot].zero_()
        self.offset[slot] = 0


@dataclass(frozen=True)
class Window:
    """What each query of one step may read; made once a step and shared by all layers.

    On a CPU `rows` lists (slot row, filled columns, mask or None) of the slots that take part; elsewhere
    `mask` [N, 1, T, C] covers all slots at a fixed shape.
    """

    columns: Tensor  # [N, T] columns this step writes
    mask: Tensor | None
    rows: list[tuple[int, int, Tensor | None]] | None


def visible(written: Tensor, queries: Tensor, capacity: int) -> Tensor:
    """The reference's rule. written [N] = E, queries [N, T] positions -> bool [N, T, capacity] by column."""
    columns = torch.arange(capacity, device=written.device)
    newest = written[:, None] - 1
    held = newest - torch.remainder(newest - columns, capacity)  # position in each column
    seen = (held >= 0) & ((written[:, None] < capacity) | (held > written[:, None] - capacity))
    return seen[:, None, :] & (held[:, None, :] <= queries[..., None])


def window(ring: Ring, steps: int, active: Tensor) -> Window:
    """The window of a step that writes `steps` positions to every active slot; active [N] bool."""
    capacity = ring.capacity
    positions = ring.offset[:, None] + torch.arange(steps, device=ring.offset.device)
    columns = positions % capacity
    if ring.k.device.type != "cpu":
        return Window(columns, visible(ring.offset + steps, positions, capacity)[:, None], None)
    rows: list[tuple[int, int, Tensor | None]] = []
    for row, (offset, takes_part) in enumerate(zip(ring.offset.tolist(), active.tolist(), strict=True)):
        written = offset + steps
        if takes_part:
            plain = steps == 1 and written < capacity
            filled = min(written, capacity)
            one = slice(row, row + 1)
            mask = (
                None
                if plain
                else visible(ring.offset[one] + steps, positions[one], capacity)[:, None, :, :filled]
            )
            rows.append((row, filled, mask))
    return Window(columns, None, rows)


def attend(ring: Ring, layer: int, q: Tensor, k: Tensor, v: Tensor, view: Window) -> Tensor:
    """Writes k, v of this step into the ring and reads it; q, k, v [N, T, H, head_dim] -> [N, H, T,
    head_dim].
    """
    slots = torch.arange(q.shape[0], device=q.device)[:, None]
    keys, values = ring.k[:, layer], ring.v[:, layer]
    keys.transpose(1, 2)[slots, view.columns] = k
    values.transpose(1, 2)[slots, view.columns] = v
    q = q.transpose(1, 2)
    if view.rows is None:
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=view.mask)
    out = torch.zeros_like(q)
    for row, filled, mask in view.rows:
        one = slice(row, row + 1)
        out[one] = F.scaled_dot_product_attention(
            q[one], keys[one, :, :filled], values[one, :, :filled], attn_mask=mask
        )
    return out


def past(ring: Ring, slot: int, layer: int, start: int) -> tuple[Tensor, Tensor]:
    """Keys and values a prefill from position `start` may still see, oldest first, each [1, H, S, head_dim]."""
    first = max(0, start - ring.capacity + 2)
    columns = torch.arange(first, start, device=ring.k.device) % ring.capacity
    return ring.k[slot, layer].index_select(1, columns)[None], ring.v[slot, layer].index_select(1, columns)[
        None
    ]


def prefill_mask(start: int, steps: int, capacity: int, device: torch.device) -> Tensor | None:
    """Mask [steps, S + steps] over `past` and the chunk itself, each query as if stepped alone (E = q + 1)."""
    if start == 0 and steps < capacity:
        return None  # plain causal
    first = max(0, start - capacity + 2)
    keys = torch.arange(first, start + steps, device=device)
    queries = torch.arange(start, start + steps, device=device)[:, None]
    return (keys <= queries) & ((queries + 1 < capacity) | (keys > queries + 1 - capacity))


def store(ring: Ring, slot: int, layer: int, start: int, k: Tensor, v: Tensor) -> None:
    """Writes positions start.. of one slot; k, v [H, T, head_dim]. Of more than C positions the last C stay."""
    keep = min(k.shape[1], ring.capacity)
    stop = start + k.shape[1]
    columns = torch.arange(stop - keep, stop, device=k.device) % ring.capacity
    ring.k[slot, layer].index_copy_(1, columns, k[:, -keep:])
    ring.v[slot, layer].index_copy_(1, columns, v[:, -keep:])
