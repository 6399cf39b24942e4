"""One training run: its budget in minutes, its checkpoint, what it prints, and its loss curves.

On a CPU the budget counts the process's own time, so that a run on a loaded machine learns as much as on a
quiet one; on a GPU, which works beside the process, it is the clock's. A run that was broken off goes on from
its last checkpoint and counts what was spent before.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_EVERY = 60.0  # seconds between two reports
_CPU = torch.device("cpu")


class Part(Protocol):
    """A module or an optimiser."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class Run:
    """`parts` are restored from `path` if it exists; `extra` holds plain values that belong to the run."""

    def __init__(
        self,
        path: Path,
        minutes: float,
        parts: dict[str, Part],
        device: torch.device = _CPU,
        **extra: Any,
    ) -> None:
        self.path, self.minutes, self.parts, self.extra = path, minutes, parts, extra
        self._clock = time.process_time if device.type == "cpu" else time.monotonic
        self.step = 0
        self.history: list[dict[str, float]] = []
        self._spent = 0.0
        if (state := load(path)) is not None:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.step, self._spent = state["step"], state["minutes"]
            self.history = state.get("history", [])
            self.extra |= {name: state[name] for name in extra}
        self._begun, self._reported = self._clock(), time.monotonic()
        self._values: dict[str, list[float | Tensor]] = defaultdict(list)

    @property
    def now(self) -> float:
        """Minutes spent so far, by earlier runs too."""
        return self._spent + (self._clock() - self._begun) / 60

    @property
    def progress(self) -> float:
        """0 .. 1."""
        return self.now / self.minutes

    def record(self, values: dict[str, float] | dict[str, Tensor]) -> None:
        """One step's losses, which a GPU may not have reckoned yet; the next report gives their means."""
        self.step += 1
        for name, value in values.items():
            self._values[name].append(value.detach() if isinstance(value, Tensor) else value)

    def due(self) -> bool:
        return time.monotonic() - self._reported > _EVERY

    def report(self, measured: dict[str, float] | None = None) -> None:
        """Prints the means since the last report and what was measured, and writes the checkpoint."""
        means = {name: float(np.mean([float(v) for v in values])) for name, values in self._values.items()}
        row = {"minutes": self.now, "step": self.step, **means, **(measured or {})}
        row = {name: float(value) for name, value in row.items()}  # a NumPy float cannot be loaded again
        self.history.append(row)
        shown = ", ".join(
            f"{name} {value:.3g}" for name, value in row.items() if name not in ("minutes", "step")
        )
        print(f"{self.now:.1f} min, step {self.step}: {shown}", flush=True)
        self.save()
        self._values.clear()
        self._reported = time.monotonic()

    def save(self) -> None:
        states = {name: part.state_dict() for name, part in self.parts.items()}
        save(
            self.path,
            {**states, **self.extra, "minutes": self.now, "step": self.step, "history": self.history},
        )


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint; the one before stays until the new one is whole."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def load(path: Path) -> dict[str, Any] | None:
    """A checkpoint, or None where there is none yet."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    return state


def curves(paths: list[Path], out: Path) -> None:
    """Losses and measures of several runs over their minutes, one panel a run, as a PNG; none without any."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    states = [(path.stem, load(path) or {}) for path in paths]
    runs = [(name, state["history"]) for name, state in states if state.get("history")]
    if not runs:
        return
    figure, panels = pyplot.subplots(len(runs), 1, figsize=(8, 3 * len(runs)), squeeze=False)
    for (name, history), panel in zip(runs, panels[:, 0], strict=True):
        for key in sorted({k for row in history for k in row} - {"minutes", "step"}):
            points = [(row["minutes"], row[key]) for row in history if key in row]
            panel.plot(*zip(*points, strict=True), label=key)
        panel.set_title(name)
        panel.set_xlabel("minutes")
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out)
    pyplot.close(figure)
