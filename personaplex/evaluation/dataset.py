"""The benchmark's folders as samples: Full-Duplex-Bench v1.0 and v1.5, and ServiceDuplexBench's layout.

    DATA/{task}/{ID}/input.wav, and what the task has beside it; {task} also below v1_0, v1.0, v1_5 or v1.5

Nothing is shipped and nothing fetched. A sample that lacks a file or holds something else than its task
asks for is a listed fault; the rest is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from personaplex.errors import ConfigError
from personaplex.evaluation.speech import Span
from personaplex.files import read_bounded

TaskKind = Literal["pause", "turn", "backchannel", "interruption", "overlap", "service"]

TRUTH_FILE = "truth.json"  # beside samples of the synthetic set
ROOTS = ("", "v1_0", "v1.0", "v1_5", "v1.5")
CASUAL, TEACHER = "casual", "assistant"  # keys of persona.PROMPTS
_FILE_LIMIT = 2**24  # bytes of one JSON file
_LONGEST_S = 86_400.0


@dataclass(frozen=True)
class Task:
    """One folder of samples. `declared`: how many its authors name, 0 if they do not. `prompt`: the role the
    agent gets, a key of persona.PROMPTS, "" where each sample brings its own. `outputs`: stems of the files
    the agent's answers go to, each with the recording that it answers."""

    name: str
    title: str
    kind: TaskKind
    declared: int
    prompt: str
    inputs: Mapping[str, str] = field(default_factory=lambda: {"output": "input"})


_BOTH = {"output": "input", "clean_output": "clean_input"}
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("synthetic_pause_handling", "Pause handling, synthetic", "pause", 137, CASUAL),
        Task("candor_pause_handling", "Pause handling, Candor", "pause", 216, CASUAL),
        Task("icc_backchannel", "Backchannels, ICC", "backchannel", 55, CASUAL),
        Task("candor_turn_taking", "Turn taking, Candor", "turn", 119, CASUAL),
        Task("synthetic_user_interruption", "User interruption, synthetic", "interruption", 200, TEACHER),
        Task("user_interruption", "v1.5: user interruption", "overlap", 200, TEACHER, _BOTH),
        Task("user_backchannel", "v1.5: user backchannel", "overlap", 99, TEACHER, _BOTH),
        Task("talking_to_other", "v1.5: talking to others", "overlap", 100, TEACHER, _BOTH),
        Task("background_speech", "v1.5: background speech", "overlap", 100, TEACHER, _BOTH),
        Task("service_duplex", "ServiceDuplexBench", "service", 0, ""),
    )
}


@dataclass(frozen=True)
class Sample:
    """One recording and what its task marks in it, in seconds.

    `pauses` inside the user's turn; `end` of the turn; `marked`, the interruption or overlap; `texts` are the
    user's words by role (context, question) and `prompt` the agent's role where the sample brings it.
    """

    task: str
    id: str
    folder: Path
    pauses: tuple[Span, ...] = ()
    end: float | None = None
    marked: Span | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    prompt: str | None = None

    @property
    def kind(self) -> TaskKind:
        return TASKS[self.task].kind

    def recording(self, stem: str = "input") -> Path:
        return self.folder / f"{stem}.wav"


@dataclass(frozen=True)
class Fault:
    """A sample that cannot be used, and why."""

    task: str
    id: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """Samples in order of task and ID, and what was left out."""

    samples: tuple[Sample, ...]
    faults: tuple[Fault, ...]
    found: Mapping[str, int]  # folders by task, faulty ones too

    @property
    def synthetic(self) -> bool:
        """Whether any sample was made by `synth`."""
        return any((one.folder / TRUTH_FILE).exists() for one in self.samples)


class BadSample(ValueError):
    """A sample's files are not what its task asks for; the message says which."""


def load(root: Path, tasks: Sequence[str] = (), limit: int | None = None) -> Dataset:
    """Reads the samples of `tasks` (all that are there by default), at most `limit` of each.

    Raises ConfigError for an unknown task, a named one without a folder, and when nothing is found.
    """
    for name in set(tasks) - set(TASKS):
        raise ConfigError(f"no task is called {name!r}: one of {', '.join(TASKS)}")
    samples: list[Sample] = []
    faults: list[Fault] = []
    found: dict[str, int] = {}
    for name in tasks or TASKS:
        folders = _folders(root, name)
        if tasks and not folders:
            raise ConfigError(f"there is no task {name} below {root.name}")
        if folders:
            found[name] = len(folders)
        for folder in folders[:limit]:
            try:
                samples.append(read(name, folder))
            except (OSError, ValueError, RecursionError) as error:
                faults.append(Fault(name, folder.name, _reason(error)))
    if not found:
        raise ConfigError(f"there is no task of the benchmark below {root.name}: one of {', '.join(TASKS)}")
    return Dataset(tuple(samples), tuple(faults), found)


