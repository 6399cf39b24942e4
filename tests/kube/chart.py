"""Runs the pinned helm and kubectl; each render is made once per process."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from k8s import tools

ROOT = Path(__file__).resolve().parents[2]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
CHART = ROOT / "helm" / "personaplex"
CARDS = ("l40s", "a100", "h100", "h200")
VERSIONS = ("1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
TOKEN = "huggingFace.existingSecret=hf"

# Every values file of the chart, with what is set beside it.
CASES: Mapping[str, tuple[str, ...]] = {
    "values-dev.yaml": (),
    **{f"ci/{path.name}": () for path in sorted((CHART / "ci").glob("*-values.yaml"))},
}


def helm(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs helm; the caller looks at its return code."""
    return subprocess.run([tools.fetch().helm, *arguments], capture_output=True, text=True, **options)


@functools.cache
def template(
    values: str = "",
    sets: tuple[str, ...] = (),
    version: str = "1.34",
    chart: Path = CHART,
    release: str = "talk",
) -> subprocess.CompletedProcess[str]:
    """`helm template` of one combination."""
    arguments = ["template", release, str(chart), "--namespace", "speech", "--kube-version", version]
    if values:
        arguments += ["--values", str(chart / values)]
    for item in sets:
        arguments += ["--set", item]
    return helm(*arguments)


@functools.cache
def render(
    values: str = "", sets: tuple[str, ...] = (), version: str = "1.34", chart: Path = CHART
) -> list[Any]:
    """The documents of one combination; fails with helm's message."""
    done = template(values, sets, version, chart=chart)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.load_all(done.stdout, Loader=LOADER) if document]


def refused(*sets: str, values: str = "ci/minimal-values.yaml") -> str:
    """Helm's message about values that must not render."""
    done = template(values, sets)
    assert done.returncode != 0, f"rendered although {sets} is wrong"
    return done.stderr


def only(documents: list[Any], kind: str) -> Any:
    """The one document of a kind."""
    (found,) = (document for document in documents if document["kind"] == kind)
    return found


def pod_templates(documents: list[Any]) -> dict[str, Any]:
    """Name -> pod template (or Pod) of everything that makes pods."""
    found: dict[str, Any] = {}
    for document in documents:
        name = document["metadata"]["name"]
        if document["kind"] == "RayService":
            cluster = document["spec"]["rayClusterConfig"]
            found["head"] = cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                found[group["groupName"]] = group["template"]
        elif document["kind"] == "Job":
            found[name] = document["spec"]["template"]
        elif document["kind"] == "Pod":
            found[name] = document
    return found


@functools.cache
def kustomize(folder: Path) -> list[Any]:
    """Documents of `kubectl kustomize`."""
    command = [tools.fetch().kubectl, "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.load_all(done.stdout, Loader=LOADER) if document]
