"""One process or several: `torchrun` starts them, torch.distributed joins them, DDP averages gradients.

Every process holds the whole frozen model and works on its share of each batch. Only the first one writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from personaplex.errors import ConfigError


@dataclass(frozen=True)
class Processes:
    """`rank` of `count`; `local` is the number of this machine's card."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wrap(self, network: nn.Module, device: torch.device) -> nn.Module:
        """`network`, whose gradients are those of all processes together, averaged."""
        if self.count == 1:
            return network
        return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)

    def without_exchange(self, network: nn.Module, more: bool) -> AbstractContextManager[object]:
        """Around a piece of a batch: gradients stay here while `more` pieces are to come."""
        if isinstance(network, DistributedDataParallel) and more:
            return network.no_sync()
        return nullcontext()

    def total(self, value: Tensor) -> Tensor:
        """The sum of `value` over all processes."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def wait(self) -> None:
        if self.count > 1:
            dist.barrier()


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The processes that torchrun started together with this one; alone without torchrun.

    Raises ConfigError when they are to share one card.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    if device.startswith("cuda:"):
        raise ConfigError("several processes need a card each: leave the number out of --device")
    local = int(os.environ["LOCAL_RANK"])
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        if local >= torch.cuda.device_count():
            raise ConfigError(f"process {local} has no card: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield Processes(dist.get_rank(), count, local)
    finally:
        dist.destroy_process_group()
