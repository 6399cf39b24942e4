"""Ring caches of keys and values: allocation, prefill and prefixes that sessions share.

Which positions a query sees is `kernels.kvring`'s rule. A step may write garbage for inactive slots: into
columns nobody reads until the slot's own offset advances.

An int8 ring keeps each vector of a head as 8-bit codes and one float16 scale, 130 bytes for 128 numbers. A
query then sees the quantized past, its own position included, whether that was stepped or prefilled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from personaplex.config import TransformerConfig
from personaplex.kernels.torch_reference import loaded, stored


@dataclass
class Ring:
    """Keys and values of one transformer, [N, layers, heads, C, head_dim] each; offset [N] = positions
    written. In an int8 ring they are codes, and k_scale, v_scale [N, layers, heads, C] float16 their units.
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
        """An empty ring; with dtype torch.int8 a quantized one."""
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
        """Empties one slot and zeroes its contents: nothing of the last session survives, NaN included."""
        for part in self.contents:
            part[slot].zero_()
        self.offset[slot] = 0


@dataclass(frozen=True)
class Chunk:
    """Positions start.. of one slot that run in one call; see `chunk`."""

    slot: int
    start: int
    past: Tensor  # columns of the earlier positions that its queries may see, oldest first
    mask: Tensor | None  # [steps, past + steps] bool; None is plain causal


def chunk(ring: Ring, slot: int, start: int, steps: int, call: int = 1, origin: int = 0) -> Chunk:
    """What `attend_chunk` needs for positions start..start + steps - 1, each query as if stepped.

    Stepping writes `call` positions at a time, and start and steps are multiples of it. So many are written
    when query q is answered that it sees positions k <= q with k > E - C, where E is the end of q's own call.
    Nothing before position `origin` was ever run.
    """
    capacity, device = ring.capacity, ring.k.device
    first = min(start, max(origin, start + call - capacity + 1))
    past = torch.arange(first, start, device=device) % capacity
    if first == start and start + steps - capacity < start:
        return Chunk(slot, start, past, None)
    keys = torch.arange(first, start + steps, device=device)
    queries = torch.arange(start, start + steps, device=device)[:, None]
    written = start + call * ((queries - start) // call + 1)
    return Chunk(slot, start, past, (keys <= queries) & (keys > written - capacity))


def attend_chunk(ring: Ring, layer: int, run: Chunk, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Writes a chunk's rotated k and v into the ring and attends: q, k, v [1, H, T, head_dim] -> the same."""
    kept = tuple(part[run.slot, layer].index_select(1, run.past) for part in ring.contents)
    old_k, old_v = loaded(kept, k.dtype)
    new_k, new_v = store(ring, run.slot, layer, run.start, k[0], v[0])
    return F.scaled_dot_product_attention(
        q,
        torch.cat([old_k, new_k], 1)[None],
        torch.cat([old_v, new_v], 1)[None],
        attn_mask=run.mask,
        is_causal=run.mask is None,
    )


def store(ring: Ring, slot: int, layer: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Writes positions start.. of one slot; k, v [H, T, head_dim]. Of more than C positions the last C stay.

    Returns k and v as they will be read: unchanged, or rounded by an int8 ring.
    """
    keep = min(k.shape[1], ring.capacity)
    stop = start + k.shape[1]
    columns = torch.arange(stop - keep, stop, device=k.device) % ring.capacity
    kept = stored(ring, k, v)
    for part, new in zip(ring.contents, kept, strict=True):
        part[slot, layer].index_copy_(1, columns, new[:, -keep:])
    return loaded(kept, k.dtype)


def copy_out(ring: Ring, slot: int, length: int) -> tuple[Tensor, ...]:
    """The first `length` positions of a slot whose ring has not wrapped, for `copy_in`."""
    return tuple(part[slot, :, :, :length].clone() for part in ring.contents)


def copy_in(ring: Ring, slot: int, prefix: tuple[Tensor, ...]) -> None:
    """Starts a slot with the prefix that `copy_out` copied from another."""
    for part, kept in zip(ring.contents, prefix, strict=True):
        part[slot, :, :, : kept.shape[2]].copy_(kept, non_blocking=True)
    ring.offset[slot] = prefix[0].shape[2]
