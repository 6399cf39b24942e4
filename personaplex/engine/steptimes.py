"""How long one engine step takes, by its sessions and their context: a table of times, interpolated.

A table is measured or derived (`benchmarks/bound.py`); `source` says which, and every report built on a table
repeats it. Seconds everywhere here, milliseconds in the file:

    {"table": "steps", "source": "measured" | "derived", "note": ..., "machine": {...},
     "contexts": [...], "batches": [...], "tick_ms": [[one row per context, one number per batch]],
     "prefill_positions": [...], "prefill_ms": [...]}

Times are interpolated along both axes and clamped below the first entry and above the last context, since a
full window does not grow. A batch beyond the table is refused: the table ends where the card's memory or the
measurement does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from personaplex.errors import ConfigError
from personaplex.files import read_bounded

Floats = npt.NDArray[np.float64]

SOURCES = ("measured", "derived")
LARGEST = 1_000_000  # of any axis: sessions, positions

_FILE_LIMIT = 2**24  # bytes


@dataclass(frozen=True)
class StepTimes:
    """See the module. `ticks` is float64 [contexts, batches] in seconds, `prefills` float64 [positions]."""

    name: str
    source: str
    note: str
    contexts: Floats
    batches: Floats
    ticks: Floats
    positions: Floats
    prefills: Floats
    machine: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> StepTimes:
        """Reads a table. Raises ConfigError when the file is unreadable or is no such table."""
        try:
            data = json.loads(read_bounded(path, _FILE_LIMIT))
        except OSError as error:
            raise ConfigError("the step-time table cannot be read") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError("the step-time table is not JSON") from error
        return cls.from_json(path.stem, data)

    @classmethod
    def from_json(cls, name: str, data: Any) -> StepTimes:
        """Raises ConfigError for anything but a table with rising axes and positive times."""
        if not isinstance(data, dict) or data.get("table") != "steps" or data.get("source") not in SOURCES:
            raise ConfigError(f"not a step-time table: 'table' must be 'steps', 'source' one of {SOURCES}")
        try:
            axes = {key: np.asarray(data[key], float) for key in ("contexts", "batches", "prefill_positions")}
            ticks, prefills = (np.asarray(data[key], float) / 1e3 for key in ("tick_ms", "prefill_ms"))
        except (KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise ConfigError(f"step-time table: missing or malformed {error}") from error
        for key, axis in axes.items():
            if axis.ndim != 1 or not len(axis) or not (np.diff(axis) > 0).all() or not axis[0] >= 0:
                raise ConfigError(f"step-time table: {key} must rise from 0 or more")
            if axis[-1] > LARGEST:
                raise ConfigError(f"step-time table: {key} ends beyond {LARGEST}")
        contexts, batches, positions = axes.values()
        if ticks.shape != (len(contexts), len(batches)) or prefills.shape != positions.shape:
            raise ConfigError("step-time table: rows and columns do not match the axes")
        if not (
            np.isfinite(ticks).all() and np.isfinite(prefills).all() and min(ticks.min(), prefills.min()) > 0
        ):
            raise ConfigError("step-time table: times must be positive")
        note, machine = data.get("note", ""), data.get("machine", {})
        if not isinstance(note, str) or not isinstance(machine, dict):
            raise ConfigError("step-time table: note must be text, machine an object")
        return cls(name, data["source"], note, contexts, batches, ticks, positions, prefills, machine)

    @property
    def largest_batch(self) -> int:
        return int(self.batches[-1])

    def tick(self, batch: float, context: float) -> float:
        """Seconds of one step over `batch` sessions with `context` positions each, on average."""
        return float(self.tick_many(np.array([batch]), np.array([context]))[0])

    def tick_many(self, batches: Floats, contexts: Floats) -> Floats:
        """`tick` for float64 [n] each. Raises ConfigError for a batch beyond the table."""
        if len(batches) and batches.max() > self.batches[-1]:
            raise ConfigError(f"the step-time table ends at {self.largest_batch} sessions a step")
        row, rest = _between(self.contexts, contexts)
        column, part = _between(self.batches, batches)
        next_row = np.minimum(row + 1, len(self.contexts) - 1)
        next_column = np.minimum(column + 1, len(self.batches) - 1)
        below = self.ticks[row, column] * (1 - part) + self.ticks[row, next_column] * part
        above = self.ticks[next_row, column] * (1 - part) + self.ticks[next_row, next_column] * part
        result: Floats = below * (1 - rest) + above * rest
        return result

    def prefill(self, positions: float) -> float:
        """Seconds to run `positions` of a prompt at once; beyond the table in proportion to its end."""
        last = float(self.positions[-1])
        if positions > last:
            return float(self.prefills[-1]) * positions / last
        return float(np.interp(positions, self.positions, self.prefills))

    def most_sessions(self, context: float, tick_limit_s: float) -> int:
        """The largest batch of the table whose step stays within `tick_limit_s`; 0 when none does."""
        batches = np.arange(1, self.largest_batch + 1, dtype=float)
        fits = self.tick_many(batches, np.full(len(batches), context)) <= tick_limit_s
        return int(fits.argmin()) if not fits.all() else self.largest_batch


def _between(axis: Floats, values: Floats) -> tuple[npt.NDArray[np.int64], Floats]:
    """Index of the entry at or below each value, and how far it is towards the next, in [0, 1]."""
    values = np.clip(values, axis[0], axis[-1])
    index = np.clip(np.searchsorted(axis, values, side="right") - 1, 0, len(axis) - 1)
    following = np.minimum(index + 1, len(axis) - 1)
    width = np.where(following > index, axis[following] - axis[index], 1.0)
    return index, (values - axis[index]) / width
