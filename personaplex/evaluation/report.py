"""One HTML page of one or several runs: figures with intervals, published rows, and every sample's time line.

The page needs nothing but itself: pictures are inline, and the worst answers bring their sound.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from personaplex.audio.wav import read_wav, resample
from personaplex.config import SAMPLE_RATE
from personaplex.errors import BadAudio, ConfigError
from personaplex.evaluation.dataset import ROOTS, TASKS
from personaplex.evaluation.figures import STYLE, histogram, span, timeline
from personaplex.evaluation.published import PUBLISHED
from personaplex.evaluation.results import RESULTS_FILE, SCHEMA_VERSION, badness
from personaplex.evaluation.scoring import agents_channel, read_record
from personaplex.files import read_bounded, replacing
from personaplex.transcription.silero import RATE

SHOWN = 12  # samples of a task with a time line
PLAYED = 4  # of those, with their sound
_RESULTS_LIMIT = 2**28
_KEYS = {"schema_version", "run", "transcript", "synthetic", "dataset", "tasks", "errors", "samples"}

_LABELS = {
    "takeover": "takeover rate",
    "latency": "latency, s",
    "clamped": "answers before the end, counted as 0 s",
    "events": "events",
    "frequency": "events a second",
    "jsd": "divergence (root of JSD)",
    "rating": "judge, 0 to 5",
    "adherence": "judge: adherence",
    "nvidia": "any sound in the pause or 1 s after",
    "answered": "answered within 5 s",
    "spoke": "agent was speaking",
    "stop": "time to stop, s",
    "never_stopped": "did not stop",
    "response": "response, s",
    "held": "went on within 1.5 s",
    "pace_before": "words a minute before",
    "pace_after": "words a minute after",
}
_NOTES = """
<p class="soft">Intervals are 95 %. <b>Official</b> figures are computed as Full-Duplex-Bench's scripts do, so
that they compare with the published rows: every word of a recording counts, wherever it stands, and an early
answer has latency 0. <b>Event</b> figures look at what happens at the moment itself; latencies are signed.
The speech detector ends speech about 0.1 s late: times to stop read about 0.1 s long, gaps up to 0.1 s short.
Words from the model's text stream are written, not heard: how far text leads sound has not been measured.</p>
"""


@dataclass(frozen=True)
class Run:
    """The results of one output folder, and where its recordings are."""

    name: str
    folder: Path
    results: Mapping[str, Any]
    data: Path | None

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Raises ConfigError for a folder without results of this version."""
        try:
            results = json.loads(read_bounded(folder / RESULTS_FILE, _RESULTS_LIMIT))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{folder.name} holds no {RESULTS_FILE}: score it first") from error
        whole = isinstance(results, dict) and results.keys() >= _KEYS and isinstance(results["run"], dict)
        if not whole or results["schema_version"] != SCHEMA_VERSION:
            raise ConfigError(f"{folder.name}: {RESULTS_FILE} is of another version: score it again")
        place = results["run"].get("data")
        return cls(folder.resolve().name, folder, results, Path(place) if isinstance(place, str) else None)


def write(path: Path, runs: Sequence[Run]) -> None:
    """The page, whole or not at all."""
    text = page(runs)
    with replacing(path) as part:
        part.write_text(text, "utf-8", "backslashreplace")  # names and texts may hold lone surrogates


def page(runs: Sequence[Run]) -> str:
    """All of it as HTML."""
    tasks = [name for name in TASKS if any(name in run.results["tasks"] for run in runs)]
    parts = [_overview(runs), _NOTES, *(_task(name, runs) for name in tasks), *map(_errors, runs)]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><title>Full-duplex evaluation</title>'
        f"<style>{STYLE}</style><h1>Full-duplex evaluation</h1>{''.join(parts)}</html>\n"
    )


