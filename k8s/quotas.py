"""Would the namespace's quotas let the pods of a RayService be made?

A pod that a quota refuses is never seen: KubeRay's attempt to make it fails, and that stands in an event of
the RayCluster alone. Quotas with scopes count some pods only and are not looked at, which is said.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from k8s.cluster import Cluster
from k8s.nodes import Finding

Amounts = dict[str, Decimal]
SIDES = ("requests", "limits")


def quotas(cluster: Cluster, service: Any) -> Iterator[Finding]:
    """Each quota against the fewest pods, and against those of an upgrade's second cluster."""
    config = service["spec"]["rayClusterConfig"]
    needed = _needed(config)
    for quota in cluster.list(cluster.path("resourcequotas")):
        name, spec = f"quota {quota['metadata']['name']}", quota["spec"]
        if spec.get("scopes") or spec.get("scopeSelector"):
            yield Finding("warn", f"{name} counts some pods only (scopes): not looked at")
            continue
        used, fits = quota.get("status", {}).get("used", {}), True
        for key, hard in spec.get("hard", {}).items():
            item, most = _counted_as(key), _quantity(hard)
            without = sorted(set(_without(config, item)))
            if without:
                fits = False
                text = f"{name} counts {key}, which these do not name: {', '.join(without)}"
                yield Finding("warn", f"{text}; refused, unless a LimitRange gives one")
            least = needed[item]
            left = most - _quantity(used.get(key, 0))
            if least > most:
                fits = False
                text = f"the fewest pods need {_shown(key, least)} of {key}, it allows {_shown(key, most)}"
                yield Finding("fail", f"{name}: {text}")
            elif least > left:
                fits = False
                text = f"{_shown(key, left)} of {key} are left, the fewest pods need {_shown(key, least)}"
                yield Finding("warn", f"{name}: {text}")
            elif 2 * least > most:
                fits = False
                text = f"an upgrade needs {_shown(key, 2 * least)} of {key}, it allows {_shown(key, most)}"
                yield Finding("warn", f"{name}: {text}")
        if fits:
            yield Finding("ok", f"{name} has room")


def _quantity(text: str | int) -> Decimal:
    return Decimal(parse_quantity(text))  # type: ignore[no-untyped-call]


def _counted_as(key: str) -> str:
    """A quota's key as `requests.NAME`, `limits.NAME` or `pods`; `cpu` is the requests'."""
    if key in ("cpu", "memory", "ephemeral-storage"):
        return f"requests.{key}"
    return "pods" if key == "count/pods" else key


def _shown(key: str, amount: Decimal) -> str:
    return f"{amount / 2**30:.1f}Gi" if key.endswith(("memory", "storage")) else f"{amount.normalize():f}"


def _needed(config: Any) -> defaultdict[str, Decimal]:
    """What the head and the fewest pods of each group count for."""
    total: defaultdict[str, Decimal] = defaultdict(Decimal)
    for template, pods in _templates(config):
        total["pods"] += pods
        for side in SIDES:
            for name, amount in _pod(template["spec"], side).items():
                total[f"{side}.{name}"] += pods * amount
    if config.get("enableInTreeAutoscaling"):  # KubeRay adds a container to the head
        resources = config.get("autoscalerOptions", {}).get("resources", {})
        for side in SIDES:
            for name, amount in _amounts({"resources": resources}, side).items():
                total[f"{side}.{name}"] += amount
    return total


def _templates(config: Any) -> Iterator[tuple[Any, int]]:
    yield config["headGroupSpec"]["template"], 1
    for group in config["workerGroupSpecs"]:
        yield group["template"], group["minReplicas"]


def _pod(spec: Any, side: str) -> Amounts:
    """The sum of the containers, or the largest init container where that is more."""
    found: defaultdict[str, Decimal] = defaultdict(Decimal)
    for container in spec["containers"]:
        for name, amount in _amounts(container, side).items():
            found[name] += amount
    for container in spec.get("initContainers", []):
        for name, amount in _amounts(container, side).items():
            found[name] = max(found[name], amount)
    return found


def _amounts(container: Any, side: str) -> Amounts:
    """Requests or limits of a container; where a request is missing Kubernetes takes the limit."""
    resources = container.get("resources", {})
    given = dict(resources.get("limits") or {}) if side == "requests" else {}
    given |= resources.get(side) or {}
    return {name: _quantity(amount) for name, amount in given.items()}


def _without(config: Any, item: str) -> Iterator[str]:
    """Containers that a quota on CPU or memory refuses, since they do not say how much they take."""
    side, _, name = item.partition(".")
    if name in ("cpu", "memory"):
        for template, _ in _templates(config):
            spec = template["spec"]
            for container in [*spec.get("initContainers", []), *spec["containers"]]:
                if name not in _amounts(container, side):
                    yield container["name"]
