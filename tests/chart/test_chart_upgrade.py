"""What an upgrade changes: a new rayClusterConfig makes KubeRay start a second cluster, with all its GPUs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube import chart

VALUES = "ci/everything-values.yaml"


def _copy(folder: Path, **fields: str) -> Path:
    """The chart with other fields in Chart.yaml."""
    copy = folder / "personaplex"
    shutil.copytree(chart.CHART, copy)
    text = (copy / "Chart.yaml").read_text()
    for name, value in fields.items():
        text, count = re.subn(rf"^{name}: .*$", f"{name}: {value}", text, flags=re.MULTILINE)
        assert count == 1
    (copy / "Chart.yaml").write_text(text)
    return copy


def _cluster(documents: list[Any]) -> Any:
    return chart.only(documents, "RayService")["spec"]["rayClusterConfig"]


@pytest.mark.parametrize("values", [VALUES, "values-dev.yaml"])
def test_a_chart_version_bump_starts_no_cluster(values: str, tmp_path: Path) -> None:
    bumped = chart.render(values, chart=_copy(tmp_path, version="9.9.9"))
    assert _cluster(bumped) == _cluster(chart.render(values))
    assert bumped != chart.render(values)  # the version is on the objects themselves


@pytest.mark.parametrize(
    "change",
    [
        "commonLabels.team=other",
        "operator.create=false",
        "monitoring.podMonitor.interval=60s",
        "ingress.hosts[0]=other.example",
        "settings.slots=9",
        "settings.spare_slots=2",
        "networkPolicy.enabled=false",
        "timeouts.clusterDeletionDelaySeconds=9000",
    ],
)
def test_changes_that_start_no_cluster(change: str) -> None:
    assert _cluster(chart.render(VALUES, (change,))) == _cluster(chart.render(VALUES))


@pytest.mark.parametrize(
    "change", ["image.digest=sha256:" + "2" * 64, "settings.session_limit_s=7200", "serve.haProxy=false"]
)
def test_changes_that_do(change: str) -> None:
    assert _cluster(chart.render(VALUES, (change,))) != _cluster(chart.render(VALUES))


def test_a_new_app_version_is_a_new_image_and_nothing_else(tmp_path: Path) -> None:
    values = "ci/minimal-values.yaml"
    bumped = yaml.safe_dump(_cluster(chart.render(values, chart=_copy(tmp_path, appVersion='"9.9.9"'))))
    version = yaml.safe_load((chart.CHART / "Chart.yaml").read_text())["appVersion"]
    assert bumped.replace(":9.9.9\n", f":{version}\n") == yaml.safe_dump(_cluster(chart.render(values)))


def test_an_upgrade_keeps_what_the_autoscaler_has_scaled() -> None:
    """`replicas` in a worker group would reset the autoscaler's number at every upgrade."""
    groups = _cluster(chart.render(VALUES))["workerGroupSpecs"]
    assert not any("replicas" in group for group in groups)
    static = _cluster(chart.render("ci/static-values.yaml"))["workerGroupSpecs"]
    assert all(group["replicas"] == group["minReplicas"] == group["maxReplicas"] for group in static)


@pytest.mark.parametrize(
    "change",
    [
        "image.digest=sha256:" + "2" * 64,
        "settings.hf_revision=abc",
        "weights.prefetch.resources.limits.memory=8Gi",
        "weights.claim.subPath=other",
        "huggingFace.tokenKey=other",
    ],
)
def test_whatever_changes_a_jobs_template_makes_another_job(change: str) -> None:
    """A Job's template is immutable: an upgrade that changed one in place would fail."""
    first, second = (
        chart.only(chart.render(VALUES), "Job"),
        chart.only(chart.render(VALUES, (change,)), "Job"),
    )
    assert first["spec"]["template"] != second["spec"]["template"]
    assert first["metadata"]["name"] != second["metadata"]["name"]


def test_what_does_not_change_it_keeps_the_job() -> None:
    first = chart.only(chart.render(VALUES), "Job")
    for change in (
        "settings.slots=9",
        "weights.prefetch.activeDeadlineSeconds=60",
        "commonLabels.team=other",
    ):
        assert (
            chart.only(chart.render(VALUES, (change,)), "Job")["metadata"]["name"]
            == first["metadata"]["name"]
        )


def test_another_download_of_the_same_weights_starts_no_cluster() -> None:
    """Replicas wait for a marker that names the weights, not the Job."""
    change = ("weights.prefetch.resources.limits.memory=8Gi",)
    assert _cluster(chart.render(VALUES, change)) == _cluster(chart.render(VALUES))


def test_a_jobs_name_fits_a_label() -> None:
    job = chart.only(chart.render(VALUES, ("fullnameOverride=a" + "-bcdefghi" * 5,)), "Job")
    assert len(job["metadata"]["name"]) <= 63
