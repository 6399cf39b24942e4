"""Ring caches of keys and values, and attention over what each slot has filled.

A ring of capacity C keeps position p in column p % C. With E positions written, the reference labels the
column it would write next as a future one, so a full ring shows its newest C - 1 positions (`visible`). That
rule is part of the model: trained weights have seen it, codes and tokens depend on it.

Writes may be garbage for slots that do not take part in a step: a step writes at columns nobody reads until
the slot's own offset moves on.

An int8 ring keeps each vector of a head as 8-bit codes and one float16 scale, 130 bytes for 128 numbers. A
query then sees the quantised past, its own position included, whether that was stepped or prefilled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from personaplex.config import TransformerConfig
from personaplex.model import layers

INT8_STEPS = 127  # codes lie in -127..127
SMALLEST_SCALE = 2.0**-14  # the smallest normal float16
_LARGEST_SCALE = 65_504.0


@dataclass
class Ring:
    """Keys and values of one transformer, [N, layers, heads, C, head_dim] each; offset [N] = positions
    written. In an int8 ring they are codes, and k_scale, v_scale [N, layers, heads, C] float16 their unit.
    """

    k: Tensor
    v: Tensor
    offset: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    @classmethod
    def allocate(
        cls, config: TransformerConfig, slots: int, device: torch.device, dtype: torch.dtype
    ) -> Ring:
        """An empty ring; with dtype torch.int8 a quantised one."""
        shape = (slots, config.layers, config.heads, config.context, config.head_dim)
        ring = cls(
            k=torch.zeros(shape, device=device, dtype=dtype),
            v=torch.zeros(shape, device=device, dtype=dtype),
            offset=torch.zeros(slots, device=device, dtype=torch.int64),
        )
        if dtype == torch.int8:
            ring.k_scale = torch.zeros(shape[:-1], device=device, dtype=torch.float16)
            ring.v_scale = torch.zeros(shape[:-1], device=device, dtype=torch.float16)
        return ring

    @property
    def capacity(self) -> int:
        return self.k.shape[3]

    @property
    def contents(self) -> tuple[Tensor, ...]:
        """Everything kept for each position; axis 3 is the column."""
        if self.k_scale is None or self.v_scale is None:
            return self.k, self.v
        return self.k, self.v, self.k_scale, self.v_scale

    def rows(self, start: int, stop: int) -> Ring:
        """The same memory, slots start..stop-1 only."""
        k, v, *scales = (part[start:stop] for part in self.contents)
        return Ring(k, v, self.offset[start:stop], *scales)

    def reset(self, slot: int) -> None:
        """Empties one slot. Contents are zeroed, so that nothing of the last user survives, NaN included."""
        for part in self.contents:
            part[slot].zero_()
        self.offset[slot] = 0


@dataclass(frozen=True)
class Window:
    """What each query of one step may read; made once a step and shared by all layers."""

    columns: Tensor  # [N, T] columns this step writes
    rows: list[tuple[int, int, Tensor | None]]  # of slots that take part: index, filled columns, mask


def visible(written: Tensor, queries: Tensor, capacity: int) -> Tensor:
    """The reference's rule. written [N] = E, queries [N, T] positions -> bool [N, T, capacity] by column."""
    columns = torch.arange(capacity, device=written.device)
    newest = written[:, None] - 1
    held = newest - torch.remainder(newest - columns, capacity)  # position in each column
    seen = (held >= 0) & ((written[:, None] < capacity) | (held > written[:, None] - capacity))
    return seen[:, None, :] & (held[:, None, :] <= queries[..., None])


def window(ring: Ring, steps: int, active: Tensor) -> Window | Tensor:
    """The window of a step that writes `steps` positions to every active slot; active [N] bool.

    Where kernels do the work it is `active` itself: they take the rest from the offsets, so that nothing
    comes back to the host.
    """
    if layers.uses_kernels(ring.k):
        return active
    capacity = ring.capacity
    positions = ring.offset[:, None] + torch.arange(steps)
    rows: list[tuple[int, int, Tensor | None]] = []
    for row, (offset, takes_part) in enumerate(zip(ring.offset.tolist(), active.tolist(), strict=True)):
        written = offset + steps
        if takes_part:
            plain = steps == 1 and written < capacity
            filled = min(written, capacity)
            one = slice(row, row + 1)
            seen = None if plain else visible(ring.offset[one] + steps, positions[one], capacity)
            rows.append((row, filled, None if seen is None else seen[:, None, :, :filled]))
    return Window(positions % capacity, rows)


