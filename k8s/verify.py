"""Is what was installed whole? Pods, versions, policies, one conversation; a failover only when asked for.

Reads only, except for the conversation and the failover. What the operator may not look at is a warning, as
in preflight.py; a check that finds nothing to look at says so and is no pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from k8s import errors, failover, inplace, nodes, policies, preflight, smoke
from k8s.cluster import RAY, Cluster
from k8s.differences import differences
from k8s.nodes import Finding
from k8s.rollout import ServiceState, read
from k8s.troubles import troubles

ROLE = "app.kubernetes.io/component"
GROUP = "ray.io/group"
NETWORK = "/apis/networking.k8s.io/v1"
POLICY = "/apis/policy/v1"


@dataclass(frozen=True)
class Installed:
    """The service as one reading shows it: object, state, the cluster that serves and its pods."""

    service: Any
    state: ServiceState
    ray_cluster: Any
    pods: list[Any]


Check = Callable[[Cluster, Installed], Iterator[Finding]]


def run(
    cluster: Cluster,
    name: str,
    report: Callable[[Finding], None],
    url: str | None = None,
    key: str | None = None,
    with_failover: bool = False,
) -> list[Finding]:
    """All findings, each also given to `report` when it is made. Raises NotFound, Forbidden, Unreachable."""
    found = []
    for finding in _findings(cluster, name, url, key, with_failover):
        report(finding)
        found.append(finding)
    return found


def _findings(
    cluster: Cluster, name: str, url: str | None, key: str | None, with_failover: bool
) -> Iterator[Finding]:
    service = cluster.service(name)
    state = read(service)
    yield Finding("ok" if state.settled else "fail", f"{name}: {state.describe()}")
    if not state.active:
        if state.pending:
            pods = cluster.pods(f"ray.io/cluster={state.pending}")
            yield from (Finding("fail", line) for line in troubles(pods))
        return
    running = cluster.get(cluster.path("rayclusters", state.active, root=RAY))
    installed = Installed(service, state, running, cluster.pods(f"ray.io/cluster={state.active}"))
    checks: list[Check] = [pods_run, images, versions, drivers, network, budgets, access]
    for check in checks:
        yield from _permitted(check, cluster, installed)
    yield from _conversation(cluster, name, url, key)
    if with_failover:
        yield from _failover(cluster, installed, key)


def _permitted(check: Check, cluster: Cluster, installed: Installed) -> Iterator[Finding]:
    try:
        yield from check(cluster, installed)
    except errors.Forbidden as error:
        yield Finding("warn", f"{check.__name__}: not allowed to look ({error})")


def pods_run(cluster: Cluster, installed: Installed) -> Iterator[Finding]:
    """Every group has its fewest pods with all containers ready; what keeps others from it; restarts."""
    config, there = installed.ray_cluster["spec"], defaultdict(list)
    for pod in installed.pods:
        there[_group(pod)].append(pod)
    groups = {"headgroup": 1} | {
        item["groupName"]: item["minReplicas"] for item in config["workerGroupSpecs"]
    }
    for group, least in groups.items():
        well = sum(_runs(pod) for pod in there[group])
        text = f"group {group}: {well} of at least {least} pods run"
        yield Finding("ok" if well >= least else "fail", text)
    yield from (Finding("fail", line) for line in troubles(installed.pods))
    for pod in installed.pods:
        for container in pod.get("status", {}).get("containerStatuses", []):
            if container.get("restartCount"):
                ended = container.get("lastState", {}).get("terminated", {})
                why = f"{ended.get('reason', 'unknown')}, exit code {ended.get('exitCode', 'unknown')}"
                where = f"{pod['metadata']['name']}, container {container['name']}"
                yield Finding("warn", f"{where}: started again {container['restartCount']} times ({why})")


def images(cluster: Cluster, installed: Installed) -> Iterator[Finding]:
    """The cluster is the one that was asked for, its pods run its images, and a tag means one image."""
    wanted = installed.service["spec"].get("rayClusterConfig", {})
    changed = differences(wanted, installed.ray_cluster["spec"])
    if changed:
        places = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        yield Finding("fail", f"{installed.state.active} differs from what was asked for at {places}")
    asked = {"headgroup": wanted["headGroupSpec"]} | {g["groupName"]: g for g in wanted["workerGroupSpecs"]}
    digests, old = defaultdict(set), []
    for pod in installed.pods:
        for status in pod.get("status", {}).get("containerStatuses", []):
            if status.get("imageID"):
                digests[_image(pod, status["name"])].add(status["imageID"])
        image = _image(pod, "ray")
        group = asked.get(_group(pod))
        if group and image != group["template"]["spec"]["containers"][0]["image"]:
            old.append(f"{pod['metadata']['name']} runs {image}")
    yield from (Finding("fail", f"{line}, which is not the image of its group") for line in old)
    for image, found in digests.items():
        if len(found) > 1:
            yield Finding("warn", f"{image} is {len(found)} different images on these nodes: pin a digest")
    if not old and not changed:
        yield Finding("ok", f"{len(installed.pods)} pods run the images that were asked for")


def versions(cluster: Cluster, installed: Installed) -> Iterator[Finding]:
    """Kubernetes, the chart, Ray, this tool; the operator's own check is preflight's."""
    labels = installed.service["metadata"].get("labels", {})
    chart = labels.get("helm.sh/chart", "no chart (plain manifests)")
    ray = installed.ray_cluster["spec"].get("rayVersion", "unknown")
    kubernetes = cluster.get("/version").get("gitVersion", "unknown")
    yield Finding("ok", f"Kubernetes {kubernetes}, {chart}, Ray {ray}")
    ours, theirs = metadata.version("personaplex-serve"), labels.get("app.kubernetes.io/version", "")
    if theirs and theirs != ours:
        yield Finding("warn", f"this tool is of release {ours}, the service of {theirs}")
    yield from preflight.operator(cluster, installed.service)


def drivers(cluster: Cluster, installed: Installed) -> Iterator[Finding]:
    """The driver of the nodes that GPU pods may run on."""
    yield from nodes.drivers(cluster, installed.service)


def network(cluster: Cluster, installed: Installed) -> Iterator[Finding]:
    """Network policies cover every pod, and leave the pods of the service open to each other."""
    found = cluster.list(cluster.path("networkpolicies", root=NETWORK))
    by_role = {_role(pod): pod["metadata"].get("labels", {}) for pod in installed.pods}
    bare = sorted(role for role, labels in by_role.items() if not policies.covered(found, labels))
    if bare:
        yield Finding("warn", f"no NetworkPolicy covers {', '.join(bare)}: Ray trusts who reaches its ports")
    shut = sorted(
        f"{peer} to {role}"
        for role, labels in by_role.items()
        for peer, others in by_role.items()
        if not policies.admitted(found, labels, others)
    )
    if shut:
        yield Finding("fail", f"network policies keep pods of the service apart: {', '.join(shut)}")
    if not bare and not shut and by_role:
        yield Finding("ok", "network policies cover every pod; that the network enforces them is not seen")


def budgets(cluster: Cluster, installed: Installed) -> Iterator[Finding]:
    """A disruption budget covers the gateways and has one to spare."""
    gateways = [pod["metadata"].get("labels", {}) for pod in installed.pods if _role(pod) == "gateway"]
    found = [
        item
        for item in cluster.list(cluster.path("poddisruptionbudgets", root=POLICY))
        if any(policies.selects(item["spec"].get("selector", {}), labels) for labels in gateways)
    ]
    if len(gateways) > 1 and not found:
        yield Finding("warn", "no disruption budget covers the gateways: a drain may take all at once")
    for item in found:
        name, allowed = item["metadata"]["name"], item.get("status", {}).get("disruptionsAllowed")
        if allowed == 0:
            yield Finding("warn", f"budget {name} allows no disruption now: a gateway's node cannot drain")
        else:
            yield Finding("ok", f"budget {name} covers {len(gateways)} gateways")


def access(cluster: Cluster, installed: Installed) -> Iterator[Finding]:
    """Whether the service asks for keys."""
    settings = inplace.application(installed.service).get("args") or {}
    if settings.get("api_keys_file") or settings.get("api_keys"):
        yield Finding("ok", "a key is needed to connect")
    else:
        yield Finding("warn", "no API keys: whoever reaches the service may talk (apiKeys.existingSecret)")


def _conversation(cluster: Cluster, name: str, url: str | None, key: str | None) -> Iterator[Finding]:
    try:
        smoke.smoke(cluster, name, lambda line: None, url, key)
    except errors.ToolError as error:
        yield Finding("fail", f"no conversation: {error}")
    else:
        yield Finding("ok", f"a conversation through {url or 'a tunnel to a gateway'}")


def _failover(cluster: Cluster, installed: Installed, key: str | None) -> Iterator[Finding]:
    try:
        yield Finding("ok", failover.Proof(cluster, installed.service).run(key))
    except errors.ToolError as error:
        yield Finding("fail", f"failover: {error}")


def _role(pod: Any) -> str:
    return str(pod["metadata"].get("labels", {}).get(ROLE, "unknown"))


def _group(pod: Any) -> str:
    return str(pod["metadata"].get("labels", {}).get(GROUP, "unknown"))


def _image(pod: Any, container: str) -> str:
    found = (item["image"] for item in pod["spec"]["containers"] if item["name"] == container)
    return str(next(found, "unknown"))


def _runs(pod: Any) -> bool:
    """Readiness of the pod itself says nothing: a replica's never is (see the chart's readinessGates)."""
    status = pod.get("status", {})
    containers = status.get("containerStatuses", [])
    ready = bool(containers) and all(item.get("ready") for item in containers)
    return status.get("phase") == "Running" and ready and "deletionTimestamp" not in pod["metadata"]
