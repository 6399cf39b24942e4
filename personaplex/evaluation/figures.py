"""Pictures of a report as inline SVG: histograms of latencies and time lines of conversations.

Colours come from the page (`STYLE`), light and dark. Everything that is not ours is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from personaplex.evaluation.statistics import BIN_S

WIDTH, LEFT, RIGHT = 760, 46, 10
PLOT = WIDTH - LEFT - RIGHT
ROW, GAP = 22, 6  # of a time line
HEIGHT, FLOOR = 130, 24  # of a histogram
FEWEST = 20  # bins of a histogram
MARKED_S = 0.02  # a marked moment is drawn at least this long

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5f6977; --rule: #dde1e7; --page: #fff;
  --user: #1f6feb; --agent: #c2560a; --mark: #ffd43b66; --bad: #b3261e; --band: #f5f7fa; }
@media (prefers-color-scheme: dark) { :root {
  --ink: #e6e9ee; --soft: #9aa4b2; --rule: #333b47; --page: #14181f;
  --user: #6aa8ff; --agent: #ff9d5c; --mark: #ffd43b40; --bad: #ff8a80; --band: #1b212a; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 860px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid var(--rule);
  padding-top: 1rem; } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
.wide { overflow-x: auto; margin: .8rem 0 1.4rem; } table { border-collapse: collapse; width: 100%; }
td, th { text-align: left; padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; } td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
tr.ours td { font-weight: 600; background: var(--band); } .soft, td small { color: var(--soft); }
.bad { color: var(--bad); } svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } .grid { stroke: var(--rule); }
.user { fill: var(--user); } .agent { fill: var(--agent); } .mark { fill: var(--mark); }
.edge { stroke: var(--bad); stroke-dasharray: 3 2; } figure { margin: .8rem 0; }
figcaption { font-size: .85rem; } audio { width: 100%; height: 32px; margin-top: .2rem; }
summary { cursor: pointer; }
"""


def span(histograms: Iterable[Mapping[str, int]]) -> tuple[int, int]:
    """The bins from the first to behind the last that any of them uses: 0 to 2 s at least."""
    bins = [_bin(edge) for counts in histograms for edge in counts]
    return min([0, *bins]), max([FEWEST - 1, *bins]) + 1


def histogram(counts: Mapping[str, int], label: str, within: tuple[int, int]) -> str:
    """Counts by the lower edge of bins of 0.1 s, as `statistics.distribution` gives them."""
    bins = {_bin(edge): count for edge, count in counts.items()}
    low, high = within
    size, top = PLOT / (high - low), max(bins.values(), default=1)
    parts = [_open(HEIGHT, label)]
    for place, count in sorted(bins.items()):
        tall = (HEIGHT - FLOOR - 14) * count / top
        x, y = LEFT + (place - low) * size, HEIGHT - FLOOR - tall
        title = f"{place * BIN_S:.1f} to {(place + 1) * BIN_S:.1f} s: {count}"
        parts.append(
            f'<rect class="agent" x="{x:.1f}" y="{y:.1f}" width="{max(1.0, size - 1):.1f}" '
            f'height="{tall:.1f}"><title>{title}</title></rect>'
        )
    step = max(1, math.ceil((high - low) / 10))
    for place in range(low, high + 1):
        if place % step == 0:
            x = LEFT + (place - low) * size
            parts.append(
                f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{place * BIN_S:.1f}</text>'
            )
    zero = LEFT - low * size
    parts.append(f'<line class="edge" x1="{zero:.1f}" x2="{zero:.1f}" y1="6" y2="{HEIGHT - FLOOR}"/>')
    parts.append(f'<text x="{LEFT - 6}" y="18" text-anchor="end">{top}</text>')
    parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="106" y2="106"/>')
    return "".join([*parts, "</svg>"])


def _bin(edge: str) -> int:
    return round(float(edge) / BIN_S)


def timeline(record: Mapping[str, Any]) -> str:
    """Who spoke when in one scored sample, with what its task marks; words are shown under the pointer."""
    seconds = max(float(record["seconds"]), 0.1)
    height = 2 * ROW + GAP + 22
    parts = [_open(height, "time line of the user and the agent")]
    parts += _marks(record["facts"], seconds, height - 20)
    for row, (name, spans) in enumerate((("user", record["user"]), ("agent", record["agent"]))):
        y = row * (ROW + GAP) + 2
        parts.append(f'<text x="{LEFT - 6}" y="{y + 15}" text-anchor="end">{name}</text>')
        for start, end in spans:
            said = _said(record["words"], start, end) if name == "agent" else ""
            title = escape(f"{start:.2f} to {end:.2f} s {said}".strip())
            parts.append(_bar(name, start, end, seconds, y, ROW - 2, title))
    parts += _seconds(seconds, height)
    return "".join([*parts, "</svg>"])


def _open(height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'


def _x(moment: float, seconds: float) -> float:
    return LEFT + PLOT * min(max(moment, 0.0), seconds) / seconds


def _bar(kind: str, start: float, end: float, seconds: float, y: float, tall: float, title: str) -> str:
    x = _x(start, seconds)
    width = max(1.0, _x(end, seconds) - x)
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{tall:.1f}" rx="2">'
        f"<title>{title}</title></rect>"
    )


def _marks(facts: Mapping[str, Any], seconds: float, height: float) -> Iterator[str]:
    for name, spans in (("pause", facts["pauses"]), ("marked speech", [facts["marked"]])):
        for span in spans:
            if span:
                start, end = span[0], max(span[1], span[0] + MARKED_S)
                yield _bar("mark", start, end, seconds, 0, height, f"{name} {start:.2f} to {end:.2f} s")
    if facts["end"] is not None:
        x = _x(facts["end"], seconds)
        yield f'<line class="edge" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height:.1f}"/>'


def _said(words: Sequence[Sequence[Any]], start: float, end: float) -> str:
    return " ".join(text for text, at, _ in words if start - 0.1 <= at <= end)


def _seconds(seconds: float, height: float) -> Iterator[str]:
    step = next(one for one in (1, 2, 5, 10, 30, 60, 300, 3_600, 86_400) if seconds / one <= 16)
    for number in range(int(seconds / step) + 1):
        x = _x(number * step, seconds)
        yield f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{number * step}</text>'
