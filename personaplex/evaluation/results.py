"""Records of samples to the figures of a run: `results.json`.

Its form is `personaplex/data/evaluation-results.schema.json`. Nothing in it depends on the time, the order or
the batch in which samples were answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from personaplex.evaluation.dataset import TASKS, Dataset, TaskKind, counted
from personaplex.evaluation.statistics import Groups, distribution, mean, share

Record = Mapping[str, Any]
Figures = dict[str, Any]

SCHEMA_VERSION = 1
RESULTS_FILE = "results.json"


def results(
    records: Sequence[Record], dataset: Dataset, run: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """All figures. `run`: the settings the answers were made with; `source`: where their words came from."""
    ordered = sorted(records, key=lambda one: (list(TASKS).index(one["task"]), one["id"], one["repeat"]))
    tasks = {}
    for name, task in TASKS.items():
        mine = [one for one in ordered if one["task"] == name]
        if mine:
            tasks[name] = {"title": task.title, "kind": task.kind, **_figures(task.kind, mine)}
    errors = [
        {"task": one["task"], "id": one["id"], "repeat": one["repeat"], "reason": one["error"]}
        for one in ordered
        if one["error"]
    ]
    unusable = [
        {"task": one.task, "id": one.id, "repeat": None, "reason": one.reason} for one in dataset.faults
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "run": dict(run),
        "transcript": source,
        "synthetic": dataset.synthetic,
        "dataset": counted(dataset),
        "tasks": tasks,
        "errors": [*unusable, *errors],
        "samples": [_brief(one) for one in ordered],
    }


def _figures(kind: TaskKind, records: Sequence[Record]) -> Figures:
    scored = [one for one in records if not one["error"]]
    official, event = _OFFICIAL[kind], _EVENT[kind]
    unheard = [(one["id"], one["unheard"]) for one in scored if one.get("unheard") is not None]
    return {
        "answers": len(records),
        "scored": len(scored),
        "official": {name: figure(scored) for name, figure in official.items()},
        "event": {name: figure(scored) for name, figure in event.items()},
        "unheard": mean(_grouped(unheard)),
    }


def _brief(record: Record) -> dict[str, Any]:
    names = ("task", "id", "repeat", "seconds", "official", "event", "rating", "error")
    return {name: record[name] for name in names if name in record}


def _grouped(values: Iterable[tuple[str, float]]) -> Groups:
    groups: dict[str, list[float]] = {}
    for name, value in values:
        groups.setdefault(name, []).append(float(value))
    return groups


Figure = Callable[[Sequence[Record]], dict[str, Any]]


def _of(profile: str, name: str, how: Callable[[Groups], dict[str, Any]]) -> Figure:
    """A figure over all samples whose `profile` has a value called `name`; a list counts each of its own."""

    def figure(records: Sequence[Record]) -> dict[str, Any]:
        values: list[tuple[str, float]] = []
        for one in records:
            value = one[profile].get(name)
            listed = value if isinstance(value, list) else [] if value is None else [value]
            values += [(one["id"], each) for each in listed]
        return how(_grouped(values))

    return figure


def _rating(name: str, profile: str = "", of: str = "") -> Figure:
    """Mean rating of those that were rated, of samples whose `profile` says so in `of` only."""

    def figure(records: Sequence[Record]) -> dict[str, Any]:
        values = []
        for one in records:
            rating = (one.get("rating") or {}).get(name)
            if rating is not None and (not of or one[profile].get(of)):
                values.append((one["id"], rating))
        return mean(_grouped(values))

    return figure


def _uncensored(records: Sequence[Record]) -> dict[str, Any]:
    stopped = [one for one in records if one["event"]["stop"] is not None and not one["event"]["censored"]]
    return distribution(_grouped((one["id"], one["event"]["stop"]) for one in stopped))


def _censored(records: Sequence[Record]) -> dict[str, Any]:
    spoke = [one for one in records if one["event"]["spoke"]]
    return share(_grouped((one["id"], one["event"]["censored"]) for one in spoke))


def _behaviour(name: str) -> Figure:
    def figure(records: Sequence[Record]) -> dict[str, Any]:
        found = [(one["id"], (one.get("rating") or {}).get("behaviour")) for one in records]
        return share(_grouped((sample, value == name) for sample, value in found if value is not None))

    return figure


BEHAVIOURS = ("respond", "resume", "uncertain", "unknown")
_ANSWER = {
    "takeover": _of("official", "takeover", share),
    "latency": _of("official", "latency", mean),
    "clamped": _of("official", "clamped", share),
}
_BACKCHANNEL = ("events", "frequency", "jsd")
_STOPPING: Mapping[str, Figure] = {
    "spoke": _of("event", "spoke", share),
    "stop": _uncensored,
    "never_stopped": _censored,
    "response": _of("event", "response", distribution),
    "answered": _of("event", "answered", share),
}
_OFFICIAL: Mapping[TaskKind, Mapping[str, Figure]] = {
    "pause": {"takeover": _ANSWER["takeover"]},
    "turn": _ANSWER,
    "backchannel": {
        "takeover": _ANSWER["takeover"],
        **{name: _of("official", name, mean) for name in _BACKCHANNEL},
    },
    "interruption": {**_ANSWER, "rating": _rating("relevance", "official", "takeover")},
    "overlap": {
        "stop": _of("official", "stop", mean),
        "response": _of("official", "response", mean),
        **{f"behaviour_{name}": _behaviour(name) for name in BEHAVIOURS},
    },
    "service": {"rating": _rating("naturalness"), "adherence": _rating("adherence")},
}
_EVENT: Mapping[TaskKind, Mapping[str, Figure]] = {
    "pause": {"takeover": _of("event", "takeover", share), "nvidia": _of("event", "nvidia", share)},
    "turn": {"answered": _of("event", "answered", share), "latency": _of("event", "latency", distribution)},
    "backchannel": {
        "takeover": _of("event", "takeover", share),
        **{name: _of("event", name, mean) for name in _BACKCHANNEL},
    },
    "interruption": _STOPPING,
    "overlap": {
        **_STOPPING,
        "held": _of("event", "held", share),
        "pace_before": _of("event", "pace_before", mean),
        "pace_after": _of("event", "pace_after", mean),
    },
    "service": {
        "answered": _of("event", "answered", share),
        "latency": _of("event", "latency", distribution),
    },
}


UNANSWERED = 10.0  # in `badness`, more than the latest answer


def badness(sample: Record) -> float:
    """How far an answer is from what its task wants, for the order in a report; larger is worse."""
    if sample["error"]:
        return float("inf")
    found = sample["event"]
    match TASKS[sample["task"]].kind:
        case "pause":
            worse = 2 * found["takeover"] + found["nvidia"]
        case "turn" | "service":
            worse = abs(found["latency"]) if found["answered"] else UNANSWERED
        case "backchannel":
            worse = 2 * found["takeover"] + (1 if found["jsd"] is None else found["jsd"])
        case "interruption" | "overlap":
            late = abs(found["response"]) if found["answered"] else UNANSWERED
            worse = late + UNANSWERED * found["censored"] + (found["stop"] or 0)
    return float(worse)
