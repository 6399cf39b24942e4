"""What docs/kubernetes.md tells people to type and to expect exists."""

from __future__ import annotations

import re

import yaml
from kube import chart

from k8s import __main__ as tool
from k8s import sizing

TEXT = (chart.ROOT / "docs" / "kubernetes.md").read_text()


def test_commands_of_the_tool_exist() -> None:
    commands = set(re.findall(r"python -m k8s (\w[\w-]*)", TEXT))
    assert {"preflight", "rollout", "smoke", "sessions"} <= commands
    (choices,) = (action.choices for action in tool._parser()._actions if action.dest == "command")
    assert commands <= set(choices)


def test_values_that_are_named_exist() -> None:
    values = yaml.safe_load((chart.CHART / "values.yaml").read_text())
    roots = "|".join(values)
    named = set(re.findall(rf"`((?:{roots})\.[\w.]+)", TEXT))
    assert len(named) > 10
    for name in named - {"replicaGroups.*.minPods"}:
        place = values
        parts = name.split(".")
        if parts[0] == "settings":
            assert parts[1] in chart_settings(), name
            continue
        for part in parts:
            assert part in place, name
            place = place[part]


def chart_settings() -> set[str]:
    schema = yaml.safe_load((chart.CHART / "values.schema.json").read_text())
    return set(schema["$defs"]["settings"]["properties"])


def test_files_that_are_named_exist() -> None:
    for name in set(re.findall(r"(?:helm/personaplex|k8s|docs)/[\w./-]+\w", TEXT)):
        if "{" not in name:
            assert (chart.ROOT / name).exists(), name


def test_the_table_of_slots_is_what_is_computed() -> None:
    rows = dict(re.findall(r"^\| `values-(\w+)\.yaml` \| .* \| (\d+) \|$", TEXT, re.MULTILINE))
    assert {card: int(slots) for card, slots in rows.items()} == {
        card: sizing.slots(data) for card, data in sizing.CARDS.items()
    }


def test_alerts_and_exit_codes_that_are_named_exist() -> None:
    rules = (chart.CHART / "rules" / "personaplex.yaml").read_text()
    for alert in set(re.findall(r"`(Personaplex\w+)`", TEXT)):
        assert f"alert: {alert}\n" in rules


def test_what_was_not_shown_says_how_to_show_it() -> None:
    section = TEXT.split("## Not shown without a cluster")[1]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE)[2:]
    assert len(rows) >= 8
    assert all(command.strip() for _, command in rows)
