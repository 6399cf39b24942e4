"""Figures with intervals. Deterministic: resampling draws from a fixed seed. Pure.

A figure is {"value", "n", "low", "high", "method"}: 95 % intervals, None where there is too little for one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Figure = dict[str, Any]
Groups = Mapping[str, Sequence[float]]  # values by sample; repeats of one sample stand together

Z = 1.959964  # of 95 %
RESAMPLES = 2_000
BIN_S = 0.1  # of histograms


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion; `n` is at least 1."""
    p = successes / n
    centre = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return (centre - half if successes else 0.0), (centre + half if successes < n else 1.0)


def share(groups: Groups) -> Figure:
    """A proportion of zeros and ones: Wilson's interval, or of repeated samples the bootstrap's."""
    values = [value for group in groups.values() for value in group]
    if not values:
        return _figure(None, 0, None, "none")
    if all(len(group) <= 1 for group in groups.values()):
        return _figure(float(np.mean(values)), len(values), wilson(round(sum(values)), len(values)), "wilson")
    return mean(groups)


def mean(groups: Groups) -> Figure:
    """A mean with the percentile bootstrap over samples: repeats of one sample are drawn together."""
    sums = np.array([sum(group) for group in groups.values() if group], float)
    counts = np.array([len(group) for group in groups.values() if group], float)
    if not len(sums):
        return _figure(None, 0, None, "none")
    value, n = float(sums.sum() / counts.sum()), int(counts.sum())
    if len(sums) < 2:
        return _figure(value, n, None, "none")
    drawn = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), (2.5, 97.5))
    return _figure(value, n, (float(low), float(high)), "bootstrap")


def distribution(groups: Groups) -> dict[str, Any]:
    """Latencies in seconds: the mean, percentiles, the share below 0 and a histogram {lower edge: count}."""
    values = sorted(value for group in groups.values() for value in group)
    levels: dict[str, float | None] = {
        f"p{level}": float(np.percentile(values, level)) if values else None for level in (50, 90, 95)
    }
    counts: dict[str, int] = {}
    for value in values:
        edge = f"{math.floor(value / BIN_S + 1e-9) * BIN_S:.1f}"
        counts[edge] = counts.get(edge, 0) + 1
    negative = share({name: [float(value < 0) for value in group] for name, group in groups.items()})
    return {"mean": mean(groups), **levels, "negative": negative, "histogram": counts}


def _figure(value: float | None, n: int, interval: tuple[float, float] | None, method: str) -> Figure:
    low, high = interval or (None, None)
    return {"value": value, "n": n, "low": low, "high": high, "method": method}
