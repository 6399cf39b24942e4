"""`python -m k8s verify` against an API server: what is wrong with an install is named, and only that."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kube.apiserver import ApiServer
from kube.world import NAME, Clock, World, installed

from k8s import __main__ as tool
from k8s import conversation, errors, failover, policies, sessions, verify
from k8s.cluster import Cluster

VALUES = "ci/everything-values.yaml"


@pytest.fixture
def world(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> World:
    """What the chart's everything-values.yaml looks like once KubeRay has carried it out."""
    monkeypatch.setattr(conversation, "converse", lambda url, key=None: "spoken")
    return installed(server, VALUES)


def found(cluster: Cluster) -> dict[str, list[str]]:
    levels: dict[str, list[str]] = {"ok": [], "warn": [], "fail": []}
    for finding in verify.run(cluster, NAME, lambda finding: None):
        levels[finding.level].append(finding.text)
    return levels


def test_a_whole_install_passes(world: World, cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["verify", NAME, "-n", "speech"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("ok ")] == []
    for text in (
        f"{NAME}: one serves",
        "group headgroup: 1 of at least 1 pods run",
        "group transcriber: 1 of at least 1 pods run",
        "operator kuberay/kuberay-operator 1.7",
        "network policies cover every pod; that the network enforces them is not seen",
        "a key is needed to connect",
        "a conversation through a tunnel to a gateway",
    ):
        assert f"ok    {text}" in lines


def _change_pod(world: World, name: str, change: Callable[[Any], object]) -> None:
    (pod,) = world.server.find("Pod", name)
    change(pod)
    world.server.put(pod)


def _status(**fields: Any) -> Callable[[Any], object]:
    return lambda pod: pod["status"]["containerStatuses"][0].update(fields)


def _no_transcriber(world: World) -> None:
    (policy,) = world.server.find("NetworkPolicy", f"{NAME}-ray")
    (role,) = policy["spec"]["ingress"][0]["from"][0]["podSelector"]["matchExpressions"]
    role["values"].remove("transcriber")
    world.server.put(policy)


def _spec_of_service(world: World) -> None:
    (service,) = world.server.find("RayService")
    spec = service["spec"]
    spec["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["image"] = "new:2"
    world.service(active="one", spec=spec)
    world.service(active="one")


def _without_keys(world: World) -> None:
    (service,) = world.server.find("RayService")
    lines = service["spec"]["serveConfigV2"].splitlines()
    service["spec"]["serveConfigV2"] = "\n".join(line for line in lines if "api_keys_file" not in line)
    world.server.put(service)


def _budget(world: World) -> None:
    (budget,) = world.server.find("PodDisruptionBudget")
    world.server.put({**budget, "status": {"disruptionsAllowed": 0}})


FAULTS: dict[str, tuple[Callable[[World], object], str, str]] = {
    "pod gone": (
        lambda world: world.server.remove("Pod", "one-gpu-0"),
        "fail",
        "group gpu: 1 of at least 2 pods run",
    ),
    "container not ready": (
        lambda world: _change_pod(world, "one-gateway-0", _status(ready=False)),
        "fail",
        "group gateway: 1 of at least 2 pods run",
    ),
    "no image": (
        lambda world: _change_pod(
            world,
            "one-gateway-0",
            _status(state={"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}),
        ),
        "fail",
        "one-gateway-0 container ray waits: ImagePullBackOff no such tag",
    ),
    "restarts": (
        lambda world: _change_pod(
            world,
            "one-headgroup-0",
            _status(restartCount=3, lastState={"terminated": {"reason": "OOMKilled", "exitCode": 137}}),
        ),
        "warn",
        "one-headgroup-0, container ray: started again 3 times (OOMKilled, exit code 137)",
    ),
    "another cluster than asked for": (
        _spec_of_service,
        "fail",
        "one differs from what was asked for at workerGroupSpecs[0].template.spec.containers[0].image",
    ),
    "a pod of another image": (
        lambda world: _change_pod(
            world, "one-gpu-0", lambda pod: pod["spec"]["containers"][0].update(image="old:1")
        ),
        "fail",
        "one-gpu-0 runs old:1, which is not the image of its group",
    ),
    "a tag that moved": (
        lambda world: _change_pod(world, "one-gateway-1", _status(imageID="sha256:other")),
        "warn",
        "is 2 different images on these nodes: pin a digest",
    ),
    "no policy": (
        lambda world: world.server.remove("NetworkPolicy", f"{NAME}-ray"),
        "warn",
        "no NetworkPolicy covers gateway, head, replica, transcriber: Ray trusts who reaches its ports",
    ),
    "a policy that keeps its own pods out": (
        _no_transcriber,
        "fail",
        "network policies keep pods of the service apart: transcriber to gateway, transcriber to head, ",
    ),
    "no budget": (
        lambda world: world.server.remove("PodDisruptionBudget", f"{NAME}-gateway"),
        "warn",
        "no disruption budget covers the gateways: a drain may take all at once",
    ),
    "a budget without room": (_budget, "warn", "allows no disruption now: a gateway's node cannot drain"),
    "no keys": (_without_keys, "warn", "no API keys: whoever reaches the service may talk"),
}


@pytest.mark.parametrize(("fault", "level", "text"), FAULTS.values(), ids=list(FAULTS))
def test_what_is_wrong_is_named(
    world: World, cluster: Cluster, fault: Callable[[World], object], level: str, text: str
) -> None:
    before = found(cluster)
    fault(world)
    after = found(cluster)
    news = [line for line in after[level] if line not in before[level]]
    assert any(text in line for line in news), after


def test_no_conversation_is_a_failure_and_the_rest_is_still_looked_at(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(url: str, key: str | None = None) -> str:
        raise RuntimeError("only 0.1 s came back")

    monkeypatch.setattr(conversation, "converse", fail)
    assert tool.main(["verify", NAME, "-n", "speech"]) == 1
    said = capsys.readouterr()
    assert "only 0.1 s came back" in said.out
    assert said.err.startswith("error: 1 of ")


def test_a_service_that_never_served_says_what_keeps_its_pods(server: ApiServer, cluster: Cluster) -> None:
    world = World(server)
    world.ray_cluster("new")
    world.service(pending="new")
    world.pod("new-replica", "new", "replica", phase="Pending")
    (pod,) = server.find("Pod", "new-replica")
    message = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes are available"}
    server.put({**pod, "status": {"phase": "Pending", "conditions": [message]}})
    assert found(cluster)["fail"] == [
        f"{NAME}: a new cluster is being made: new, next to none",
        "new-replica cannot be scheduled: 0/3 nodes are available",
    ]


@pytest.mark.parametrize(
    ("selector", "labels", "expected"),
    [
        ({}, {}, True),
        ({"matchLabels": {"a": "1"}}, {"a": "1", "b": "2"}, True),
        ({"matchLabels": {"a": "1"}}, {"a": "2"}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, {"a": "2"}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, {}, True),
        ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {"b": "1"}, False),
        ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, {"a": "1"}, False),
    ],
)
def test_label_selectors(selector: Any, labels: dict[str, str], expected: bool) -> None:
    assert policies.selects(selector, labels) is expected


# Failover


class Caller:
    """A conversation that lasts until it is let go, or until its replica is lost."""

    def __init__(self, world: World, holder: str, survives: bool = True, others: int = 0) -> None:
        self.world, self.holder, self.survives, self.others = world, holder, survives, others
        self.over = threading.Event()
        self.heard: list[str] = []

    def __call__(self, url: str, key: str | None) -> str:
        self.heard.append(url)
        for name in ("one-gpu-0", "one-gpu-1"):
            used = int(name == self.holder)
            self.world.server.pages[name, sessions.METRICS_PORT] = lambda used=used: (
                f"ray_personaplex_slots_used {used}.0\nray_personaplex_slots 8.0\n"
            )
        self.world.server.pages["one-gateway-0", sessions.METRICS_PORT] = lambda: (
            f"ray_personaplex_sessions_live {1 + self.others}.0\nray_personaplex_sessions_queued 0.0\n"
        )
        while not self.over.wait(0.005):
            if not self.world.server.find("Pod", self.holder):
                if not self.survives:
                    raise RuntimeError("60.0 s were spoken, but only 20.0 s came back")
                return "spoken"
        return "spoken"


def proof(cluster: Cluster, server: ApiServer, caller: Caller, clock: Clock) -> failover.Proof:
    (service,) = server.find("RayService")
    return failover.Proof(cluster, service, caller, clock.sleep, clock.now)


def test_a_failover_kills_the_replica_of_its_own_conversation(
    world: World, server: ApiServer, cluster: Cluster, clock: Clock
) -> None:
    caller = Caller(world, "one-gpu-1")
    said = proof(cluster, server, caller, clock).run("key")
    assert said == "a conversation outlived its replica's pod one-gpu-1"
    assert {pod["metadata"]["name"] for pod in server.find("Pod")} >= {"one-gpu-0", "one-gateway-0"}
    assert not server.find("Pod", "one-gpu-1")
    assert caller.heard[0].endswith("/api/chat")


def test_a_conversation_that_does_not_survive_is_a_failure(
    world: World, server: ApiServer, cluster: Cluster, clock: Clock
) -> None:
    with pytest.raises(errors.Failed, match=r"did not outlive one-gpu-0: .*only 20.0 s came back"):
        proof(cluster, server, Caller(world, "one-gpu-0", survives=False), clock).run()


@pytest.mark.parametrize("trouble", ["live", "unknown", "alone", "someone came", "socket", "nowhere"])
def test_a_failover_is_refused_and_nothing_is_killed(
    world: World, server: ApiServer, cluster: Cluster, clock: Clock, trouble: str
) -> None:
    caller, message = Caller(world, "one-gpu-0"), ""
    if trouble == "live":
        world.load["one"] = 1
        message = "refused: 2 sessions are live"  # one at each of two pods
    elif trouble == "unknown":
        del server.pages["one-gpu-1", sessions.METRICS_PORT]
        message = r"refused: the sessions of one cannot be counted \(one-gpu-1\)"
    elif trouble == "alone":
        server.remove("Pod", "one-gpu-1")
        message = "refused: 1 replica's pod has slots"
    elif trouble == "someone came":
        caller = Caller(world, "one-gpu-0", others=1)
        message = "refused: 1 sessions beside ours are live now"
    elif trouble == "socket":
        for pod in server.find("Pod"):
            ready_now = str(pod["metadata"]["name"] == "one-gpu-0")
            pod["status"]["conditions"] = [{"type": "Ready", "status": ready_now}]
            server.put(pod)
        message = "refused: one-gpu-0 holds the socket as well as the session"
    else:
        caller = Caller(world, "elsewhere")
        message = "the conversation was seen at no replica"
    before = {pod["metadata"]["name"] for pod in server.find("Pod")}
    clock.events = [lambda: None] * 28 + [caller.over.set] * 10
    if trouble in ("someone came", "socket"):
        threading.Timer(0.3, caller.over.set).start()
    with pytest.raises(errors.Failed, match=message):
        proof(cluster, server, caller, clock).run()
    caller.over.set()
    assert {pod["metadata"]["name"] for pod in server.find("Pod")} == before
    assert not [path for method, path in server.requests if path.endswith("/eviction")]


def test_a_failover_is_made_only_when_asked_for(
    world: World, server: ApiServer, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["verify", NAME, "-n", "speech"]) == 0
    assert not [path for method, path in server.requests if method == "DELETE" or path.endswith("/eviction")]
    world.load["one"] = 3
    assert tool.main(["verify", NAME, "-n", "speech", "--failover"]) == 1
    assert "fail  failover: refused: 6 sessions are live" in capsys.readouterr().out


def test_keys_that_cannot_be_read_end_it_before_anything_is_asked(
    world: World, server: ApiServer, cluster: Cluster, tmp_path: Path
) -> None:
    server.requests.clear()
    assert tool.main(["verify", NAME, "--api-keys-file", str(tmp_path / "none")]) == 1
    assert server.requests == []
