"""The operator's tool against an API server: rollout, sessions, and all that can go wrong.

Preflight has a file of its own: test_k8s_preflight.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from kube import chart
from kube.apiserver import ApiServer
from kube.objects import Status
from kube.world import NAME, Clock, World, ready

from deployments import metrics
from deployments.settings import Settings
from k8s import __main__ as tool
from k8s import bundle, conversation, errors, inplace, moves, preflight, rollout, sessions, smoke, verify
from k8s.cluster import ATTEMPTS, Cluster
from k8s.differences import differences
from k8s.redaction import Redactor
from personaplex.errors import SessionLost


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


def test_a_state_that_nothing_ends_is_an_error_at_once(
    world: World, clock: Clock, run: rollout.Rollout
) -> None:
    """After KubeRay's initializing timeout no change helps, only another object does."""
    world.service(reason="InitializingTimeout")
    with pytest.raises(errors.Failed, match=f"kubectl -n speech delete rayservice {NAME}, and helm upgrade"):
        run.run()
    assert clock.seconds == 0


def test_what_keeps_pods_from_running_is_said_while_waiting(
    world: World, server: ApiServer, run: rollout.Rollout, said: list[str]
) -> None:
    world.ray_cluster("new")
    world.service(pending="new")
    unschedulable = {
        "phase": "Pending",
        "conditions": [
            {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: insufficient nvidia.com/gpu"}
        ],
    }
    token = {"exitCode": 1, "message": "weights not fetched: the account of this HF_TOKEN has no access\n"}
    download = {"name": "download-weights", "state": {"waiting": {"reason": "CrashLoopBackOff"}}}
    pull = {"name": "ray", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}}
    starting = {"name": "ray", "state": {"waiting": {"reason": "PodInitializing"}}}
    for name, status in {
        "new-replica": unschedulable,
        "new-replica-2": unschedulable,
        "new-replica-3": {"initContainerStatuses": [{**download, "lastState": {"terminated": token}}]},
        "new-gateway": {"containerStatuses": [pull]},
        "new-head": {"containerStatuses": [starting]},
    }.items():
        world.pod(name, "new", "replica")
        (pod,) = server.find("Pod", name)
        server.put({**pod, "status": status})
    run.timeout_s = 20
    with pytest.raises(errors.TimedOut):
        run.run()
    assert said == [
        "a new cluster is being made: new, next to none",
        "new-gateway container ray waits: ImagePullBackOff no such tag",
        "new-replica cannot be scheduled: 0/3 nodes: insufficient nvidia.com/gpu",
        "new-replica-3 container download-weights failed with 1: weights not fetched: the account of this "
        "HF_TOKEN has no access",
    ]


def _chart_spec(values: str = "ci/minimal-values.yaml", sets: tuple[str, ...] = ()) -> Any:
    return copy.deepcopy(chart.only(chart.render(values, sets), "RayService")["spec"])


@pytest.mark.parametrize("strategy", ["None", "NewClusterWithIncrementalUpgrade"])
def test_a_change_that_replaced_nothing_is_no_success(
    world: World, run: rollout.Rollout, strategy: str
) -> None:
    """KubeRay has seen it, serves, and will do nothing: with None, or with a strategy whose gate is off."""
    world.ray_cluster("old", spec=_chart_spec()["rayClusterConfig"])
    wanted = _chart_spec(sets=("image.tag=0.2.0",)) | {"upgradeStrategy": {"type": strategy}}
    world.service(active="old", spec=wanted)
    place = r"workerGroupSpecs\[1\]\.template\.spec\.containers\[0\]\.image"
    with pytest.raises(errors.Failed, match=rf"nothing was replaced: old differs .*{place}.*{strategy}"):
        run.run()


def test_a_cluster_that_kuberay_wrote_in_its_own_way_is_the_same(
    world: World, run: rollout.Rollout, said: list[str]
) -> None:
    """Its Go types write out empty values and shorten quantities; the autoscaler owns the numbers of pods."""
    running = _chart_spec()["rayClusterConfig"]
    running["headGroupSpec"]["template"]["metadata"]["creationTimestamp"] = None
    running["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeDevices"] = []
    running["autoscalerOptions"]["resources"]["limits"] = {"cpu": "0.5", "memory": "1024Mi"}
    group = running["workerGroupSpecs"][1]
    group |= {"replicas": 3, "scaleStrategy": {"workersToDelete": ["pod"]}, "maxReplicas": 9}
    container = group["template"]["spec"]["containers"][0]
    container["resources"]["limits"]["nvidia.com/gpu"] = 1
    container["resources"]["requests"] |= {"cpu": "6000m", "nvidia.com/gpu": "1"}
    world.ray_cluster("one", spec=running)
    world.service(active="one", spec=_chart_spec())
    run.run()
    assert said[-1] == "no old cluster is left"


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda group: group["template"]["spec"]["containers"][0]["env"].pop(), "containers[0].env"),
        (lambda group: group["template"]["spec"].pop("nodeSelector"), "nodeSelector"),
        (lambda group: group["rayStartParams"].update({"object-store-memory": "1"}), "object-store-memory"),
    ],
)
def test_whatever_differs_is_found(change: Callable[[Any], Any], place: str) -> None:
    wanted = _chart_spec(sets=("gateway.nodeSelector.a=b",))["rayClusterConfig"]
    running = copy.deepcopy(wanted)
    change(running["workerGroupSpecs"][0])
    (found,) = differences(wanted, running)
    assert found.endswith(place)
    assert differences(running, wanted) == [found]


