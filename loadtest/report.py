"""The report of a load test: figures, thresholds, JSON for programs and one HTML page for people.

A threshold is `NAME OP NUMBER`, for a name of `outcome.summary` and one of <= >= < >: `good_share>=0.99`. A
figure that does not exist, because nothing got that far, does not meet its threshold.
"""

from __future__ import annotations

import json
import operator
import os
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from loadtest.chart import STYLE, chart
from loadtest.outcome import Outcome, causes, merged, summary
from personaplex.errors import ConfigError
from personaplex.files import replacing
from personaplex.outputs import is_folder

REQUIRED = (
    "good_share>=0.99",
    "deficit_share<=0.01",
    "audible_per_minute<=0.1",
    "interval_p99_ms<=120",
    "sent_late_share<=0.01",
    "start_late_p99_s<=0.25",
)
_OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
_THRESHOLD = re.compile(r"\s*([a-z0-9_]+)\s*(<=|>=|<|>)\s*([0-9.eE+-]+)\s*")
_NAMES = frozenset(summary([]))


@dataclass(frozen=True)
class Threshold:
    """One condition on a figure."""

    name: str
    relation: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Raises ConfigError for an unknown name or anything but the form above."""
        match = _THRESHOLD.fullmatch(text)
        if not match or match[1] not in _NAMES:
            raise ConfigError(f"threshold {text!r} is not NAME<=NUMBER or NAME>=NUMBER with a known name")
        try:
            return cls(match[1], match[2], float(match[3]))
        except ValueError as error:
            raise ConfigError(f"threshold {text!r} has no number") from error

    def met(self, figures: Mapping[str, float | None]) -> bool:
        value = figures[self.name]
        return value is not None and bool(_OPERATORS[self.relation](value, self.limit))

    def __str__(self) -> str:
        return f"{self.name} {self.relation} {self.limit:g}"


@dataclass(frozen=True)
class Report:
    """A finished run. `options` are what was asked for: profile, lengths, seed, address."""

    outcomes: Sequence[Outcome]
    thresholds: Sequence[Threshold]
    options: Mapping[str, Any]

    @property
    def figures(self) -> dict[str, float | None]:
        return summary(self.outcomes)

    @property
    def passed(self) -> bool:
        figures = self.figures
        return all(threshold.met(figures) for threshold in self.thresholds)

    @property
    def failures(self) -> list[str]:
        """Thresholds that were not met, with what was measured."""
        figures = self.figures
        return [f"{one}: {shown(figures[one.name])}" for one in self.thresholds if not one.met(figures)]

    def data(self) -> dict[str, Any]:
        """Everything, for programs."""
        figures = self.figures
        return {
            "report": "loadtest",
            "machine": machine(),
            "options": dict(self.options),
            "passed": self.passed,
            "thresholds": [
                {"threshold": str(one), "value": figures[one.name], "met": one.met(figures)}
                for one in self.thresholds
            ],
            "summary": figures,
            "causes": causes(self.outcomes),
            "histograms": {
                "interval_ms": dict(sorted(merged(one.intervals for one in self.outcomes).items())),
                "answer_ms": dict(sorted(merged(one.answers for one in self.outcomes).items())),
            },
            "sessions": [_facts(one) for one in sorted(self.outcomes, key=lambda one: one.number)],
        }

    def write(self, stem: Path) -> list[Path]:
        """Writes STEM.json and STEM.html whole or not at all; gives their paths."""
        paths = report_files(stem)
        for path, text in zip(paths, (_lines(self.data()), self.html()), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                part.write_text(text, encoding="utf-8")
        return paths

    def html(self) -> str:
        figures = self.figures
        verdict = "passed" if self.passed else '<span class="bad">failed</span>'
        rows = [
            (str(one), shown(figures[one.name]), "met" if one.met(figures) else '<b class="bad">not met</b>')
            for one in self.thresholds
        ]
        ended = [
            (f"{kind}: {escape(name)}", str(count), "")
            for kind, names in causes(self.outcomes).items()
            for name, count in names.items()
        ]
        return page(
            "Load test",
            f"<p>{len(self.outcomes)} sessions offered; {verdict}.</p>",
            "<h2>Thresholds</h2>" + table(("threshold", "measured", ""), rows),
            "<h2>Sessions</h2>" + chart("seconds", "sessions", _over_time(self.outcomes), "steps"),
            "<h2>From connecting to a ready slot</h2>"
            + chart("wished start, seconds", "seconds", _ready_over_time(self.outcomes), "dots"),
            "<h2>Time between pages</h2>"
            + chart("milliseconds", "share of pages, %", {"all sessions": _intervals(self.outcomes)}, "bars"),
            "<h2>How sessions ended that did not end as they wished</h2>"
            + table(("when: error", "sessions", ""), ended),
            "<h2>All figures</h2>"
            + table(("figure", "value", ""), [(name, shown(value), "") for name, value in figures.items()]),
            "<h2>What was asked for</h2>"
            + table(("option", "", ""), [(escape(n), "", escape(str(v))) for n, v in self.options.items()]),
        )


def report_files(stem: Path) -> list[Path]:
    """STEM.json and STEM.html. Raises ConfigError for a stem that is a folder's name."""
    if is_folder(stem) and not stem.name:
        raise ConfigError(f"--output {stem} is a folder: name a file in it, without .json")
    return [stem.with_name(stem.name + suffix) for suffix in (".json", ".html")]


