"""The operator's tool against an API server: preflight, rollout, sessions, and all that can go wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from kube import chart
from kube.apiserver import ApiServer
from kube.objects import Status

from deployments import metrics
from k8s import __main__ as tool
from k8s import errors, preflight, rollout, sessions
from k8s.cluster import ATTEMPTS, Cluster

NAME = "talk-personaplex"
OWNER = "11111111-1111-1111-1111-111111111111"


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


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


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cluster(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> Iterator[Cluster]:
    path = tmp_path / "kubeconfig"
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

    def service(self, active: str = "", pending: str = "", **status: Any) -> None:
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
                    "conditions": [{"type": key, "status": str(value)} for key, value in conditions.items()],
                },
            }
        )

    def ray_cluster(self, name: str, sessions: int | None = 0, owner: str = OWNER) -> None:
        metadata = {"name": name, "ownerReferences": [{"kind": "RayService", "name": NAME, "uid": owner}]}
        self.server.put({"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": {}})
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


@pytest.fixture
def world(server: ApiServer) -> World:
    return World(server)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def run(cluster: Cluster, clock: Clock, said: list[str]) -> rollout.Rollout:
    return rollout.Rollout(cluster, NAME, said.append, timeout_s=600, sleep=clock.sleep, now=clock.now)


# Rollout


def test_waits_for_the_switch_and_releases_the_old_cluster_when_its_sessions_are_gone(
    world: World, clock: Clock, run: rollout.Rollout, said: list[str]
) -> None:
    world.ray_cluster("old", sessions=3)
    world.service(active="old", observed=0)

    def begin() -> None:
        world.ray_cluster("new")
        world.service(active="old", pending="new")

    def switch() -> None:
        world.service(active="new")

    def leave() -> None:
        world.load["old"] = 0

    nothing: Callable[[], None] = lambda: None  # noqa: E731
    clock.events = [begin, nothing, switch, nothing, nothing, nothing, nothing, leave]
    run.run()
    assert world.clusters() == {"new"}
    assert said == [
        "KubeRay has not seen the last change yet",
        "a new cluster is being made: new, next to old",
        "new serves",
        "old: 3 sessions left",
        "old: released",
        "no old cluster is left",
    ]


def test_an_in_place_update_is_believed_only_after_equal_readings(
    world: World, clock: Clock, run: rollout.Rollout, said: list[str]
) -> None:
    world.ray_cluster("one")
    world.service(active="one", applications={"personaplex": {"status": "DEPLOYING", "message": "2 of 3"}})
    clock.events = [
        lambda: world.service(active="one"),
        lambda: world.service(active="one", applications={"personaplex": {"status": "UNHEALTHY"}}),
        lambda: world.service(active="one"),
    ]
    run.run()
    assert said[:4] == [
        "one: personaplex is DEPLOYING 2 of 3",
        "one serves",
        "one: personaplex is UNHEALTHY",
        "one serves",
    ]
    assert clock.seconds == 5 * run.interval_s  # two readings to settle after the last change
    assert world.clusters() == {"one"}


def test_an_upgrade_that_never_serves_times_out(world: World, clock: Clock, run: rollout.Rollout) -> None:
    world.ray_cluster("old", sessions=0)
    world.ray_cluster("new")
    world.service(active="old", pending="new")
    with pytest.raises(errors.TimedOut, match="a new cluster is being made: new") as caught:
        run.run()
    assert caught.value.code == 3
    assert world.clusters() == {"old", "new"}


def test_one_session_starts_the_count_anew(world: World, clock: Clock, run: rollout.Rollout) -> None:
    world.ray_cluster("old", sessions=0)
    world.ray_cluster("new")
    world.service(active="new")
    run._wait_until_settled(1e9)
    readings: list[int] = []

    def load(count: int) -> Callable[[], None]:
        def change() -> None:
            readings.append(count)
            world.load["old"] = count

        return change

    clock.events = [load(0), load(1), load(0), load(0), load(0)]
    run._release_all(1e9)
    assert readings == [0, 1, 0, 0, 0]  # zeros before the session did not count
    assert world.clusters() == {"new"}


@pytest.mark.parametrize("trouble", ["no series", "no answer", "half an answer", "pod unknown", "no pods"])
def test_what_cannot_be_read_is_not_zero(
    world: World, server: ApiServer, clock: Clock, run: rollout.Rollout, said: list[str], trouble: str
) -> None:
    """Fails closed: the old cluster stays for KubeRay's own delay."""
    world.ray_cluster("old", sessions=0)
    world.ray_cluster("new")
    world.service(active="new")
    if trouble == "no series":
        world.load["old"] = None
    elif trouble == "no answer":
        del server.pages["old-replica", sessions.METRICS_PORT]
    elif trouble == "half an answer":
        server.pages["old-gateway", sessions.METRICS_PORT] = lambda: "ray_personaplex_sessions_live 0.0\n"
    elif trouble == "pod unknown":
        world.pod("old-replica", "old", "replica", phase="Unknown")
    else:
        for role in ("head", "gateway", "replica"):
            server.remove("Pod", f"old-{role}")
    with pytest.raises(errors.TimedOut, match="old clusters are still there: old"):
        run.run()
    assert world.clusters() == {"old", "new"}
    assert any("sessions unknown" in line for line in said)


