"""Would the cluster's nodes take the GPU pods of a RayService? Counts, labels and drivers.

A pool that node autoscaling has emptied shows no node and is no fault: with nothing to look at there is a
warning, never a failure.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from k8s.cluster import Cluster

GPU, MIG = "nvidia.com/gpu", "nvidia.com/mig-"  # a whole card, the beginning of a part of one
NEEDED_DRIVER = "personaplex.io/gpu-driver"  # annotation of the RayService
# Labels by which clouds and NVIDIA's feature discovery name a card.
CARDS = (
    "nvidia.com/gpu.product",
    "cloud.google.com/gke-accelerator",
    "karpenter.k8s.aws/instance-gpu-name",
    "k8s.amazonaws.com/accelerator",
    "kubernetes.azure.com/accelerator",
    "node.kubernetes.io/instance-type",
)
DISCOVERED = "nvidia.com/"  # labels that feature discovery puts on a node once it runs
DRIVERS = (
    "nvidia.com/cuda.driver-version.full",
    "nvidia.com/cuda.driver-version.major",
    "nvidia.com/cuda.driver.major",
)


@dataclass(frozen=True)
class Finding:
    """`level`: ok, warn (look at it) or fail (it will not run)."""

    level: str
    text: str


def gpus(cluster: Cluster, service: Any) -> Iterator[Finding]:
    """Free GPUs where each group may run: for its fewest pods, and for a second cluster during an upgrade."""
    for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        if group["template"]["spec"].get("resourceClaims") and "GPU" in group.get("resources", {}):
            text = "gets its GPUs by a resource claim: whether a node has the device is not looked at"
            yield Finding("warn", f"group {group['groupName']} {text}")
    groups = _gpu_groups(service)
    if not groups:
        return
    nodes, used = cluster.list("/api/v1/nodes"), _in_use(cluster)
    for group in groups:
        resource, each = _gpus(group["template"])
        least, spec = group["minReplicas"], group["template"]["spec"]
        there = [node for node in nodes if _allocatable(node, resource)]
        suitable = [node for node in there if admits(node, spec)]
        if not suitable:
            yield _no_node(group, there)
            continue
        free = [_allocatable(node, resource) - used[node["metadata"]["name"], resource] for node in suitable]
        pods = sum(max(count, 0) // each for count in free)
        what = "GPUs" if resource == GPU else resource
        text = f"group {group['groupName']}: room for {pods} pods of {each} {what} on {len(suitable)} nodes"
        if pods >= 2 * least:
            yield Finding("ok", f"{text}, an upgrade's second cluster included")
        elif pods >= least:
            yield Finding("warn", f"{text}; an upgrade needs {2 * least}: the node pool must grow")
        else:
            yield Finding("warn", f"{text}; {least} are needed: the node pool must grow")


def drivers(cluster: Cluster, service: Any) -> Iterator[Finding]:
    """The driver of the nodes that GPU pods may run on, where feature discovery tells it."""
    needed = service["metadata"].get("annotations", {}).get(NEEDED_DRIVER, "")
    groups = _gpu_groups(service)
    if not groups or not needed:
        return
    nodes = [
        node
        for node in cluster.list("/api/v1/nodes")
        if any(
            _allocatable(node, _gpus(group["template"])[0]) and admits(node, group["template"]["spec"])
            for group in groups
        )
    ]
    unknown = []
    for node in nodes:
        labels = node["metadata"].get("labels", {})
        driver = next((labels[name] for name in DRIVERS if name in labels), "")
        if not re.match(r"\d", driver):
            unknown.append(node["metadata"]["name"])
        elif _numbers(driver) < _numbers(needed):
            yield Finding(
                "fail",
                f"node {node['metadata']['name']}: driver {driver}; the image's CUDA needs {needed} or later",
            )
        else:
            yield Finding("ok", f"node {node['metadata']['name']}: driver {driver}")
    if unknown:
        yield Finding(
            "warn",
            f"no label tells the driver of {len(unknown)} GPU nodes ({unknown[0]}); the image's CUDA needs "
            f"{needed} or later: see nvidia-smi there",
        )


def _no_node(group: Any, nodes: list[Any]) -> Finding:
    """Why none of the nodes with GPUs takes the group's pods."""
    start, selector = f"group {group['groupName']}", group["template"]["spec"].get("nodeSelector", {})
    resource, _ = _gpus(group["template"])
    late = [name for name in selector if name.startswith(DISCOVERED)]
    if not nodes:
        what = "GPUs" if resource == GPU else resource
        text = f"{start}: no node has {what} now; the pool must grow from nothing"
        if late:
            text += (
                f". It grows for the label {late[0]} only where the pool's template has it: "
                "feature discovery adds it once a node runs"
            )
        return Finding("warn", text)
    there = [node["metadata"].get("labels", {}) for node in nodes]
    cards = Counter(f"{name}={labels[name]}" for labels in there for name in CARDS if name in labels)
    have = (
        ", ".join(f"{card} ({count})" for card, count in cards.most_common()) or "no label that names a card"
    )
    for name, value in selector.items():
        if not any(name in labels for labels in there):
            made = ", which NVIDIA's GPU feature discovery makes" if name.startswith(DISCOVERED) else ""
            return Finding("fail", f"{start}: no GPU node has the label {name}{made}; they have {have}")
        if not any(labels.get(name) == value for labels in there):
            return Finding("warn", f"{start}: no GPU node has {name}={value}; they have {have}")
    taints = sorted({taint["key"] for node in nodes for taint in node["spec"].get("taints", [])})
    return Finding(
        "warn",
        f"{start}: none of {len(nodes)} GPU nodes has all its labels, tolerated taints and is schedulable; "
        f"taints there: {', '.join(taints) or 'none'}",
    )


def _gpu_groups(service: Any) -> list[Any]:
    return [
        group
        for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
        if _gpus(group["template"])[1]
    ]


def _allocatable(node: Any, resource: str) -> int:
    return int(node.get("status", {}).get("allocatable", {}).get(resource, 0))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


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


def _gpus(template: Any) -> tuple[str, int]:
    """What the Ray container calls a GPU, and how many it asks for."""
    limits = template["spec"]["containers"][0].get("resources", {}).get("limits", {})
    return next(((name, int(count)) for name, count in limits.items() if _is_gpu(name)), (GPU, 0))


def _is_gpu(resource: str) -> bool:
    return resource == GPU or resource.startswith(MIG)


def _in_use(cluster: Cluster) -> Counter[tuple[str, str]]:
    """GPUs of live pods, by node and resource."""
    used: Counter[tuple[str, str]] = Counter()
    for pod in cluster.list("/api/v1/pods", fieldSelector="status.phase!=Succeeded,status.phase!=Failed"):
        for container in pod["spec"]["containers"] if pod["spec"].get("nodeName") else ():
            for name, count in container.get("resources", {}).get("limits", {}).items():
                if _is_gpu(name):
                    used[pod["spec"]["nodeName"], name] += int(count)
    return used
