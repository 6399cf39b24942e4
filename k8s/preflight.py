"""Checks before an install or an upgrade: would this RayService run on this cluster?

    helm template NAME helm/personaplex -f VALUES -n NAMESPACE | python -m k8s preflight -n NAMESPACE

Reads only. A check that the operator may not make (nodes are cluster-wide) is a warning, not a pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from k8s import errors
from k8s.cluster import RAY, Cluster

GPU = "nvidia.com/gpu"
OLDEST_KUBERAY = (1, 5)


@dataclass(frozen=True)
class Finding:
    """`level`: ok, warn (look at it) or fail (it will not run)."""

    level: str
    text: str


def run(cluster: Cluster, documents: list[Any]) -> list[Finding]:
    """All findings about the one RayService among `documents`.

    Raises Failed when there is not exactly one, and Unreachable.
    """
    services = [item for item in documents if item and item.get("kind") == "RayService"]
    if len(services) != 1:
        raise errors.Failed(f"the manifest holds {len(services)} RayServices, not one")
    service = services[0]
    checks: list[Callable[[Cluster, Any], Iterator[Finding]]] = [name, api, operator, secrets, claims, gpus]
    return [finding for check in checks for finding in _permitted(check, cluster, service)]


def _permitted(
    check: Callable[[Cluster, Any], Iterator[Finding]], cluster: Cluster, service: Any
) -> Iterator[Finding]:
    try:
        yield from check(cluster, service)
    except errors.Forbidden as error:
        yield Finding("warn", f"{check.__name__}: not allowed to look ({error})")


def name(cluster: Cluster, service: Any) -> Iterator[Finding]:
    """KubeRay adds up to 16 characters to the name, and the result must fit a label."""
    text = service["metadata"]["name"]
    if len(text) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", text):
        yield Finding("fail", f"name {text!r}: at most 47 of a-z, 0-9 and -, beginning with a letter")
    else:
        yield Finding("ok", f"name {text}")


def api(cluster: Cluster, service: Any) -> Iterator[Finding]:
    """Discovery needs no permission."""
    try:
        kinds = {item["kind"] for item in cluster.get(RAY)["resources"]}
    except errors.NotFound:
        kinds = set()
    missing = sorted({"RayService", "RayCluster"} - kinds)
    if missing:
        yield Finding("fail", f"no {' and no '.join(missing)} in ray.io/v1: install the KubeRay operator")
    else:
        yield Finding("ok", "ray.io/v1 is served")


def operator(cluster: Cluster, service: Any) -> Iterator[Finding]:
    """The running operator's version, from its image."""
    found = cluster.list("/apis/apps/v1/deployments", labelSelector="app.kubernetes.io/name=kuberay-operator")
    if not found:
        yield Finding("warn", "no deployment labelled kuberay-operator: is the operator running?")
    for deployment in found:
        where = f"{deployment['metadata']['namespace']}/{deployment['metadata']['name']}"
        image = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
        version = re.search(r":v?(\d+)\.(\d+)", image)
        if not deployment.get("status", {}).get("availableReplicas"):
            yield Finding("fail", f"operator {where} is not available")
        if version is None:
            yield Finding("warn", f"operator {where}: no version in {image}; 1.5 or later is needed")
        elif (int(version[1]), int(version[2])) < OLDEST_KUBERAY:
            yield Finding("fail", f"operator {where} is {version[1]}.{version[2]}; 1.5 or later is needed")
        else:
            yield Finding("ok", f"operator {where} {version[1]}.{version[2]}")


def secrets(cluster: Cluster, service: Any) -> Iterator[Finding]:
    """Every Secret and key that the pods refer to."""
    for secret, keys in sorted(_references(service["spec"]["rayClusterConfig"]).items()):
        try:
            data = cluster.get(cluster.path("secrets", secret)).get("data") or {}
        except errors.NotFound:
            yield Finding("fail", f"no secret {secret}")
            continue
        missing = sorted(keys - set(data))
        if missing:
            yield Finding("fail", f"secret {secret} has no key {', '.join(missing)}")
        else:
            yield Finding("ok", f"secret {secret}")