def _facts(outcome: Outcome) -> dict[str, Any]:
    """One session without its histograms."""
    return {name: value for name, value in outcome.packed().items() if name not in ("intervals", "answers")}


def _lines(data: Mapping[str, Any]) -> str:
    """JSON with one line a session."""
    head = json.dumps({name: value for name, value in data.items() if name != "sessions"}, indent=1)
    sessions = ",\n".join(json.dumps(session, separators=(",", ":")) for session in data["sessions"])
    return f'{head[:-2]},\n "sessions": [\n{sessions}\n ]\n}}\n'


def page(title: str, *parts: str) -> str:
    """A whole HTML page; `parts` are HTML already."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>{''.join(parts)}</html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells are HTML already, the second column holds numbers."""
    cells = ("".join(f"<td{_NUMBERS if i == 1 else ''}>{c}</td>" for i, c in enumerate(row)) for row in rows)
    heads = "".join(f"<th>{name}</th>" for name in head)
    return f"<table><tr>{heads}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


_NUMBERS = ' class="n"'


def machine() -> dict[str, Any]:
    """What the load came from."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


def _over_time(outcomes: Sequence[Outcome]) -> dict[str, list[tuple[float, float]]]:
    offered = [(one.at_s, 1) for one in outcomes]
    refused = [(one.at_s, 1) for one in outcomes if one.refused]
    live = []
    for one in outcomes:
        if one.live:
            began = one.at_s + one.late_s + (one.connect_s or 0.0) + (one.handshake_s or 0.0)
            live += [(began, 1), (began + one.talked_s, -1)]
    return {"live": running_total(live), "offered": running_total(offered), "refused": running_total(refused)}


def running_total(changes: Sequence[tuple[float, int]]) -> list[tuple[float, float]]:
    """Sum of all changes up to each moment."""
    total, points = 0, []
    for at, change in sorted(changes):
        total += change
        points.append((at, float(total)))
    return points


def _ready_over_time(outcomes: Sequence[Outcome]) -> dict[str, list[tuple[float, float]]]:
    waited = [one for one in outcomes if one.ready_s is not None]
    return {
        "at once": [(one.at_s, one.ready_s or 0.0) for one in waited if one.queued is None],
        "queued": [(one.at_s, one.ready_s or 0.0) for one in waited if one.queued is not None],
    }


def _intervals(outcomes: Sequence[Outcome]) -> list[tuple[float, float]]:
    total = merged(one.intervals for one in outcomes)
    pages = total.total()
    shown: Counter[int] = Counter()
    for ms, count in total.items():
        shown[min(ms, 250)] += count  # the last bar holds the rest
    return [(ms, 100 * count / pages) for ms, count in sorted(shown.items())]


def shown(value: float | None) -> str:
    """A figure for people."""
    return "none" if value is None else f"{value:.4g}"
