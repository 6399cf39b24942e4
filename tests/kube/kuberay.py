"""What the KubeRay operator refuses, as far as this chart could run into it, and what its releases know.

From the validation of KubeRay's ray-operator (1.5 to 1.7): it has no admission webhook by default, so a wrong
RayService is accepted by the API server and then never served. `tests/data/kuberay` holds the schemas of its
RayService (v1), one for each release, without descriptions.
"""

from __future__ import annotations

import functools
import gzip
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema

from kube import chart

RELEASES = ("1.5.1", "1.6.2", "1.7.0")  # of which every render must be valid; 1.5.0 lacks authentication
_AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
_DURATION = re.compile(r"([0-9]+(\.[0-9]+)?(ns|us|ms|s|m|h))+")


@functools.cache
def schema(release: str) -> Any:
    """The schema of RayService in the CustomResourceDefinition of one release."""
    path = chart.ROOT / "tests" / "data" / "kuberay" / f"rayservice-{release}.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


def definition(release: str) -> Any:
    """The CustomResourceDefinition as far as anybody here reads it."""
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema(release)}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": "rayservices.ray.io"},
        "spec": {"group": "ray.io", "versions": [version]},
    }


def check(service: Any, release: str) -> None:
    """Raises jsonschema.ValidationError; a field that the release does not know is an error."""
    _validator(release).validate(service)


@functools.cache
def _validator(release: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(_closed(schema(release)))


def _closed(part: Any) -> Any:
    """The same schema with every object that names its fields closed to others."""
    if isinstance(part, list):
        return [_closed(inner) for inner in part]
    if not isinstance(part, dict):
        return part
    found = {name: _closed(inner) for name, inner in part.items()}
    if part.get("type") == "object" and isinstance(part.get("properties"), dict):
        found.setdefault("additionalProperties", False)
    return found


def violations(service: Any) -> list[str]:
    """All rules that a RayService breaks."""
    return [*_metadata(service["metadata"]), *_upgrade(service["spec"]), *_cluster(service)]


def _metadata(metadata: Any) -> Iterator[str]:
    if len(metadata["name"]) > 47:
        yield "RayService name has more than 47 characters"
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", metadata["name"]):
        yield "RayService name is not a DNS-1035 label"
    timeout = metadata.get("annotations", {}).get("ray.io/initializing-timeout", "")
    if timeout and not (_DURATION.fullmatch(timeout) or (timeout.isdigit() and int(timeout) > 0)):
        yield "ray.io/initializing-timeout is no positive duration"


def _upgrade(spec: Any) -> Iterator[str]:
    if spec.get("upgradeStrategy", {}).get("type") not in ("NewCluster", "None"):
        yield "an upgrade strategy that strands the chart's own routes"
    if spec.get("rayClusterDeletionDelaySeconds", 60) < 0:
        yield "rayClusterDeletionDelaySeconds is negative"
    if "name" in spec["rayClusterConfig"]["headGroupSpec"].get("headService", {}).get("metadata", {}):
        yield "headService must not have a name"


def _cluster(service: Any) -> Iterator[str]:
    cluster = service["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]
    groups = [("head", head), *((group["groupName"], group) for group in cluster.get("workerGroupSpecs", []))]
    for name, group in groups:
        yield from _group(name, group, bool(cluster.get("enableInTreeAutoscaling")))
    ports = {port.get("name") for port in _ray(head).get("ports", [])}
    if "serve" not in ports:
        yield "the head container has no port named serve"
    yield from _redis(service, cluster, head)
    variables = _environment(head)
    options = cluster.get("autoscalerOptions", {})
    if _AUTOSCALER_V2 in variables and ("version" in options or not cluster.get("enableInTreeAutoscaling")):
        yield f"{_AUTOSCALER_V2} conflicts with the spec"
    if cluster.get("authOptions", {}).get("mode") == "token":
        version = tuple(int(part) for part in cluster.get("rayVersion", "0").split(".")[:2])
        if version < (2, 52):
            yield "authOptions.mode token needs rayVersion 2.52"


def _group(name: str, group: Any, autoscaled: bool) -> Iterator[str]:
    params = group.get("rayStartParams", {})
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(params):
        yield f"{name}: resources in both rayStartParams and resources"
    if "labels" in params:
        yield f"{name}: labels in rayStartParams"
    if not group["template"]["spec"].get("containers"):
        yield f"{name}: no container"
    if autoscaled and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
        yield f"{name}: restartPolicy must be Never or unset with autoscaler v2"
    if autoscaled and group.get("suspend"):
        yield f"{name}: suspended with the autoscaler"


def _redis(service: Any, cluster: Any, head: Any) -> Iterator[str]:
    variables, params = _environment(head), head.get("rayStartParams", {})
    annotations = service["metadata"].get("annotations", {})
    if "redis-username" in params or "REDIS_USERNAME" in variables:
        yield "redis username outside gcsFaultToleranceOptions"
    if "gcsFaultToleranceOptions" in cluster:
        if "redis-password" in params or {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} & variables:
            yield "redis settings outside gcsFaultToleranceOptions"
        if {"ray.io/ft-enabled", "ray.io/external-storage-namespace"} & set(annotations):
            yield "redis annotations beside gcsFaultToleranceOptions"
    elif "RAY_REDIS_ADDRESS" in variables:
        yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"


def _ray(group: Any) -> Any:
    return group["template"]["spec"]["containers"][0]


def _environment(group: Any) -> set[str]:
    return {variable["name"] for variable in _ray(group).get("env", [])}
