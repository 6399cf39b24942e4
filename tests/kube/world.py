"""The tool's world for tests: KubeRay's objects as it keeps them, and time that passes only in sleeps."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from k8s import sessions
from k8s.cluster import Cluster
from kube import chart, kuberay
from kube.apiserver import ApiServer

NAME = "talk-personaplex"
OWNER = "11111111-1111-1111-1111-111111111111"


class Clock:
    """Time that passes only while the tool sleeps; each sleep also runs the world's next event."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.events: list[Callable[[], None]] = []

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        if self.events:
            self.events.pop(0)()


@contextlib.contextmanager
def connected(
    server: ApiServer, folder: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> Iterator[Cluster]:
    """The tool's view of `server`, by a kubeconfig that its commands find too."""
    path = folder / "kubeconfig"
    path.write_text(server.kubeconfig())
    monkeypatch.setenv("KUBECONFIG", str(path))
    found = Cluster.connect()
    found._sleep = clock.sleep
    yield found
    found.api.rest_client.pool_manager.clear()


class World:
    """A RayService as KubeRay would keep it, with its clusters, pods and their metrics."""

    def __init__(self, server: ApiServer) -> None:
        self.server = server
        self.load: dict[str, int | None] = {}

    def service(self, active: str = "", pending: str = "", reason: str = "", **status: Any) -> None:
        conditions = {"Ready": bool(active), "UpgradeInProgress": bool(active and pending)}
        conditions.update(status.pop("conditions", {}))
        applications = status.pop("applications", {"personaplex": {"status": "RUNNING"}})
        old = self.server.find("RayService", NAME)
        generation = old[0]["metadata"]["generation"] if old else 1
        self.server.put(
            {
                "apiVersion": "ray.io/v1",
                "kind": "RayService",
                "metadata": {"name": NAME, "uid": OWNER},
                "spec": status.pop("spec", old[0]["spec"] if old else {"serveConfigV2": "1"}),
                "status": {
                    "observedGeneration": status.pop("observed", generation),
                    "activeServiceStatus": {"rayClusterName": active, "applicationStatuses": applications},
                    "pendingServiceStatus": {"rayClusterName": pending} if pending else {},
                    "conditions": [
                        {"type": key, "status": str(value), "reason": reason}
                        for key, value in conditions.items()
                    ],
                },
            }
        )

    def ray_cluster(self, name: str, sessions: int | None = 0, owner: str = OWNER, spec: Any = None) -> None:
        metadata = {"name": name, "ownerReferences": [{"kind": "RayService", "name": NAME, "uid": owner}]}
        self.server.put(
            {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": spec or {}}
        )
        self.load[name] = sessions
        for role in ("head", "gateway", "replica"):
            self.pod(f"{name}-{role}", name, role)

    def pod(self, pod: str, ray_cluster: str, role: str, phase: str = "Running") -> None:
        labels = {"ray.io/cluster": ray_cluster, "app.kubernetes.io/component": role}
        self.server.put(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": pod, "labels": labels},
                "spec": {"nodeName": "node-1", "containers": []},
                "status": {"phase": phase},
            }
        )
        self.server.pages[pod, sessions.METRICS_PORT] = lambda: self.page(ray_cluster, role)

    def page(self, ray_cluster: str, role: str) -> str:
        count = self.load[ray_cluster]
        if count is None or role == "head":
            return "# nothing of ours\nray_node_cpu_count 4\n"
        if role == "gateway":
            return (
                f'ray_personaplex_sessions_live{{replica="a",application="p"}} {float(count)}\n'
                'ray_personaplex_sessions_queued{replica="a"} 0.0\n'
            )
        used = f'ray_personaplex_slots_used{{replica="b"}} {float(count)}'
        return f'{used}\nray_personaplex_slots{{replica="b"}} 8.0\n'

    def clusters(self) -> set[str]:
        return {item["metadata"]["name"] for item in self.server.find("RayCluster")}


def node(
    name: str, gpus: int, labels: dict[str, str] | None = None, taint: bool = True, driver: str = "580.95.05"
) -> Any:
    """A node as NVIDIA's device plugin and feature discovery leave it."""
    labels = dict(labels or {})
    if driver:
        labels["nvidia.com/cuda.driver-version.full"] = driver
    taints = [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}] if taint else []
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels},
        "spec": {"taints": taints},
        "status": {"allocatable": {"nvidia.com/gpu": str(gpus)}},
    }


def ready(server: ApiServer, image: str = "quay.example/kuberay/operator:v1.7.0") -> None:
    """Everything that the chart's everything-values.yaml needs of a cluster."""
    server.put(kuberay.definition("1.7.0"))
    operator = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "kuberay-operator", "labels": {"app.kubernetes.io/name": "kuberay-operator"}},
        "spec": {"template": {"spec": {"containers": [{"image": image}]}}},
        "status": {"availableReplicas": 1},
    }
    server.put(operator, namespace="kuberay")
    for name, keys in {
        "hf": ["token"],
        "keys": ["keys"],
        "registry": [".dockerconfigjson"],
        "redis": ["password", "user"],
        "ray-token": ["auth_token"],
        "operators": ["keys"],
        "twilio": ["token"],
    }.items():
        server.put(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": name},
                "data": dict.fromkeys(keys, "eA=="),
            }
        )
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "weights"}}
    server.put({**claim, "spec": {"accessModes": ["ReadWriteMany"]}, "status": {"phase": "Bound"}})
    server.put(node("gpu-1", 8))
    server.put(node("spot-1", 4, {"node-pool": "spot"}))


def installed(server: ApiServer, values: str, options: Sequence[str] = ()) -> World:
    """What `values` of the chart look like once KubeRay has carried them out."""
    ready(server)
    world, documents = World(server), copy.deepcopy(chart.render(values, tuple(options)))
    for document in documents:
        if document["kind"] in ("NetworkPolicy", "PodDisruptionBudget", "Role"):
            server.put(document)
    service = chart.only(documents, "RayService")
    config = service["spec"]["rayClusterConfig"]
    world.service(active="one", spec=service["spec"])
    (kept,) = server.find("RayService")
    server.put({**kept, "metadata": {**kept["metadata"], "labels": service["metadata"]["labels"]}})
    owner = {"kind": "RayService", "name": NAME, "uid": OWNER}
    ray_cluster = {"name": "one", "ownerReferences": [owner]}
    server.put({"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": ray_cluster, "spec": config})
    world.load["one"] = 0
    _add_pods(world, "headgroup", config["headGroupSpec"]["template"], 1)
    for group in config["workerGroupSpecs"]:
        _add_pods(world, group["groupName"], group["template"], group["minReplicas"])
    return world


def _add_pods(world: World, group: str, template: Any, count: int) -> None:
    role = template["metadata"]["labels"]["app.kubernetes.io/component"]
    labels = {**template["metadata"]["labels"], "ray.io/cluster": "one", "ray.io/group": group}
    labels |= {"ray.io/serve": "true"} if role != "head" else {}
    for number in range(count):
        name = f"one-{group}-{number}"
        status = {"name": "ray", "ready": True, "restartCount": 0, "imageID": "sha256:" + "0a" * 32}
        world.server.put(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "labels": labels},
                "spec": {**template["spec"], "nodeName": f"node-{number}"},
                "status": {
                    "phase": "Running",
                    "containerStatuses": [status],
                    "conditions": [{"type": "Ready", "status": str(role == "gateway")}],
                },
            }
        )
        world.server.pages[name, sessions.METRICS_PORT] = lambda: world.page("one", role)