def test_only_clusters_of_this_service_that_serve_no_more_are_touched(
    world: World, server: ApiServer, run: rollout.Rollout
) -> None:
    world.ray_cluster("active", sessions=0)
    world.ray_cluster("somebody-elses", owner="22222222-2222-2222-2222-222222222222")
    world.service(active="active")
    run.run()
    assert world.clusters() == {"active", "somebody-elses"}
    assert not [path for method, path in server.requests if method == "DELETE"]


def test_a_cluster_that_becomes_active_again_is_left_alone(
    world: World, server: ApiServer, clock: Clock, run: rollout.Rollout
) -> None:
    """A rollback between the last reading and the delete: the names are read again."""
    world.ray_cluster("old", sessions=0)
    world.ray_cluster("new")
    world.service(active="new")
    run._wait_until_settled(1e9)
    reads = []

    def roll_back(method: str, path: str) -> web.Response | None:
        if path.endswith("/portforward") and "old" in path:
            reads.append(path)
            if len(reads) == 2 * run.zeros:  # the last zero has just been read
                world.service(active="old", spec={"serveConfigV2": "0"})
                world.service(active="old")
        return None

    server.faults.append(roll_back)
    world.load["new"] = 5
    with pytest.raises(errors.TimedOut):
        run._release_all(clock.now() + 60)
    assert world.clusters() == {"old", "new"}


def test_a_cluster_of_the_same_name_is_another_cluster(
    world: World, server: ApiServer, run: rollout.Rollout, said: list[str], cluster: Cluster
) -> None:
    """A conflicting write: the watched cluster was replaced. The UID in the delete does not match."""
    world.ray_cluster("old", sessions=0)
    world.service(active="new")
    watched = server.find("RayCluster", "old")[0]["metadata"]["uid"]
    server.remove("RayCluster", "old")
    world.ray_cluster("old", sessions=0)
    run._release("old", watched)
    assert "old" in world.clusters()
    assert "not deleted" in said[-1]
    with pytest.raises(errors.Conflict):
        cluster.delete(cluster.path("rayclusters", "old", root="/apis/ray.io/v1"), watched)


def test_a_delete_whose_answer_is_lost_is_looked_at_again(
    world: World, server: ApiServer, clock: Clock, run: rollout.Rollout, said: list[str]
) -> None:
    world.ray_cluster("old", sessions=0)
    world.ray_cluster("new")
    world.service(active="new")
    lost = []

    def lose(method: str, path: str) -> web.Response | None:
        if method == "DELETE" and not lost:
            lost.append(path)
            server.remove("RayCluster", "old")  # it was carried out
            return server.DROP
        return None

    server.faults.append(lose)
    run.run()
    assert lost
    assert world.clusters() == {"new"}
    assert said[-1] == "no old cluster is left"