def claims(cluster: Cluster, service: Any) -> Iterator[Finding]:
    """Volume claims exist, are bound, and can be mounted by as many pods as there may be."""
    users: dict[str, int] = {}
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        for volume in group["template"]["spec"].get("volumes", []):
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                users[claim] = users.get(claim, 0) + group["maxReplicas"]
    for claim, pods in sorted(users.items()):
        try:
            found = cluster.get(cluster.path("persistentvolumeclaims", claim))
        except errors.NotFound:
            yield Finding("fail", f"no claim {claim}")
            continue
        modes, phase = set(found["spec"]["accessModes"]), found.get("status", {}).get("phase")
        if phase != "Bound":
            yield Finding("warn", f"claim {claim} is {phase}: some volumes are bound at first use")
        if pods > 1 and not modes & {"ReadWriteMany", "ReadOnlyMany"}:
            yield Finding("fail", f"claim {claim} is {', '.join(sorted(modes))}: {pods} pods cannot share it")
        else:
            yield Finding("ok", f"claim {claim}")


def gpus(cluster: Cluster, service: Any) -> Iterator[Finding]:
    """Free GPUs where each group may run: for its fewest pods, and for a second cluster during an upgrade."""
    groups = [
        group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"] if _gpus(group["template"])
    ]
    if not groups:
        return
    nodes, used = cluster.list("/api/v1/nodes"), _gpus_in_use(cluster)
    free = {
        node["metadata"]["name"]: int(node["status"]["allocatable"].get(GPU, 0))
        - used.get(node["metadata"]["name"], 0)
        for node in nodes
    }
    for group in groups:
        each, least = _gpus(group["template"]), group["minReplicas"]
        suitable = [node["metadata"]["name"] for node in nodes if admits(node, group["template"]["spec"])]
        pods = sum(max(free[node], 0) // each for node in suitable)
        text = f"group {group['groupName']}: room for {pods} pods of {each} GPUs on {len(suitable)} nodes"
        if pods >= 2 * least:
            yield Finding("ok", f"{text}, an upgrade's second cluster included")
        elif pods >= least:
            yield Finding("warn", f"{text}; an upgrade needs {2 * least}: the node pool must grow")
        else:
            yield Finding(
                "warn" if suitable else "fail", f"{text}; {least} are needed: the node pool must grow"
            )


def admits(node: Any, spec: Any) -> bool:
    """Whether a pod's nodeSelector and tolerations let it on a node; affinity is not looked at."""
    labels = node["metadata"].get("labels", {})
    if any(labels.get(key) != value for key, value in spec.get("nodeSelector", {}).items()):
        return False
    if node["spec"].get("unschedulable"):
        return False
    taints = [t for t in node["spec"].get("taints", []) if t["effect"] in ("NoSchedule", "NoExecute")]
    return all(any(_tolerates(item, taint) for item in spec.get("tolerations", [])) for taint in taints)


def _tolerates(toleration: Any, taint: Any) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return bool(toleration.get("key") == taint["key"]) and toleration.get("value", "") == taint.get(
        "value", ""
    )


def _gpus(template: Any) -> int:
    limits = template["spec"]["containers"][0].get("resources", {}).get("limits", {})
    return int(limits.get(GPU, 0))


def _gpus_in_use(cluster: Cluster) -> dict[str, int]:
    """GPUs of live pods, by node."""
    used: dict[str, int] = {}
    for pod in cluster.list("/api/v1/pods", fieldSelector="status.phase!=Succeeded,status.phase!=Failed"):
        node = pod["spec"].get("nodeName")
        if node:
            limits = [
                container.get("resources", {}).get("limits", {}) for container in pod["spec"]["containers"]
            ]
            used[node] = used.get(node, 0) + sum(int(limit.get(GPU, 0)) for limit in limits)
    return used


def _references(value: Any) -> dict[str, set[str]]:
    """Secret -> keys, from everything in a cluster's configuration that refers to one."""
    found: dict[str, set[str]] = {}

    def walk(item: Any) -> None:
        if isinstance(item, dict):
            if "secretKeyRef" in item and not item["secretKeyRef"].get("optional"):
                found.setdefault(item["secretKeyRef"]["name"], set()).add(item["secretKeyRef"]["key"])
            if isinstance(item.get("secret"), dict) and "secretName" in item["secret"]:
                keys = {entry["key"] for entry in item["secret"].get("items", [])}
                found.setdefault(item["secret"]["secretName"], set()).update(keys)
            for secret in item.get("imagePullSecrets", []):
                found.setdefault(secret["name"], set()).add(".dockerconfigjson")
            if item.get("mode") == "token" and "secretName" in item:
                found.setdefault(item["secretName"], set()).add("auth_token")
            for inner in item.values():
                walk(inner)
        elif isinstance(item, list):
            for inner in item:
                walk(inner)

    walk(value)
    return found