def attend(ring: Ring, layer: int, qkv: Tensor, turn: tuple[Tensor, Tensor], view: Window | Tensor) -> Tensor:
    """Turns q and k by their positions, writes k and v into the ring and reads it.

    qkv [N, T, 3, H, head_dim]; turn of `layers.angles`; view of `window` -> [N, H, T, head_dim], zeros for
    slots that take no part.
    """
    if isinstance(view, Tensor):
        from personaplex.model import attention  # only where there is Triton

        return attention.attend(ring, layer, qkv, turn, view)
    q, k, v = layers.turned(qkv, turn)
    slots = torch.arange(q.shape[0])[:, None]
    for part, new in zip(ring.contents, _as_kept(ring, k, v), strict=True):
        part[:, layer].transpose(1, 2)[slots, view.columns] = new
    q = q.transpose(1, 2)
    out = torch.zeros_like(q)
    for row, filled, mask in view.rows:
        keys, values = _numbers(tuple(part[row, layer, :, :filled] for part in ring.contents), q.dtype)
        out[row] = F.scaled_dot_product_attention(q[row : row + 1], keys[None], values[None], attn_mask=mask)[
            0
        ]
    return out


def past(ring: Ring, slot: int, layer: int, start: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a prefill from position `start` may still see, oldest first: keys, values [1, H, S, head_dim]."""
    first = max(0, start - ring.capacity + 2)
    columns = torch.arange(first, start, device=ring.k.device) % ring.capacity
    kept = tuple(part[slot, layer].index_select(1, columns) for part in ring.contents)
    keys, values = _numbers(kept, dtype)
    return keys[None], values[None]


def prefill_mask(start: int, steps: int, capacity: int, device: torch.device) -> Tensor | None:
    """Mask [steps, S + steps] over `past` and the chunk, each query as if stepped alone (E = q + 1)."""
    if start == 0 and steps < capacity:
        return None  # plain causal
    first = max(0, start - capacity + 2)
    keys = torch.arange(first, start + steps, device=device)
    queries = torch.arange(start, start + steps, device=device)[:, None]
    return (keys <= queries) & ((queries + 1 < capacity) | (keys > queries + 1 - capacity))


def store(ring: Ring, slot: int, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Writes positions start.. of one slot; k, v [H, T, head_dim]. Of more than C positions the last C stay.

    Gives k and v as they will be read: the same, or what is left of them after quantising.
    """
    keep = min(k.shape[1], ring.capacity)
    stop = start + k.shape[1]
    columns = torch.arange(stop - keep, stop, device=k.device) % ring.capacity
    kept = _as_kept(ring, k, v)
    for part, new in zip(ring.contents, kept, strict=True):
        part[slot, layer].index_copy_(1, columns, new[:, -keep:])
    return _numbers(kept, k.dtype)


def copy_out(ring: Ring, slot: int, length: int) -> tuple[Tensor, ...]:
    """The first `length` positions of a slot whose ring has not wrapped, to be given to `copy_in`."""
    return tuple(part[slot, :, :, :length].clone() for part in ring.contents)


def copy_in(ring: Ring, slot: int, prefix: tuple[Tensor, ...]) -> None:
    """Makes a slot begin with what `copy_out` took from another."""
    for part, kept in zip(ring.contents, prefix, strict=True):
        part[slot, :, :, : kept.shape[2]].copy_(kept, non_blocking=True)
    ring.offset[slot] = prefix[0].shape[2]


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., head_dim] -> int8 codes of that shape and float16 scales [...]; x is about codes * scale."""
    wide = x.float()
    scale = (wide.abs().amax(-1) * (1.0 / INT8_STEPS)).clamp(SMALLEST_SCALE, _LARGEST_SCALE).half()
    codes = (wide / scale.float()[..., None]).round_().clamp_(-INT8_STEPS, INT8_STEPS)
    return codes.to(torch.int8), scale


def _as_kept(ring: Ring, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Keys and values in the order and form of `Ring.contents`."""
    if ring.k_scale is None:
        return k, v
    (k_codes, k_scale), (v_codes, v_scale) = quantise(k), quantise(v)
    return k_codes, v_codes, k_scale, v_scale


def _numbers(kept: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values from the form of `Ring.contents`; those of a quantised ring in `dtype`."""
    if len(kept) == 2:
        return kept[0], kept[1]
    k, v, k_scale, v_scale = kept
    return (k * k_scale.float()[..., None]).to(dtype), (v * v_scale.float()[..., None]).to(dtype)