def test_lost_connections_are_tried_again(
    world: World, server: ApiServer, run: rollout.Rollout, said: list[str]
) -> None:
    """Two of three are lost, and the answer is the one of a good day."""
    world.ray_cluster("one")
    world.service(active="one")
    lost = []

    def lose(method: str, path: str) -> Any:
        lost.append(len(lost) % 3 != 0)
        return server.DROP if lost[-1] else None

    server.faults.append(lose)
    run.run()
    assert sum(lost) > len(lost) / 2
    assert world.clusters() == {"one"}
    assert said[-1] == "no old cluster is left"


def test_an_api_server_that_is_gone_is_an_error_and_not_an_answer(
    world: World, server: ApiServer, run: rollout.Rollout
) -> None:
    server.faults.append(lambda method, path: server.DROP)
    with pytest.raises(errors.Unreachable) as caught:
        run.run()
    assert caught.value.code == 4
    assert len(server.requests) == ATTEMPTS


def test_an_answer_from_a_stale_cache_is_not_believed(
    world: World, server: ApiServer, clock: Clock, run: rollout.Rollout
) -> None:
    """One API server of several lags behind: it still shows the old cluster as the only one."""
    world.ray_cluster("old", sessions=0)
    world.service(active="old", spec={"serveConfigV2": "1"})
    stale = server.find("RayService", NAME)[0]
    world.ray_cluster("new")
    world.service(active="old", spec={"serveConfigV2": "2"})
    world.service(active="new")
    turn = iter(range(10_000))

    def lag(method: str, path: str) -> web.Response | None:
        if path.endswith(f"/rayservices/{NAME}") and next(turn) % 2:
            return web.json_response(stale)
        return None

    server.faults.append(lag)
    run.run()
    assert world.clusters() == {"new"}


def test_only_stale_answers_are_no_answer(world: World, server: ApiServer, run: rollout.Rollout) -> None:
    world.service(active="old", spec={"serveConfigV2": "1"})
    stale = server.find("RayService", NAME)[0]
    world.service(active="new", spec={"serveConfigV2": "2"})
    run.state()
    server.faults.append(lambda method, path: web.json_response(stale))
    with pytest.raises(errors.Unreachable, match="stale"):
        run.state()


def test_a_service_made_anew_stops_the_rollout(world: World, server: ApiServer, run: rollout.Rollout) -> None:
    world.service(active="one")
    run.state()
    server.remove("RayService", NAME)
    server.put({"apiVersion": "ray.io/v1", "kind": "RayService", "metadata": {"name": NAME}, "spec": {}})
    with pytest.raises(errors.Failed, match="made anew"):
        run.state()


# Permissions


def _granted(method: str, path: str) -> bool:
    """Whether the chart's Role allows a request in the namespace."""
    role = next(item for item in chart.render("ci/everything-values.yaml") if item["kind"] == "Role")
    prefix, _, rest = path.partition("/namespaces/speech/")
    group = "" if prefix == "/api/v1" else prefix.split("/")[2]
    plural, name, sub = (*rest.split("/"), "", "")[:3]
    resource = f"{plural}/{sub}" if sub else plural
    verb = {"GET": "get" if name else "list", "POST": "create", "DELETE": "delete"}[method]
    return any(
        group in rule["apiGroups"]
        and resource in rule["resources"]
        and verb in rule["verbs"]
        and name in rule.get("resourceNames", [name])
        for rule in role["rules"]
    )


def test_the_role_of_the_chart_is_enough_for_all_commands(
    world: World, server: ApiServer, clock: Clock, run: rollout.Rollout, cluster: Cluster, said: list[str]
) -> None:
    world.ray_cluster("old", sessions=0)
    world.ray_cluster("new", sessions=2)
    world.service(active="new")
    run.run()
    assert tool.main(["sessions", NAME, "-n", "speech"]) == 0
    clock.events = [lambda: server.remove("Pod", "new-replica")]
    sessions.drain(cluster, "new-replica", said.append, 60, clock.sleep, clock.now)
    _ready(server)
    _levels(cluster)
    inside = {(method, path) for method, path in server.requests if "/namespaces/" in path}
    assert {method for method, _ in inside} == {"GET", "POST", "DELETE"}
    assert [request for request in sorted(inside) if not _granted(*request)] == []
    assert not _granted("DELETE", "/api/v1/namespaces/speech/pods/x")
    assert not _granted("GET", "/api/v1/namespaces/speech/secrets/others")


# Sessions


