"""Muon for matrices and AdamW for the rest, and how their rates fall."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_ROOMY = 30e9  # bytes of a GPU's memory
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of Muon's published iteration


def training_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def short_of_memory(device: torch.device) -> bool:
    """Whether activations are better computed again than kept."""
    return device.type == "cuda" and torch.cuda.get_device_properties(device).total_memory < _ROOMY


@cache
def quick_in_bfloat16(device: torch.device) -> bool:
    """Whether matrix products of bfloat16 take less time than those of float32 here; measured once."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(256, 256, dtype=dtype, device=device)
        taken = []
        for _ in range(20):
            begun = time.perf_counter()
            x @ x
            taken.append(time.perf_counter() - begun)
        return min(taken)

    return device.type == "cuda" or seconds(torch.bfloat16) < seconds(torch.float32)


def precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """bfloat16 for the products where that is quick; many a CPU takes several times as long for it."""
    if quick_in_bfloat16(device):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, for matrices and convolutions (flattened to matrices).

    `stacked` matrices of one parameter along its first axis are made orthogonal one by one. Matrices of one
    shape, whichever parameters they belong to, are made so together.
    """

    def __init__(self, params: Iterable[nn.Parameter], rate: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": rate, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                held = state["momentum"].mul_(group["momentum"]).add_(param.grad)
                stacked = getattr(param, "stacked", 1)
                update = param.grad + group["momentum"] * held
                flat = update.reshape(stacked, param.shape[0] // stacked, -1)
                alike[flat.shape[1:]].append((param, flat))
            for shape, pairs in alike.items():
                params, updates = zip(*pairs, strict=True)
                steps = orthogonal(torch.cat(updates)).split([len(update) for update in updates])
                scale = 0.2 * max(shape) ** 0.5
                for param, step in zip(params, steps, strict=True):
                    param.mul_(1 - 0.02 * group["lr"])
                    param.add_(step.reshape(param.shape), alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor, iterations: int = 4) -> Tensor:
    """matrices [S, rows, columns] with all singular values near one; in bfloat16 where that is fast."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    if quick_in_bfloat16(x.device):
        x = x.bfloat16()
    for _ in range(iterations):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    x = x.to(matrices.dtype)
    return x.transpose(1, 2) if tall else x


class Optimizer:
    """Both optimisers with one relative rate."""

    def __init__(
        self, module: nn.Module, muon: float, adam: float, plain: Iterable[nn.Parameter] = ()
    ) -> None:
        kept = {id(p) for p in plain}
        trained = [p for p in module.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.dim() >= 2 and id(p) not in kept]
        rest = [p for p in trained if p.dim() < 2 or id(p) in kept]
        self.parts: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon(matrices, muon), muon),
            (torch.optim.AdamW(rest, adam, betas=(0.9, 0.98), weight_decay=0.01), adam),
        ]
        self.trained = trained

    def step(self, loss: Tensor, rate: float) -> None:
        """One step down `loss` at `rate` of the full learning rates."""
        for part, full in self.parts:
            for group in part.param_groups:
                group["lr"] = full * rate
            part.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        for part, _ in self.parts:
            part.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [part.state_dict() for part, _ in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for (part, _), state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def schedule(progress: float, warm: float = 0.01, decay_from: float = 0.4) -> float:
    """Relative learning rate at `progress` 0 .. 1 of a run: warm-up, level, straight down to 3 %."""
    down = 1.0 if progress < decay_from else 0.03 + 0.97 * (1 - progress) / (1 - decay_from)
    return max(1e-3, min(1.0, progress / warm)) * down
