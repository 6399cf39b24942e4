"""Which fields of a manifest would the cluster's KubeRay not know?

The API server removes unknown fields of a custom resource in silence: with an older operator a RayService
that asks for authentication is stored, and served, without it. What an operator knows is in the schema of its
CustomResourceDefinition, so that no table of versions has to be believed; FLOORS only says what to install.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
FLOORS = {  # field -> the first KubeRay that knows it, for those newer than 1.5.0
    "spec.rayClusterConfig.authOptions": "1.5.1",
    "spec.rayClusterConfig.authOptions.secretName": "1.6",
}


def schema_of(definition: Any, version: str = "v1") -> Any:
    """The schema of one version in a CustomResourceDefinition; None when that version is not served."""
    for item in definition["spec"]["versions"]:
        if item["name"] == version and item.get("served", True):
            return item.get("schema", {}).get("openAPIV3Schema", {})
    return None


def dropped(schema: Any, item: Any) -> list[str]:
    """Paths of the fields of a whole object that its schema does not have; a list's items share one path."""
    body = {name: value for name, value in item.items() if name not in ("apiVersion", "kind", "metadata")}
    return list(dict.fromkeys(_dropped(schema, body, "")))


def floor(path: str) -> str:
    """`, which needs KubeRay 1.6` for a field whose first version is known, else nothing."""
    version = FLOORS.get(path)
    return f", which needs KubeRay {version} or later" if version else ""


def _dropped(schema: Any, value: Any, path: str) -> Iterator[str]:
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    if isinstance(value, list):
        for entry in value:
            yield from _dropped(schema.get("items", {}), entry, f"{path}[]")
    elif isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        for name, inner in value.items():
            place = f"{path}.{name}" if path else name
            if name in known:
                yield from _dropped(known[name], inner, place)
            elif isinstance(others, dict):
                yield from _dropped(others, inner, place)
            elif not others:
                yield place