def test_the_series_that_are_read_exist() -> None:
    published = {f"ray_{series.name}" for series in metrics.ALL if series.kind == "gauge"}
    assert {sessions.SLOTS, *(name for names in sessions.BUSY.values() for name in names)} <= published


def test_samples_are_read_from_prometheus_text() -> None:
    text = '# HELP a b\na{x="}"} 2\na 3.0 1700000000\nab 7\na_total 9\na{y="z"} 1e1\n'
    assert sessions.samples(text, "a") == [2.0, 3.0, 10.0]


def test_pods_that_hold_nothing_need_no_answer(world: World, server: ApiServer, cluster: Cluster) -> None:
    world.ray_cluster("one", sessions=2)
    world.pod("one-starting", "one", "replica", phase="Pending")
    world.pod("one-ended", "one", "gateway", phase="Failed")
    del server.pages["one-starting", sessions.METRICS_PORT]
    found = sessions.loads(cluster, "one")
    assert sessions.total(found) == 2
    assert {load.pod: load.sessions for load in found} == {
        "one-gateway": 2,
        "one-replica": 2,
        "one-starting": 0,
        "one-ended": 0,
    }


def test_sessions_command_shows_who_is_where(
    world: World, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    world.ray_cluster("new", sessions=5)
    world.ray_cluster("old", sessions=1)
    world.service(active="new")
    assert tool.main(["sessions", NAME, "-n", "speech"]) == 0
    out = capsys.readouterr().out
    assert "new (active): 5 sessions" in out
    assert "old (old): 1 sessions" in out
    assert "new-replica  replica  5         8      node-1" in out
    world.load["old"] = None
    assert tool.main(["sessions", NAME, "-n", "speech"]) == 1


def test_a_drain_evicts_and_waits(
    world: World, server: ApiServer, cluster: Cluster, clock: Clock, said: list[str]
) -> None:
    world.ray_cluster("one", sessions=2)
    clock.events = [lambda: world.load.update(one=1), lambda: server.remove("Pod", "one-replica")]
    sessions.drain(cluster, "one-replica", said.append, 60, clock.sleep, clock.now)
    assert said == [
        "one-replica: draining",
        "one-replica: 2 sessions left",
        "one-replica: 1 sessions left",
        "one-replica: gone",
    ]


def test_a_drain_that_is_not_allowed_says_so(
    world: World, server: ApiServer, cluster: Cluster, clock: Clock, said: list[str]
) -> None:
    world.ray_cluster("one")
    with pytest.raises(errors.Failed, match="no replica's pod"):
        sessions.drain(cluster, "one-gateway", said.append, 60, clock.sleep, clock.now)

    def budget(method: str, path: str) -> web.Response | None:
        if path.endswith("/eviction"):
            raise Status(
                429, "TooManyRequests", "Cannot evict pod as it would violate the pod's disruption budget."
            )
        return None

    server.faults.append(budget)
    with pytest.raises(errors.Blocked, match="disruption budget"):
        sessions.drain(cluster, "one-replica", said.append, 60, clock.sleep, clock.now)
    assert said == []


# Preflight


def _node(name: str, gpus: int, labels: dict[str, str] | None = None, taint: bool = True) -> Any:
    taints = [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}] if taint else []
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {"taints": taints},
        "status": {"allocatable": {"nvidia.com/gpu": str(gpus)}},
    }


def _ready(server: ApiServer, image: str = "quay.example/kuberay/operator:v1.7.0") -> None:
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
    server.put(_node("gpu-1", 8))
    server.put(_node("spot-1", 4, {"node-pool": "spot"}))


def _levels(cluster: Cluster, values: str = "ci/everything-values.yaml") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"ok": [], "warn": [], "fail": []}
    for finding in preflight.run(cluster, copy.deepcopy(chart.render(values))):
        found[finding.level].append(finding.text)
    return found