def read(task: str, folder: Path) -> Sample:
    """One sample. Raises BadSample or OSError."""
    for stem in TASKS[task].inputs.values():
        if not (folder / f"{stem}.wav").is_file():
            raise BadSample(f"{stem}.wav is missing")
    match TASKS[task].kind:
        case "pause":
            entries = _entries(folder / "pause.json")
            return Sample(
                task, folder.name, folder, pauses=tuple(_span(one, "pause.json") for one in entries)
            )
        case "turn":
            entry = _entries(folder / "turn_taking.json")[0]
            return Sample(task, folder.name, folder, end=_span(entry, "turn_taking.json").start)
        case "interruption":
            entry = _entries(folder / "interrupt.json")[0]
            texts = {"context": _text(entry, "context"), "question": _text(entry, "interrupt")}
            return Sample(task, folder.name, folder, marked=_span(entry, "interrupt.json"), texts=texts)
        case "overlap":
            data = _object(folder / "metadata.json")
            texts = {"context": _text(data, "context_text"), "question": _text(data, "current_turn_text")}
            marked = _span(data, "metadata.json", "timestamps")
            return Sample(task, folder.name, folder, marked=marked, texts=texts)
        case "service":
            data = _object(folder / "metadata.json")
            prompt = _text(data, "prompt_text")
            if not prompt:
                raise BadSample("metadata.json: prompt_text is missing")
            texts = {"context": prompt, "question": _text(data, "question_text")}
            return Sample(task, folder.name, folder, texts=texts, prompt=prompt)
        case "backchannel":
            return Sample(task, folder.name, folder)


def expected_backchannels(path: Path) -> dict[str, list[float]]:
    """ICC's ground truth: sample ID to how likely listeners place a backchannel in each 200 ms.

    Raises ConfigError for anything else.
    """
    try:
        data = json.loads(read_bounded(path, _FILE_LIMIT))
        found = {str(name): [float(value) for value in values] for name, values in data.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path.name} is no distribution of backchannels") from error
    for name, values in found.items():
        if not values or not all(math.isfinite(value) and value >= 0 for value in values) or not sum(values):
            raise ConfigError(f"{path.name}: the distribution of {name!r} is not one")
    return found


def counted(dataset: Dataset) -> list[dict[str, Any]]:
    """Found against declared numbers of samples, by task."""
    return [
        {"task": name, "found": found, "declared": TASKS[name].declared or None}
        for name, found in dataset.found.items()
    ]


def _folders(root: Path, task: str) -> list[Path]:
    for base in ROOTS:
        folder = root / base / task
        if folder.is_dir():
            found = [one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")]
            return sorted(found, key=_natural)
    return []


def _natural(folder: Path) -> tuple[int, int, str]:
    """Numbers by value and before names."""
    name = folder.name
    return (0, int(name), name) if name.isascii() and name.isdigit() else (1, 0, name)


def _json(path: Path) -> Any:
    try:
        return json.loads(read_bounded(path, _FILE_LIMIT))
    except FileNotFoundError as error:
        raise BadSample(f"{path.name} is missing") from error
    except (ValueError, RecursionError) as error:
        raise BadSample(f"{path.name} is no JSON") from error


def _object(path: Path) -> Mapping[str, Any]:
    data = _json(path)
    if not isinstance(data, dict):
        raise BadSample(f"{path.name} holds no object")
    return data


def _entries(path: Path) -> list[Mapping[str, Any]]:
    data = _json(path)
    if not isinstance(data, list) or not data or not all(isinstance(one, dict) for one in data):
        raise BadSample(f"{path.name} holds no list of entries")
    return data


def _span(entry: Mapping[str, Any], name: str, key: str = "timestamp") -> Span:
    times = numbers(entry.get(key))
    if times is None or len(times) != 2 or not 0 <= times[0] <= times[1] <= _LONGEST_S:
        raise BadSample(f"{name}: {key} is not [start, end] in seconds")
    return Span(*times)


def numbers(value: object) -> list[float] | None:
    """A JSON list of finite numbers, else None."""
    if not isinstance(value, list):
        return None
    if not all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in value):
        return None
    try:
        floats = [float(one) for one in value]
    except OverflowError:
        return None
    return floats if all(map(math.isfinite, floats)) else None


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key, "")
    return value if isinstance(value, str) else ""


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError):
        name = Path(str(error.filename)).name if error.filename else "a file"
        return f"{name}: {error.strerror or 'cannot be read'}"
    return str(error)
