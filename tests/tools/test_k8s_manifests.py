"""The raw manifests: valid, and the same as the chart in everything but Helm's labels."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from kube import chart, kuberay, schemas

sys.path.insert(0, str(chart.ROOT / "helm"))
import manifests

FOLDERS = {"base": (), **{f"overlays/{name}": options for name, options in manifests.OVERLAYS.items()}}


def _by_name(documents: list[Any]) -> dict[str, Any]:
    return {f"{item['kind']}-{item['metadata']['name']}".lower(): item for item in documents}


@pytest.mark.parametrize("version", chart.VERSIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_manifests_are_valid(folder: str, version: str) -> None:
    documents = chart.kustomize(chart.ROOT / "k8s" / folder)
    for document in documents:
        schemas.validate(document, version)
    assert kuberay.violations(chart.only(documents, "RayService")) == []


@pytest.mark.parametrize(("folder", "options"), FOLDERS.items())
def test_manifests_say_what_the_chart_says(folder: str, options: tuple[str, ...]) -> None:
    built = _by_name(chart.kustomize(chart.ROOT / "k8s" / folder))
    assert built == manifests.rendered(options)


def test_key_fields_survive_the_way_from_the_values() -> None:
    """Not only equal to the chart, but what an h100 user wants: spelt out, should both be wrong together."""
    service = chart.only(chart.kustomize(chart.ROOT / "k8s/overlays/h100"), "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    gpu = next(group for group in cluster["workerGroupSpecs"] if group["groupName"] == "gpu")
    pod = gpu["template"]["spec"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert "slots: 32" in service["spec"]["serveConfigV2"]
    assert "model: 7b" in service["spec"]["serveConfigV2"]


def test_a_merge_patch_turns_one_into_the_other() -> None:
    old = {"a": 1, "b": {"c": 2, "d": 3}, "gone": {"x": 1}, "list": [1, 2]}
    new = {"a": 1, "b": {"c": 2, "d": 4}, "list": [1], "more": {"y": 0}}
    patch = manifests.difference(old, new)
    assert patch == {"b": {"d": 4}, "gone": None, "list": [1], "more": {"y": 0}}