def test_an_in_place_change_says_which_way_it_goes_and_is_given_its_time(
    world: World, clock: Clock, cluster: Cluster, said: list[str]
) -> None:
    """Twelve gateways, two at a time, may each wait a longest session: far more than an hour."""
    stopping = {"personaplex": {"status": "DEPLOYING"}}
    spec = _chart_spec(sets=("gateway.surgePods=0", "replicaGroups.gpu.surgePods=1"))
    world.ray_cluster("one", spec=spec["rayClusterConfig"])
    world.service(active="one", spec=spec, applications=stopping)
    run = rollout.Rollout(cluster, NAME, said.append, interval_s=600, sleep=clock.sleep, now=clock.now)
    clock.events = [*(15 * [lambda: None]), lambda: world.service(active="one")]
    run.run()
    assert clock.seconds > 2.5 * 3_600
    assert run.timeout_s == 3_600 + 6 * 1_955
    assert [line for line in said if line.startswith("in place, ")] == [
        "in place, gateway: up to 2 of 12 at a time stop, then their replacements start; clients that can "
        "come back are asked over to the new ones, the others' sessions stay to their own end, up to 1955 s "
        "each, 3.3 h in all",
        "in place, replica: up to 1 more start before as many stop, and without room for them the old ones "
        "go on serving and the change waits; their sessions move to free slots at others; those that find "
        "none wait for one or for their own end, up to 1955 s each, 2.2 h in all",
    ]


_STOP = "at a time stop, then their replacements start"


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (
            inplace.Way("replica", 2, 0, 1_800.0),
            f"replica: up to 1 of 2 {_STOP}; their sessions move to free slots at the others, which need "
            "room for those of one replica; those that find none wait for one or for their own end, "
            "up to 1800 s each, 1.0 h in all",
        ),
        (
            inplace.Way("replica", 16, 0, 1_800.0),
            f"replica: up to 3 of 16 {_STOP}; their sessions move to free slots at the others, which need "
            "room for those of 3 replicas; those that find none wait for one or for their own end, "
            "up to 1800 s each, 3.0 h in all",
        ),
        (
            inplace.Way("replica", 1, 0, 1_800.0),
            f"replica: up to 1 of 1 {_STOP}; its sessions move to its replacement where that has room to "
            "start beside it, else it waits for their own end, up to 1800 s each, 0.5 h in all, and nobody "
            "new is served meanwhile",
        ),
        (
            inplace.Way("gateway", 4, 25, 1_800.0),
            "gateway: up to 1 more start before as many stop, and without room for them the old ones go on "
            "serving and the change waits; clients that can come back are asked over to the new ones, the "
            "others' sessions stay to their own end, up to 1800 s each, 2.0 h in all",
        ),
        (
            inplace.Way("replica", 1, 0, 30.0, limited=True),
            f"replica: up to 1 of 1 {_STOP}; its sessions move to its replacement where that has room to "
            "start beside it, else it waits for drain_limit_s, up to 30 s each, 0.0 h in all, and nobody "
            "new is served meanwhile",
        ),
        (
            inplace.Way("gateway", 4, 0, 95.0, limited=True),
            f"gateway: up to 1 of 4 {_STOP}; clients that can come back are asked over to the new ones, the "
            "others' sessions are lost then, up to 95 s each, 0.1 h in all",
        ),
    ],
)
def test_what_happens_to_sessions_is_said_of_each_way(way: inplace.Way, words: str) -> None:
    assert way.describe() == words


