"""Who is where: sessions per pod, read from the service's own metrics; and the drain of one replica's pod.

Contract: a load is known or it is not. A pod that cannot be scraped, or that shows no series of its role,
makes the load unknown; nothing here ever turns a failure into zero.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from k8s import errors
from k8s.cluster import Cluster

METRICS_PORT = 8080
# Gauges (deployments/metrics.py) that show a session, by the role of the pod that publishes them.
BUSY = {
    "gateway": ("ray_personaplex_sessions_live", "ray_personaplex_sessions_queued"),
    "replica": ("ray_personaplex_slots_used",),
}
SLOTS = "ray_personaplex_slots"
_ROLE = "app.kubernetes.io/component"


@dataclass(frozen=True)
class PodLoad:
    """Sessions of one pod; None where they could not be read, `problem` says why."""

    pod: str
    uid: str
    role: str
    node: str
    sessions: int | None
    slots: int | None = None
    problem: str = ""


def loads(cluster: Cluster, ray_cluster: str) -> list[PodLoad]:
    """The load of each gateway and replica pod of one RayCluster. Raises Unreachable without a list."""
    pods = cluster.pods(f"ray.io/cluster={ray_cluster}")
    return [_load(cluster, pod) for pod in pods if _role(pod) in BUSY]


def total(found: list[PodLoad]) -> int | None:
    """All sessions; None when any pod's load is unknown, or when there is no pod to ask: an empty list shows
    that we see nothing, not that nothing is there.

    A live session is seen twice, at its gateway and at its replica; a waiting one at its gateway only, one
    whose gateway has died at its replica only. So the larger side counts, and zero means zero on both.
    """
    if not found or any(load.sessions is None for load in found):
        return None
    return max(sum(load.sessions or 0 for load in found if load.role == role) for role in BUSY)


def samples(text: str, name: str) -> list[float]:
    """Values of one series in Prometheus text format; labels are not looked at."""
    pattern = rf"^{re.escape(name)}(?:{{[^\n]*}})? ([^\s]+)(?: \d+)?$"
    return [float(value) for value in re.findall(pattern, text, re.MULTILINE)]


def _role(pod: Any) -> str:
    role: str = pod["metadata"].get("labels", {}).get(_ROLE, "")
    return role


def _load(cluster: Cluster, pod: Any) -> PodLoad:
    name, uid, role = pod["metadata"]["name"], pod["metadata"]["uid"], _role(pod)
    node, phase = pod["spec"].get("nodeName", ""), pod.get("status", {}).get("phase", "Unknown")
    if phase in ("Succeeded", "Failed"):
        return PodLoad(name, uid, role, node, 0, 0)
    if phase == "Pending":  # no container has ever run: there is nothing to hold a session
        return PodLoad(name, uid, role, node, 0, 0)
    if phase != "Running":
        return PodLoad(name, uid, role, node, None, problem=f"phase {phase}")
    try:
        text = cluster.scrape(name, METRICS_PORT)
    except errors.Unreachable as error:
        return PodLoad(name, uid, role, node, None, problem=str(error))
    busy = {series: samples(text, series) for series in BUSY[role]}
    missing = [series for series, values in busy.items() if not values]
    if missing:
        return PodLoad(name, uid, role, node, None, problem=f"no series {', '.join(missing)}")
    slots = samples(text, SLOTS)
    return PodLoad(
        name,
        uid,
        role,
        node,
        int(sum(sum(values) for values in busy.values())),
        int(sum(slots)) if slots else None,
    )


def table(found: list[PodLoad]) -> str:
    """One line a pod, for people."""
    rows = [("POD", "ROLE", "SESSIONS", "SLOTS", "NODE", "")]
    for load in sorted(found, key=lambda load: (load.role, load.pod)):
        sessions = "?" if load.sessions is None else str(load.sessions)
        slots = "" if load.slots is None or load.role == "gateway" else str(load.slots)
        rows.append((load.pod, load.role, sessions, slots, load.node, load.problem))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = (
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def drain(
    cluster: Cluster,
    pod_name: str,
    report: Callable[[str], None],
    timeout_s: float,
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.monotonic,
) -> None:
    """Evicts one replica's pod and waits until it has gone, its sessions ended or moved.

    Serve starts a replacement where there is room; the pod's grace period covers the longest session. Raises
    Blocked, NotFound, Failed for a pod that is no replica, TimedOut.
    """
    pod = cluster.get(cluster.path("pods", pod_name))
    if _role(pod) != "replica":
        raise errors.Failed(f"{pod_name} is no replica's pod")
    uid, end = pod["metadata"]["uid"], now() + timeout_s
    cluster.evict(pod_name, uid)
    report(f"{pod_name}: draining")
    while True:
        try:
            pod = cluster.get(cluster.path("pods", pod_name))
        except errors.NotFound:
            break
        if pod["metadata"]["uid"] != uid:
            break
        sessions = _load(cluster, pod).sessions
        report(f"{pod_name}: {'?' if sessions is None else sessions} sessions left")
        if now() >= end:
            raise errors.TimedOut(f"{pod_name} is still there after {timeout_s:.0f} s")
        sleep(5.0)
    report(f"{pod_name}: gone")
