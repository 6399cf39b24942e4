"""Raw manifests from the chart, for those who do not use Helm: `k8s/base` and its overlays.

One source: a manifest is a render of the chart without Helm's labels, an overlay the JSON merge patch (RFC
7386) from the base's RayService to that of other values. `python helm/generate.py` writes them.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from k8s import tools

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "personaplex"
BASE = ROOT / "k8s" / "base"
TOKEN = "huggingFace.existingSecret=hf"
OVERLAYS = {"dev": ("--values", "values-dev.yaml"), "h100": ("--set", "card=h100")}
HELM_LABELS = ("helm.sh/chart", "app.kubernetes.io/managed-by")
HEADER = "# Made from the chart by: python helm/generate.py\n"


def rendered(options: tuple[str, ...] = ()) -> dict[str, Any]:
    """`kind-name` -> document by these options, without what only Helm needs (labels, the test hook)."""
    command = [str(tools.fetch().helm), "template", "personaplex", ".", "--set", TOKEN, *options]
    text = subprocess.run(command, cwd=CHART, capture_output=True, text=True, check=True).stdout
    documents = [item for item in yaml.safe_load_all(text) if item and item["kind"] != "Pod"]
    return {f"{item['kind']}-{item['metadata']['name']}".lower(): _without_helm(item) for item in documents}


def files() -> dict[Path, str]:
    """Every generated manifest and its text."""
    base = rendered()
    found = {BASE / f"{name}.yaml": HEADER + _yaml(item) for name, item in base.items()}
    found[BASE / "kustomization.yaml"] = HEADER + _yaml(
        _kustomization(resources=sorted(f"{n}.yaml" for n in base))
    )
    for overlay, options in OVERLAYS.items():
        folder, wanted = ROOT / "k8s" / "overlays" / overlay, rendered(options)
        assert set(wanted) <= set(base), "an overlay can change and drop documents, not add any"
        patches = []
        for name, item in sorted(base.items()):
            patch = difference(item, wanted[name]) if name in wanted else {"$patch": "delete"}
            if patch:
                identity = {"apiVersion": item["apiVersion"], "kind": item["kind"]}
                metadata = {"name": item["metadata"]["name"], **patch.pop("metadata", {})}
                found[folder / f"{name}.yaml"] = HEADER + _yaml({**identity, "metadata": metadata, **patch})
                patches.append({"path": f"{name}.yaml"})
        found[folder / "kustomization.yaml"] = HEADER + _yaml(
            _kustomization(resources=["../../base"], patches=patches)
        )
    return found


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The merge patch that turns `old` into `new`; lists are replaced whole."""
    patch: dict[str, Any] = {name: None for name in old if name not in new}
    for name, value in new.items():
        if isinstance(value, dict) and isinstance(old.get(name), dict):
            inner = difference(old[name], value)
            if inner:
                patch[name] = inner
        elif name not in old or old[name] != value:
            patch[name] = value
    return patch


def _kustomization(**fields: Any) -> dict[str, Any]:
    return {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **fields}


def _without_helm(item: Any) -> Any:
    """The same document with Helm's labels gone, wherever they are."""
    if isinstance(item, dict):
        return {name: _without_helm(value) for name, value in item.items() if name not in HELM_LABELS}
    return [_without_helm(value) for value in item] if isinstance(item, list) else item


class _Dumper(yaml.SafeDumper):
    pass


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """Text of several lines as a block, so that a Serve config can be read."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def _yaml(item: Any) -> str:
    return yaml.dump(item, Dumper=_Dumper, sort_keys=False, width=100)