def _overview(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        made, results = run.results["run"], run.results
        answers = sum(task["answers"] for task in results["tasks"].values())
        what = ", ".join(f"{name} {made[name]}" for name in ("voice", "seed", "sessions") if name in made)
        failed = len(results["errors"])
        errors = f'<span class="bad">{failed}</span>' if failed else "0"
        rows.append(
            [escape(run.name), escape(str(made.get("model", "unknown"))), escape(what),
             escape(results["transcript"]), str(answers), errors]
        )  # fmt: skip
    counted = [
        f"{TASKS[one['task']].title}: {one['found']} of {one['declared']}"
        for one in runs[0].results["dataset"]
        if one["declared"] and one["found"] != one["declared"]
    ]
    partial = f'<p class="soft">Not the whole benchmark. {escape("; ".join(counted))}.</p>' if counted else ""
    if any(run.results["synthetic"] for run in runs):
        partial = (
            '<p class="soft">On the synthetic set: published figures do not compare and are left out.</p>'
        )
    head = ("run", "model", "settings", "words from", "answers", "errors")
    return _table(head, rows, numbers=(4, 5)) + partial


def _task(name: str, runs: Sequence[Run]) -> str:
    having = [run for run in runs if name in run.results["tasks"]]
    parts = [f"<h2>{escape(TASKS[name].title)}</h2>", _official(name, having), _event(name, having)]
    parts += [*_histograms(name, having), *(_samples(name, run) for run in having)]
    return "".join(parts)


def _histograms(name: str, runs: Sequence[Run]) -> Iterator[str]:
    """Of every latency, one below the other for the runs, on the same axis."""
    figures = [run.results["tasks"][name]["event"] for run in runs]
    for metric in figures[0]:
        counts = [found[metric].get("histogram") or {} for found in figures]
        for run, each in zip(runs, counts, strict=True):
            if each:
                label = f"{_LABELS[metric]}: {run.name}"
                yield f"<h3>{escape(label)}</h3>{histogram(each, label, span(counts))}"


def _official(name: str, runs: Sequence[Run]) -> str:
    """Our runs and the published rows, a column a metric."""
    figures = [run.results["tasks"][name]["official"] for run in runs]
    metrics = list(figures[0]) if figures else []
    if not metrics:
        return ""
    rows = [
        [escape(run.name), *(_shown(found[metric]) for metric in metrics)]
        for run, found in zip(runs, figures, strict=True)
    ]
    synthetic = any(run.results["synthetic"] for run in runs)
    for row in () if synthetic else PUBLISHED.get(name, ()):
        note = f"<br><small>{escape(row.note)}</small>" if row.note else ""
        values = (f"{row.figures[metric]:.3g}" if metric in row.figures else "" for metric in metrics)
        rows.append([escape(row.system) + note, *values])
    head = ["official", *(_label(metric) for metric in metrics)]
    return _table(head, rows, numbers=range(1, len(head)), ours=len(runs))


def _event(name: str, runs: Sequence[Run]) -> str:
    """A row a metric, a column a run."""
    figures = [run.results["tasks"][name]["event"] for run in runs]
    rows = []
    for metric in figures[0]:
        rows.append([_label(metric), *(_shown(found[metric]) for found in figures)])
    unheard = [run.results["tasks"][name]["unheard"] for run in runs]
    if any(one["n"] for one in unheard):
        rows.append(["words written, not heard", *map(_shown, unheard)])
    head = ["event", *(escape(run.name) for run in runs)]
    return _table(head, rows, numbers=range(1, len(head)))


def _label(metric: str) -> str:
    known = _LABELS.get(metric)
    return known or escape(metric.replace("behaviour_", "behaviour: "))


def _shown(figure: Mapping[str, Any]) -> str:
    """value [low, high] n; of a distribution its mean, median and 95th percentile."""
    if "mean" in figure:
        if figure["p50"] is None:
            return "none"
        negative = 100 * figure["negative"]["value"]
        levels = f"p50 {figure['p50']:.2f}, p90 {figure['p90']:.2f}, p95 {figure['p95']:.2f}"
        return f"{_shown(figure['mean'])}<br><small>{levels}; {negative:.0f}\u00a0%\u00a0negative</small>"
    if figure["value"] is None:
        return "none"
    value = f"{figure['value']:.3g}"
    if figure["low"] is None:
        return f"{value} <small>n {figure['n']}</small>"
    return f"{value} <small>[{figure['low']:.3g}, {figure['high']:.3g}] n {figure['n']}</small>"


def _samples(name: str, run: Run) -> str:
    briefs = [one for one in run.results["samples"] if one["task"] == name and not one["error"]]
    worst = sorted(briefs, key=lambda one: (-badness(one), one["id"], one["repeat"]))
    figures = []
    for place, brief in enumerate(worst[:SHOWN]):
        folder = run.folder / name / brief["id"] / str(brief["repeat"])
        record = read_record(folder)
        if record is None or record.get("error"):
            continue
        player = _player(run, name, brief["id"], folder) if place < PLAYED else ""
        caption = f"{brief['id']}, repeat {brief['repeat']}: {_facts(brief['event'])}"
        figures.append(
            f"<figure><figcaption>{escape(caption)}</figcaption>{timeline(record)}{player}</figure>"
        )
    if not figures:
        return ""
    title = f"{run.name}: {len(figures)} of {len(briefs)} answers, worst first"
    return f"<details open><summary>{escape(title)}</summary>{''.join(figures)}</details>"


def _facts(scores: Mapping[str, Any]) -> str:
    shown = []
    for metric, value in scores.items():
        if isinstance(value, float):
            value = f"{value:.2f}" if math.isfinite(value) else "none"
        shown.append(f"{metric} {'none' if value is None else value}")
    return ", ".join(shown)


def _player(run: Run, task: str, sample: str, folder: Path) -> str:
    """User on the left, agent on the right, as Opus inside the page; of the agent alone without the data."""
    try:
        sound = []
        user = next((one for one in _recordings(run.data, task, sample) if one.is_file()), None)
        if user is not None:
            pcm, rate = read_wav(user)
            sound.append(resample(pcm[0], rate, SAMPLE_RATE))
        agent, rate = read_wav(folder / "output.wav")
        heard = resample(sound[0], SAMPLE_RATE, RATE) if sound else np.zeros(0, np.float32)
        sound.append(resample(agents_channel(agent, rate, heard), rate, SAMPLE_RATE))
    except (OSError, BadAudio):
        return ""
    length = max(map(len, sound))
    joined = np.stack([np.pad(one, (0, length - len(one))) for one in sound], axis=1)
    file = io.BytesIO()
    soundfile.write(file, np.clip(joined, -1, 1), SAMPLE_RATE, format="OGG", subtype="OPUS")
    coded = base64.b64encode(file.getvalue()).decode()
    return f'<audio controls preload="none" src="data:audio/ogg;base64,{coded}"></audio>'


def _recordings(data: Path | None, task: str, sample: str) -> list[Path]:
    return [] if data is None else [data / root / task / sample / "input.wav" for root in ROOTS]


def _errors(run: Run) -> str:
    rows = [
        [escape(TASKS[one["task"]].title), escape(str(one["id"])), escape(str(one["reason"]))]
        for one in run.results["errors"]
    ]
    if not rows:
        return ""
    title = f"<h2>Not scored: {escape(run.name)}</h2>"
    return title + _table(("task", "sample", "reason"), rows)


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), ours: int = 0
) -> str:
    """Cells are HTML already; `numbers` are columns set to the right, the first `ours` rows stand out."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{' class=n' if number in numbers else ''}>{cell}</{tag}>"
            for number, cell in enumerate(row)
        )

    body = "".join(
        f"<tr{' class=ours' if number < ours else ''}>{cells('td', row)}</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="wide"><table><tr>{cells("th", head)}</tr>{body}</table></div>'
