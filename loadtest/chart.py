"""Charts as inline SVG, so that a report is one file that opens anywhere: lines, steps, dots and bars.

Colours and fonts come from the page (`STYLE`), light and dark. Names and labels are escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Literal

Points = Sequence[tuple[float, float]]
Style = Literal["line", "steps", "dots", "bars"]

WIDTH, HEIGHT = 720, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 24, 14, 40
COLOURS = 6

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #66707f; --rule: #dde1e7; --page: #fff;
  --c0: #1f6feb; --c1: #d1570a; --c2: #2a8a4a; --c3: #9a3fb5; --c4: #b3261e; --c5: #5b6470; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6e9ee; --soft: #9aa4b2; --rule: #333b47; --page: #14181f;
  --c0: #6aa8ff; --c1: #ff9d5c; --c2: #62c98a; --c3: #d48cf0; --c4: #ff8a80; --c5: #a5afbd; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 760px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .2rem .6rem .2rem 0;
  border-bottom: 1px solid var(--rule); overflow-wrap: anywhere; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.bad { color: var(--c4); font-weight: 600; } .soft { color: var(--soft); }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg .grid { stroke: var(--rule); } svg .series { fill: none; stroke-width: 1.6; }
"""


def chart(x_label: str, y_label: str, series: Mapping[str, Points], style: Style = "line") -> str:
    """One SVG. Axes begin at zero; series without points are named in the legend only."""
    points = [point for one in series.values() for point in one]
    x_ticks = ticks(max((x for x, _ in points), default=1.0))
    y_ticks = ticks(max((y for _, y in points), default=1.0))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">']
    parts += _axes(x_label, y_label, x_ticks, y_ticks)
    for number, (name, one) in enumerate(series.items()):
        placed = [(_x(x, x_ticks[-1]), _y(y, y_ticks[-1])) for x, y in one]
        parts += _draw(placed, style, f"var(--c{number % COLOURS})")
        parts.append(
            f'<text x="{LEFT + 8 + 120 * number}" y="{TOP + 4}" style="fill: var(--c{number % COLOURS})">'
            f"{escape(name)}</text>"
        )
    return "".join([*parts, "</svg>"])


def ticks(highest: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to at least `highest`: about `count` steps of 1, 2 or 5 times a power of 10."""
    if not highest > 0:
        return [0.0, 1.0]
    rough = highest / count
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough * (1 - 1e-9))
    return [step * number for number in range(math.ceil(highest / step - 1e-9) + 1)]


def _x(value: float, highest: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * value / highest


def _y(value: float, highest: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * value / highest


def _axes(x_label: str, y_label: str, x_ticks: list[float], y_ticks: list[float]) -> Iterator[str]:
    for value in y_ticks:
        y = _y(value, y_ticks[-1])
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
    for value in x_ticks:
        x = _x(value, x_ticks[-1])
        yield f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
    middle = (LEFT + WIDTH - RIGHT) / 2
    yield f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
    y = (TOP + HEIGHT - BOTTOM) / 2
    yield f'<text x="14" y="{y}" text-anchor="middle" transform="rotate(-90 14 {y})">{escape(y_label)}</text>'


def _draw(points: list[tuple[float, float]], style: Style, colour: str) -> Iterator[str]:
    if not points:
        return
    if style == "dots":
        for x, y in points:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.8" style="fill: {colour}; fill-opacity: .6"/>'
    elif style == "bars":
        for x, y in points:
            size = f'width="2" height="{HEIGHT - BOTTOM - y:.1f}"'
            yield f'<rect x="{x - 1:.1f}" y="{y:.1f}" {size} style="fill: {colour}"/>'
    else:
        form = "H{:.1f}V{:.1f}" if style == "steps" else "L{:.1f} {:.1f}"
        path = "M{:.1f} {:.1f}".format(*points[0]) + "".join(form.format(x, y) for x, y in points[1:])
        yield f'<path class="series" d="{path}" style="stroke: {colour}"/>'