def test_a_fit_cluster_passes(server: ApiServer, cluster: Cluster) -> None:
    _ready(server)
    found = _levels(cluster)
    assert found["fail"] == found["warn"] == []
    assert (
        "group gpu: room for 12 pods of 1 GPUs on 2 nodes, an upgrade's second cluster included"
        in found["ok"]
    )
    assert "operator kuberay/kuberay-operator 1.7" in found["ok"]
    assert {f"secret {name}" for name in ("keys", "redis", "ray-token", "registry")} <= set(found["ok"])


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        ("no crds", "fail", "no RayCluster and no RayService in ray.io/v1: install the KubeRay operator"),
        ("old operator", "fail", "operator kuberay/kuberay-operator is 1.4; 1.5 or later is needed"),
        ("no operator", "warn", "no deployment labelled kuberay-operator: is the operator running?"),
        ("no secret", "fail", "no secret keys"),
        ("no key", "fail", "secret redis has no key user"),
        ("single writer", "fail", "claim weights is ReadWriteOnce: 10 pods cannot share it"),
        ("no claim", "fail", "no claim weights"),
        (
            "busy gpus",
            "warn",
            "group gpu: room for 3 pods of 1 GPUs on 1 nodes; an upgrade needs 4: the node pool must grow",
        ),
        (
            "no gpus",
            "fail",
            "group gpu: room for 0 pods of 1 GPUs on 0 nodes; 2 are needed: the node pool must grow",
        ),
    ],
)
def test_what_is_missing_is_named(
    server: ApiServer, cluster: Cluster, change: str, level: str, text: str
) -> None:
    _ready(server)
    if change == "no crds":
        server.missing.add("ray.io/v1")
    elif change == "old operator":
        _ready(server, "kuberay/operator:1.4.2")
    elif change == "no operator":
        server.remove("Deployment", "kuberay-operator", "kuberay")
    elif change == "no secret":
        server.remove("Secret", "keys")
    elif change == "no key":
        server.put(
            {
                "apiVersion": "v1",
                "kind": "Secret",
                "metadata": {"name": "redis"},
                "data": {"password": "eA=="},
            }
        )
    elif change == "single writer":
        claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "weights"}}
        server.put({**claim, "spec": {"accessModes": ["ReadWriteOnce"]}, "status": {"phase": "Bound"}})
    elif change == "no claim":
        server.remove("PersistentVolumeClaim", "weights")
    elif change == "busy gpus":
        server.remove("Node", "spot-1", "")
        container = {"name": "c", "resources": {"limits": {"nvidia.com/gpu": "5"}}}
        spec = {"nodeName": "gpu-1", "containers": [container]}
        server.put(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "train"}, "spec": spec}, namespace="ml"
        )
    elif change == "no gpus":
        server.remove("Node", "spot-1", "")
        server.remove("Node", "gpu-1", "")
    assert text in _levels(cluster)[level]


def test_what_may_not_be_seen_is_a_warning(server: ApiServer, cluster: Cluster) -> None:
    _ready(server)

    def forbid(method: str, path: str) -> web.Response | None:
        if path == "/api/v1/nodes":
            raise Status(403, "Forbidden", "nodes is forbidden")
        return None

    server.faults.append(forbid)
    (warning,) = _levels(cluster)["warn"]
    assert warning.startswith("gpus: not allowed to look")


def test_preflight_command_speaks_in_exit_codes(
    server: ApiServer, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(chart.template("ci/everything-values.yaml").stdout)
    command = ["preflight", "-n", "speech", "-f", str(manifest)]
    _ready(server)
    assert tool.main(command) == 0
    server.remove("Secret", "keys")
    assert tool.main(command) == 1
    assert "fail  no secret keys" in capsys.readouterr().out
    manifest.write_text("a: [")
    assert tool.main(command) == 1
    assert "the manifest cannot be read" in capsys.readouterr().err


def test_a_missing_kubeconfig_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert tool.main(["sessions", NAME]) == 4
    assert capsys.readouterr().err.startswith("error: no cluster is configured")


def test_serve_config_is_printed_from_a_render(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(chart.template("values-dev.yaml").stdout)
    assert tool.main(["serve-config", "-f", str(manifest)]) == 0
    assert "import_path: deployments:build" in capsys.readouterr().out


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("preflight", "rollout", "smoke", "sessions", "serve-config", "slots"):
        with pytest.raises(SystemExit) as caught:
            tool.main([command, "--help"])
        assert caught.value.code == 0
        assert "usage: python -m k8s" in capsys.readouterr().out