@pytest.mark.parametrize(
    "changed",
    [{}, {"drain_limit_s": 30.0}, {"drain_limit_s": 0.5, "queue_timeout_s": 7.0}, {"drain_limit_s": 9_000.0}],
)
def test_how_long_each_may_take_to_stop_is_as_the_service_has_it(changed: dict[str, float]) -> None:
    """As long as the pod has, which the chart makes longer than the longest session."""
    settings, grace_s = Settings(**changed), 1_955.0
    pods = [{"template": {"spec": {"terminationGracePeriodSeconds": grace_s}}}]
    config = yaml.safe_dump({"applications": [{"args": changed}]})
    found = inplace.ways({"spec": {"serveConfigV2": config, "rayClusterConfig": {"workerGroupSpecs": pods}}})
    wanted = {"gateway": settings.drain_timeout_s, "replica": settings.replica_drain_timeout_s}
    limited = changed.get("drain_limit_s", 9_000.0) < grace_s
    for way in found:
        assert way.limited == limited
        assert way.stop_s == (wanted[way.deployment] if limited else grace_s)


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
    ready(server)
    preflight.run(cluster, chart.render("ci/everything-values.yaml"))
    world.service(active="new", spec=_chart_spec("ci/everything-values.yaml"))
    (service,) = server.find("RayService")
    world.ray_cluster("new", sessions=2, spec=service["spec"]["rayClusterConfig"])
    server.logs["new-gateway", "ray"] = "ready\n"
    (pod,) = server.find("Pod", "new-gateway")
    server.put({**pod, "status": {**pod["status"], "containerStatuses": [{"name": "ray", "ready": True}]}})
    verify.run(cluster, NAME, lambda finding: None)
    bundle.Bundle(cluster, Redactor()).collect(service, [], with_logs=True)
    assert ("GET", "/api/v1/namespaces/speech/pods/new-gateway/log") in server.requests
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


# Command line


def test_a_missing_kubeconfig_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert tool.main(["sessions", NAME]) == 4
    assert capsys.readouterr().err.startswith("error: no cluster is configured")


@pytest.mark.parametrize(
    "text",
    [
        b"a: [",
        b"42",
        b"[]",
        b"clusters: 5",
        b"{current-context: a, contexts: [{name: a}], clusters: [], users: []}",
        b"\xff\xfe\x00clusters",
    ],
)
def test_a_malformed_kubeconfig_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], text: bytes
) -> None:
    path = tmp_path / "kubeconfig"
    path.write_bytes(text)
    monkeypatch.setenv("KUBECONFIG", str(path))
    assert tool.main(["sessions", NAME]) == 4
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("prefix", "path"), [("/", "/api/chat"), ("/speech", "/speech/api/chat")])
def test_smoke_talks_under_the_services_own_prefix(
    world: World, server: ApiServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, prefix: str, path: str
) -> None:
    world.ray_cluster("one")
    world.service(active="one", spec=_chart_spec(sets=(f"settings.route_prefix={prefix}",)))
    for role in ("gateway", "replica"):
        (pod,) = server.find("Pod", f"one-{role}")
        pod["metadata"]["labels"]["ray.io/serve"] = "true"
        ready_now = "True" if role == "gateway" else "False"
        pod["status"]["conditions"] = [{"type": "Ready", "status": ready_now}]
        server.put(pod)
    asked: list[str] = []

    def converse(url: str, key: str | None) -> str:
        asked.append(url)
        return "spoken"

    monkeypatch.setattr(conversation, "converse", converse)
    said: list[str] = []
    smoke.smoke(cluster, NAME, said.append)
    (url,) = asked
    assert url.startswith("ws://127.0.0.1:")
    assert url.endswith(path)
    assert url.count("/") == path.count("/") + 2
    assert said[1] == "talking to one-gateway"


@pytest.mark.parametrize(
    ("outcome", "code"), [("moved", 0), ("no_capacity", 1), ("busy", 1), (None, 1)], ids=str
)
def test_an_operator_moves_a_session(
    world: World,
    server: ApiServer,
    cluster: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    outcome: str | None,
    code: int,
) -> None:
    world.ray_cluster("one")
    world.service(active="one", spec=_chart_spec(sets=("settings.route_prefix=/speech",)))
    (pod,) = server.find("Pod", "one-gateway")
    pod["metadata"]["labels"]["ray.io/serve"] = "true"
    pod["status"]["conditions"] = [{"type": "Ready", "status": "True"}]
    server.put(pod)
    asked: list[tuple[str, ...]] = []

    def ask(url: str, key: str, what: str, order: dict[str, str]) -> dict[str, Any]:
        asked.append((url.partition("/speech")[1], key, what, order["session"]))
        if outcome is None:
            raise SessionLost("the service does not answer")
        row = {"session": "aa", "outcome": outcome, "from": "r0", "to": "r1"}
        return {"sessions": [row], "gateways_silent": 0}

    monkeypatch.setattr("personaplex.sessions.ask", ask)
    (tmp_path / "key").write_text("word\n")
    said: list[str] = []

    def run() -> None:
        moves.move(cluster, NAME, "aa", tmp_path / "key", said.append)

    if code:
        with pytest.raises(errors.Failed, match="aa"):
            run()
    else:
        run()
        assert said == ["aa: moved, r0 -> r1"]
    assert asked == [("/speech", "word", "moves", "aa")]


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("preflight", "rollout", "smoke", "verify", "sessions", "slots"):
        with pytest.raises(SystemExit) as caught:
            tool.main([command, "--help"])
        assert caught.value.code == 0
        assert "usage: python -m k8s" in capsys.readouterr().out
