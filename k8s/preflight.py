"""Checks before an install or an upgrade: would this RayService run on this cluster?

    helm template NAME helm/personaplex -f VALUES -n NAMESPACE | python -m k8s preflight -n NAMESPACE

Reads only. A check that the operator may not make (nodes are cluster-wide) is a warning, not a pass. What
depends on nodes is in nodes.py, on quotas in quotas.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from k8s import crd, errors, nodes, quotas
from k8s.cluster import Cluster
from k8s.nodes import Finding

OLDEST_KUBERAY = (1, 5)
SOURCES = {  # API group -> where its kinds come from
    "ray.io": "install the KubeRay operator",
    "monitoring.coreos.com": "install the Prometheus operator, or leave monitoring off",
    "gateway.networking.k8s.io": "install the Gateway API, or leave httpRoute off",
}


def run(cluster: Cluster, documents: list[Any]) -> list[Finding]:
    """All findings about the one RayService among `documents`.

    Raises Failed when there is not exactly one, and Unreachable.
    """
    services = [item for item in documents if item and item.get("kind") == "RayService"]
    if len(services) != 1:
        raise errors.Failed(f"the manifest holds {len(services)} RayServices, not one")
    service = services[0]
    checks: list[Callable[[Cluster, Any], Iterator[Finding]]] = [
        name,
        operator,
        fields,
        secrets,
        claims,
        nodes.gpus,
        nodes.drivers,
        quotas.quotas,
    ]
    served = list(_permitted(api, cluster, documents))
    return served + [finding for check in checks for finding in _permitted(check, cluster, service)]


def _permitted(
    check: Callable[[Cluster, Any], Iterator[Finding]], cluster: Cluster, subject: Any
) -> Iterator[Finding]:
    try:
        yield from check(cluster, subject)
    except errors.Forbidden as error:
        yield Finding("warn", f"{check.__name__}: not allowed to look ({error})")


def name(cluster: Cluster, service: Any) -> Iterator[Finding]:
    """KubeRay adds up to 16 characters to the name, and the result must fit a label."""
    text = service["metadata"]["name"]
    if len(text) > 47 or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", text):
        yield Finding("fail", f"name {text!r}: at most 47 of a-z, 0-9 and -, beginning with a letter")
    else:
        yield Finding("ok", f"name {text}")


def api(cluster: Cluster, documents: list[Any]) -> Iterator[Finding]:
    """Every kind of the manifest is served; discovery needs no permission."""
    wanted: dict[str, set[str]] = {"ray.io/v1": {"RayCluster"}}
    for item in filter(None, documents):
        wanted.setdefault(item["apiVersion"], set()).add(item["kind"])
    for version, kinds in sorted(wanted.items()):
        root = f"/apis/{version}" if "/" in version else f"/api/{version}"
        try:
            missing = sorted(kinds - {item["kind"] for item in cluster.get(root)["resources"]})
        except errors.NotFound:
            missing = sorted(kinds)
        if missing:
            advice = SOURCES.get(version.split("/")[0], "this Kubernetes is too old or too new")
            yield Finding("fail", f"no {' and no '.join(missing)} in {version}: {advice}")
        else:
            yield Finding("ok", f"{version} is served")


def operator(cluster: Cluster, service: Any) -> Iterator[Finding]:
    """The running operator's version, from its image."""
    labels = ("name=kuberay-operator", "component=kuberay-operator")  # of its chart, of its kustomization
    found = {
        item["metadata"]["uid"]: item
        for label in labels
        for item in cluster.list("/apis/apps/v1/deployments", labelSelector=f"app.kubernetes.io/{label}")
    }
    if not found:
        yield Finding("warn", "no deployment labelled kuberay-operator: is the operator running?")
    for deployment in found.values():
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


def fields(cluster: Cluster, service: Any) -> Iterator[Finding]:
    """The operator's own schema has every field: an unknown one would be dropped in silence."""
    try:
        definition = cluster.get(f"{crd.CRDS}/rayservices.ray.io")
    except errors.NotFound:
        return  # said by `api`
    schema = crd.schema_of(definition)
    unknown = crd.dropped(schema or {}, service)
    for path in unknown:
        yield Finding(
            "fail", f"this KubeRay does not know {path} and would drop it in silence{crd.floor(path)}"
        )
    if not unknown:
        yield Finding("ok", "this KubeRay knows every field")


def secrets(cluster: Cluster, service: Any) -> Iterator[Finding]:
    """Every Secret and key that the pods refer to."""
    for secret, keys in sorted(references(service["spec"]["rayClusterConfig"]).items()):
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


def references(value: Any) -> dict[str, set[str]]:
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
