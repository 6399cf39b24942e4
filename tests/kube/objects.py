"""What the API server in memory serves: kinds, error answers, selectors, merges, bodies of requests."""

from __future__ import annotations

import json
from typing import Any

import yaml
from aiohttp import web

from kube import protobuf

RESOURCES = {
    "v1": "pods:Pod services:Service secrets:Secret configmaps:ConfigMap namespaces:Namespace! nodes:Node! "
    "persistentvolumeclaims:PersistentVolumeClaim serviceaccounts:ServiceAccount events:Event "
    "resourcequotas:ResourceQuota",
    "apps/v1": "deployments:Deployment",
    "batch/v1": "jobs:Job",
    "networking.k8s.io/v1": "networkpolicies:NetworkPolicy ingresses:Ingress",
    "policy/v1": "poddisruptionbudgets:PodDisruptionBudget",
    "rbac.authorization.k8s.io/v1": "roles:Role rolebindings:RoleBinding",
    "ray.io/v1": "rayservices:RayService rayclusters:RayCluster",
    "gateway.networking.k8s.io/v1": "httproutes:HTTPRoute",
    "monitoring.coreos.com/v1": "podmonitors:PodMonitor prometheusrules:PrometheusRule",
    "apiextensions.k8s.io/v1": "customresourcedefinitions:CustomResourceDefinition!",
}
KINDS = {
    (api, word.split(":")[0]): word.split(":")[1].rstrip("!")
    for api, words in RESOURCES.items()
    for word in words.split()
}
PLURALS = {(api, kind): plural for (api, plural), kind in KINDS.items()}
CLUSTER_WIDE = {"namespaces", "nodes", "customresourcedefinitions"}
# What an object of a kind keeps from its creation on. A claim may grow, nothing else of it may change.
FIXED = {
    "Job": (
        "spec.template",
        "spec.selector",
        "spec.completions",
        "spec.completionMode",
        "spec.podFailurePolicy",
    ),
    "Deployment": ("spec.selector",),
    "StatefulSet": (
        "spec.selector",
        "spec.serviceName",
        "spec.volumeClaimTemplates",
        "spec.podManagementPolicy",
    ),
    "Service": ("spec.clusterIP", "spec.clusterIPs"),
    "PersistentVolumeClaim": (
        "spec.accessModes",
        "spec.storageClassName",
        "spec.volumeName",
        "spec.selector",
    ),
    "RoleBinding": ("roleRef",),
    "Pod": ("spec.nodeName", "spec.volumes", "spec.serviceAccountName", "spec.restartPolicy"),
    "Secret": ("type",),
}
VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]


class Status(Exception):
    """An answer that is an error."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.body = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "reason": reason,
            "message": message,
            "code": code,
        }


async def body(request: web.Request) -> Any:
    raw = await request.read()
    if not raw:
        return {}
    if raw.startswith(protobuf.MAGIC):
        return protobuf.decode(raw)
    return yaml.safe_load(raw) if "yaml" in request.content_type else json.loads(raw)


def merge(old: Any, change: Any) -> Any:
    """RFC 7386."""
    for name, value in change.items():
        if value is None:
            old.pop(name, None)
        elif isinstance(value, dict) and isinstance(old.get(name), dict):
            merge(old[name], value)
        else:
            old[name] = value
    return old


def check_fixed(kind: str, old: Any, new: Any) -> None:
    """Raises Status 422 as the API server does when a field that is fixed at creation changes."""
    paths = FIXED.get(kind, ())
    if kind in ("Secret", "ConfigMap") and old.get("immutable"):
        paths = (*paths, "data", "stringData", "binaryData", "immutable")
    for path in paths:
        before, after = old, new
        for part in path.split("."):
            before = before.get(part) if isinstance(before, dict) else None
            after = after.get(part) if isinstance(after, dict) else None
        if before is not None and before != after:
            name = new["metadata"]["name"]
            raise Status(422, "Invalid", f'{kind} "{name}" is invalid: {path}: field is immutable')


def matches(item: Any, query: Any) -> bool:
    labels = item["metadata"].get("labels", {})
    for term in filter(None, query.get("labelSelector", "").split(",")):
        name, unequal, value = term.replace("==", "=").partition("!=" if "!=" in term else "=")
        if (labels.get(name) == value) is (unequal == "!="):
            return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        unequal = "!=" in term
        path, _, value = term.partition("!=" if unequal else "=")
        found: Any = item
        for part in path.split("."):
            found = found.get(part, "") if isinstance(found, dict) else ""
        if (found == value) is unequal:
            return False
    return True
