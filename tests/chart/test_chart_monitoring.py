"""Rules and dashboards: they name only series the service publishes, and alerts fire when they should."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube import chart

from deployments import metrics
from personaplex import errors

RULES = chart.CHART / "rules" / "personaplex.yaml"
DASHBOARDS = sorted((chart.CHART / "dashboards").glob("*.json"))
FORMS = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
PUBLISHED = {f"ray_{series.name}{form}" for series in metrics.ALL for form in FORMS[series.kind]}
LABELS = {series.name: {*series.labels} for series in metrics.ALL}


def _expressions(item: Any) -> Iterator[str]:
    """All PromQL in a rules file or a dashboard."""
    if isinstance(item, dict):
        for name, value in item.items():
            if name in ("expr", "query") and isinstance(value, str):
                yield value
            yield from _expressions(value)
    elif isinstance(item, list):
        for value in item:
            yield from _expressions(value)


def _rules() -> Any:
    return yaml.safe_load(RULES.read_text())


def _recorded() -> set[str]:
    return {rule["record"] for group in _rules()["groups"] for rule in group["rules"] if "record" in rule}


@pytest.mark.parametrize("path", [RULES, *DASHBOARDS], ids=lambda path: path.name)
def test_every_series_that_is_named_exists(path: Path) -> None:
    expressions = list(_expressions(yaml.safe_load(path.read_text())))
    named = {name for text in expressions for name in re.findall(r"\bray_\w+", text)}
    assert named, "nothing is looked at"
    assert named <= PUBLISHED
    own = {name for text in expressions for name in re.findall(r"\bpersonaplex:[\w:]+", text)}
    assert own <= _recorded()


@pytest.mark.parametrize("path", [RULES, *DASHBOARDS], ids=lambda path: path.name)
def test_every_cause_and_place_that_is_named_exists(path: Path) -> None:
    """An error class that was renamed would leave an alert that never fires."""
    for text in _expressions(yaml.safe_load(path.read_text())):
        for series, matchers in re.findall(r"ray_(\w+?)(?:_total|_bucket|_count)?\{([^}]*)\}", text):
            labels = set(re.findall(r"(\w+)[=!]~?\"", matchers)) - {"namespace", "pod", "le"}
            assert labels <= LABELS[series], text
        for values in re.findall(r"cause=~?\"([^\"]+)\"", text):
            for name in values.split("|"):
                assert issubclass(getattr(errors, name), errors.PersonaplexError)


def test_thresholds_are_buckets() -> None:
    """A quantile at 80 ms is exact only where a bucket ends there."""
    bounds = {float(bound) for text in _expressions(_rules()) for bound in re.findall(r'le="([\d.]+)"', text)}
    assert bounds
    assert bounds <= set(metrics.TICK_SECONDS.buckets) & set(metrics.FRAME_SECONDS.buckets)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_dashboards_load(path: Path) -> None:
    """What Grafana needs of a provisioned dashboard: identity, panels in place, one data source variable."""
    dashboard = json.loads(path.read_text())
    assert dashboard["uid"]
    assert dashboard["title"]
    assert dashboard["schemaVersion"] >= 39
    assert "id" not in dashboard  # given by Grafana
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["datasource"]["uid"] == "${datasource}"
            assert [target["refId"] for target in panel["targets"]] == sorted(
                {target["refId"] for target in panel["targets"]}
            )
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert set(re.findall(r"\$\{?(\w+)", path.read_text())) <= variables | {"__rate_interval", "__all"}


def test_rules_and_dashboards_reach_the_cluster_unchanged() -> None:
    documents = chart.render("ci/everything-values.yaml")
    assert chart.only(documents, "PrometheusRule")["spec"] == _rules()
    for path in DASHBOARDS:
        (found,) = (item for item in documents if item["kind"] == "ConfigMap" and path.name in item["data"])
        assert json.loads(found["data"][path.name]) == json.loads(path.read_text())
        assert found["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_the_pod_monitor_scrapes_ports_that_are_there() -> None:
    documents = chart.render("ci/everything-values.yaml")
    wanted = {
        endpoint["port"] for endpoint in chart.only(documents, "PodMonitor")["spec"]["podMetricsEndpoints"]
    }
    templates = chart.pod_templates(documents)
    named = {
        name: {port["name"] for port in template["spec"]["containers"][0].get("ports", [])}
        for name, template in templates.items()
    }
    assert wanted <= named["head"]
    assert all("metrics" in named[name] for name in ("gateway", "gpu", "spot"))


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is missing: apt-get install prometheus"
)
def test_alerts_fire_when_they_should(tmp_path: Path) -> None:
    shutil.copy(RULES, tmp_path / "rules.yaml")
    shutil.copy(chart.ROOT / "tests/data/chart/rules-test.yaml", tmp_path)
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", "rules-test.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
