"""The plot of `benchmarks.gpu`: median tick by sessions, one line a context and kind of keys and values. SVG,
drawn here, since the machine it is made on has no plotting library.
"""

from __future__ import annotations

import math
from typing import Any

_WIDTH, _HEIGHT, _MARGIN = 760, 460, 60
_DEADLINE_MS = 80.0
_COLOURS = ("#1b6ca8", "#2a9d8f", "#e76f51")


def draw(data: dict[str, Any]) -> str:
    """The chart of a report's `ticks_int8` and `ticks_bf16`; both axes are logarithmic."""
    rows = [*(data.get("ticks_int8") or []), *(data.get("ticks_bf16") or [])]
    shapes = [f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>']
    if rows:
        shapes += _axes(rows) + _lines(rows)
    name = data.get("machine", {}).get("gpu", "no GPU: a dry run")
    shapes.append(_text(_WIDTH / 2, 24, f"Median tick, ms, by sessions ({name})", "middle", 16))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif">'
    )
    return "\n".join([head, *shapes, "</svg>"]) + "\n"


def _place(rows: list[dict[str, Any]], sessions: float, ms: float) -> tuple[float, float]:
    most = max(max(row["sessions"] for row in rows), 2)
    high, low = 2 * max(_DEADLINE_MS, max(row["p50"] for row in rows)), min(row["p50"] for row in rows) / 2
    x = _MARGIN + (_WIDTH - 2 * _MARGIN - 120) * math.log(sessions) / math.log(most)
    y = _MARGIN + (_HEIGHT - 2 * _MARGIN) * (1 - math.log(ms / low) / math.log(high / low))
    return round(x, 1), round(y, 1)


def _axes(rows: list[dict[str, Any]]) -> list[str]:
    left, line = _place(rows, 1, _DEADLINE_MS)
    right, _ = _place(rows, max(row["sessions"] for row in rows), _DEADLINE_MS)
    shapes = [f'<path d="M{left} {line}H{max(right, left + 1)}" stroke="#999" stroke-dasharray="5 4"/>']
    shapes.append(_text(right + 8, line + 4, "80 ms: one frame", "start"))
    for sessions in sorted({row["sessions"] for row in rows}):
        x, _ = _place(rows, sessions, _DEADLINE_MS)
        shapes.append(_text(x, _HEIGHT - _MARGIN + 22, str(sessions), "middle"))
    for power in range(-1, 4):
        for digit in (1, 2, 5):
            _, y = _place(rows, 1, digit * 10.0**power)
            if _MARGIN <= y <= _HEIGHT - _MARGIN:
                shapes.append(_text(_MARGIN - 10, y + 4, f"{digit * 10.0**power:g}", "end"))
    return shapes


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    shapes = []
    contexts = sorted({row["context"] for row in rows})
    for kv, dashes in (("int8", ""), ("auto", ' stroke-dasharray="2 3"')):
        for context, colour in zip(contexts, _COLOURS, strict=False):
            line = sorted((r["sessions"], r["p50"]) for r in rows if (r["kv"], r["context"]) == (kv, context))
            if not line:
                continue
            points = [_place(rows, *point) for point in line]
            path = "L".join(f"{x} {y}" for x, y in points)
            shapes.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
            x, y = points[-1]
            name = "int8" if kv == "int8" else "bf16"
            shapes.append(_text(x + 8, y + (4 if kv == "int8" else -8), f"{context} {name}", "start"))
    return shapes


def _text(x: float, y: float, text: str, anchor: str, size: int = 11) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}">{text}</text>'
