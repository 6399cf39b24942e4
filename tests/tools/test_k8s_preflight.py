"""Preflight against an API server: what would keep a manifest from running is named, and only that."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from kube import chart, kuberay
from kube.apiserver import ApiServer
from kube.objects import Status
from kube.world import node, ready

from k8s import __main__ as tool
from k8s import crd, preflight
from k8s.cluster import Cluster


def levels(cluster: Cluster, values: str = "ci/everything-values.yaml") -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"ok": [], "warn": [], "fail": []}
    for finding in preflight.run(cluster, copy.deepcopy(chart.render(values))):
        found[finding.level].append(finding.text)
    return found


def test_a_fit_cluster_passes(server: ApiServer, cluster: Cluster) -> None:
    ready(server)
    found = levels(cluster)
    assert found["fail"] == found["warn"] == []
    assert (
        "group gpu: room for 12 pods of 1 GPUs on 2 nodes, an upgrade's second cluster included"
        in found["ok"]
    )
    assert "operator kuberay/kuberay-operator 1.7" in found["ok"]
    assert {f"secret {name}" for name in ("keys", "redis", "registry")} <= set(found["ok"])


@pytest.mark.parametrize(
    ("change", "level", "text"),
    [
        ("no crds", "fail", "no RayCluster and no RayService in ray.io/v1: install the KubeRay operator"),
        ("old operator", "fail", "operator kuberay/kuberay-operator is 1.4; 1.5 or later is needed"),
        ("no operator", "warn", "no deployment labelled kuberay-operator: is the operator running?"),
        ("no secret", "fail", "no secret keys"),
        ("no key", "fail", "secret redis has no key user"),
        ("single writer", "fail", "claim weights is ReadWriteOnce: 11 pods cannot share it"),
        ("no claim", "fail", "no claim weights"),
        (
            "busy gpus",
            "warn",
            "group gpu: room for 3 pods of 1 GPUs on 1 nodes; an upgrade needs 4: the node pool must grow",
        ),
    ],
)
def test_what_is_missing_is_named(
    server: ApiServer, cluster: Cluster, change: str, level: str, text: str
) -> None:
    ready(server)
    if change == "no crds":
        server.missing.add("ray.io/v1")
    elif change == "old operator":
        ready(server, "kuberay/operator:1.4.2")
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
    assert text in levels(cluster)[level]


def test_what_may_not_be_seen_is_a_warning(server: ApiServer, cluster: Cluster) -> None:
    ready(server)

    def forbid(method: str, path: str) -> web.Response | None:
        if path == "/api/v1/nodes" or path.startswith(crd.CRDS):
            raise Status(403, "Forbidden", f"{path} is forbidden")
        return None

    server.faults.append(forbid)
    assert [text.split(" (")[0] for text in levels(cluster)["warn"]] == [
        "fields: not allowed to look",
        "gpus: not allowed to look",
        "drivers: not allowed to look",
    ]


def test_preflight_command_speaks_in_exit_codes(
    server: ApiServer, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "manifest.yaml"
    manifest.write_text(chart.template("ci/everything-values.yaml").stdout)
    command = ["preflight", "-n", "speech", "-f", str(manifest)]
    ready(server)
    assert tool.main(command) == 0
    server.remove("Secret", "keys")
    assert tool.main(command) == 1
    assert "fail  no secret keys" in capsys.readouterr().out
    manifest.write_text("a: [")
    assert tool.main(command) == 1
    assert "the manifest cannot be read" in capsys.readouterr().err


def test_the_documented_pipe_needs_no_flags(server: ApiServer, cluster: Cluster) -> None:
    """`helm template` knows no cluster, so no CRDs: every feature renders, and preflight asks the cluster."""
    ready(server)
    assert {"PodMonitor", "PrometheusRule", "HTTPRoute"} <= {
        document["kind"] for document in chart.render("ci/everything-values.yaml")
    }
    server.missing |= {"monitoring.coreos.com/v1", "gateway.networking.k8s.io/v1"}
    assert levels(cluster)["fail"] == [
        "no HTTPRoute in gateway.networking.k8s.io/v1: install the Gateway API, or leave httpRoute off",
        "no PodMonitor and no PrometheusRule in monitoring.coreos.com/v1: install the Prometheus operator, "
        "or leave monitoring off",
    ]


def test_an_operator_from_its_kustomization_is_found(server: ApiServer, cluster: Cluster) -> None:
    ready(server)
    (deployment,) = server.find("Deployment", namespace="kuberay")
    deployment["metadata"]["labels"] = {
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/component": "kuberay-operator",
    }
    server.put(deployment)
    found = levels(cluster)
    assert found["warn"] == found["fail"] == []
    assert "operator kuberay/kuberay-operator 1.7" in found["ok"]


# Fields


@pytest.mark.parametrize(
    ("release", "values", "said"),
    [
        ("1.5.0", "ci/minimal-values.yaml", []),
        (
            "1.5.0",
            "ci/everything-values.yaml",
            [
                "this KubeRay does not know spec.rayClusterConfig.authOptions and would drop it in silence, "
                "which needs KubeRay 1.5.1 or later"
            ],
        ),
        ("1.5.1", "ci/everything-values.yaml", []),
        (
            "1.5.1",
            "ci/auth-values.yaml",
            [
                "this KubeRay does not know spec.rayClusterConfig.authOptions.secretName and would drop it "
                "in silence, which needs KubeRay 1.6 or later"
            ],
        ),
        ("1.6.2", "ci/auth-values.yaml", []),
        ("1.7.0", "ci/auth-values.yaml", []),
    ],
)
def test_fields_that_an_operator_does_not_know_are_named(
    server: ApiServer, cluster: Cluster, release: str, values: str, said: list[str]
) -> None:
    ready(server)
    server.put(kuberay.definition(release))
    assert levels(cluster, values)["fail"] == said


def test_a_misspelt_field_is_found_wherever_it_is() -> None:
    service = copy.deepcopy(chart.only(chart.render("ci/everything-values.yaml"), "RayService"))
    spec = service["spec"]["rayClusterConfig"]
    spec["workerGroupSpecs"][2]["template"]["spec"]["containers"][0]["resourcez"] = {}
    spec["autoscalerOptions"]["idle"] = 5
    spec["headGroupSpec"]["rayStartParams"]["anything"] = "goes"
    assert crd.dropped(kuberay.schema("1.7.0"), service) == [
        "spec.rayClusterConfig.autoscalerOptions.idle",
        "spec.rayClusterConfig.workerGroupSpecs[].template.spec.containers[].resourcez",
    ]


# Nodes

H100 = ("ci/minimal-values.yaml", ("card=h100",))
PRODUCT = "nvidia.com/gpu.product"


def _gpus(server: ApiServer, cluster: Cluster, nodes: list[Any]) -> dict[str, list[str]]:
    """What preflight says about GPUs when these are the nodes."""
    ready(server)
    for name in ("gpu-1", "spot-1"):
        server.remove("Node", name, "")
    for item in nodes:
        server.put(item)
    found = preflight.run(cluster, copy.deepcopy(chart.render(*H100)))
    starts = ("group", "node", "no label")
    return {
        level: [item.text for item in found if item.level == level and item.text.startswith(starts)]
        for level in ("ok", "warn", "fail")
    }


def test_an_empty_pool_is_no_fault(server: ApiServer, cluster: Cluster) -> None:
    found = _gpus(server, cluster, [])
    assert found["fail"] == []
    (warning,) = found["warn"]
    assert warning.startswith("group gpu: no node has GPUs now; the pool must grow from nothing")
    assert PRODUCT in warning


@pytest.mark.parametrize(
    "label",
    [
        "cloud.google.com/gke-accelerator=nvidia-h100-80gb",
        "karpenter.k8s.aws/instance-gpu-name=h100",
        "node.kubernetes.io/instance-type=Standard_NC40ads_H100_v5",
    ],
)
def test_a_label_that_nobody_makes_is_named_with_what_nodes_have(
    server: ApiServer, cluster: Cluster, label: str
) -> None:
    key, _, value = label.partition("=")
    found = _gpus(server, cluster, [node("a", 8, {key: value}), node("b", 8, {key: value})])
    assert found["fail"] == [
        "group gpu: no GPU node has the label nvidia.com/gpu.product, which NVIDIA's GPU feature discovery "
        f"makes; they have {label} (2)"
    ]


def test_another_card_is_a_warning_as_the_right_pool_may_be_empty(
    server: ApiServer, cluster: Cluster
) -> None:
    found = _gpus(server, cluster, [node("a", 8, {PRODUCT: "NVIDIA-L40S"})])
    assert found["fail"] == []
    assert found["warn"] == [
        "group gpu: no GPU node has nvidia.com/gpu.product=NVIDIA-H100-80GB-HBM3; they have "
        "nvidia.com/gpu.product=NVIDIA-L40S (1)"
    ]


def test_nodes_without_gpus_do_not_count(server: ApiServer, cluster: Cluster) -> None:
    found = _gpus(server, cluster, [node("cpu", 0, {PRODUCT: "NVIDIA-H100-80GB-HBM3"})])
    assert found["warn"][0].startswith("group gpu: no node has GPUs now")


def test_a_taint_that_is_not_tolerated_is_named(server: ApiServer, cluster: Cluster) -> None:
    tainted = node("a", 8, {PRODUCT: "NVIDIA-H100-80GB-HBM3"})
    tainted["spec"]["taints"].append({"key": "team", "value": "other", "effect": "NoSchedule"})
    (warning,) = _gpus(server, cluster, [tainted])["warn"]
    assert warning.endswith("taints there: nvidia.com/gpu, team")


@pytest.mark.parametrize(
    ("driver", "level", "said"),
    [
        ("580.65.06", "ok", "node a: driver 580.65.06"),
        ("590", "ok", "node a: driver 590"),
        ("575.57.08", "fail", "node a: driver 575.57.08; the image's CUDA needs 580 or later"),
        ("", "warn", "no label tells the driver of 1 GPU nodes (a); the image's CUDA needs 580 or later"),
    ],
)
def test_a_driver_too_old_for_the_images_cuda(
    server: ApiServer, cluster: Cluster, driver: str, level: str, said: str
) -> None:
    found = _gpus(server, cluster, [node("a", 8, {PRODUCT: "NVIDIA-H100-80GB-HBM3"}, driver=driver)])
    assert any(text.startswith(said) for text in found[level]), found


def test_an_older_feature_discovery_tells_the_driver_too(server: ApiServer, cluster: Cluster) -> None:
    labels = {PRODUCT: "NVIDIA-H100-80GB-HBM3", "nvidia.com/cuda.driver.major": "535"}
    found = _gpus(server, cluster, [node("a", 8, labels, driver="")])
    assert found["fail"] == ["node a: driver 535; the image's CUDA needs 580 or later"]


MIG = "nvidia.com/mig-3g.40gb"


def _mig_node(count: int) -> Any:
    """A node whose cards are all in parts: whole ones are not on offer."""
    found = node("parts", 0)
    found["status"]["allocatable"][MIG] = str(count)
    return found


def test_parts_of_cards_are_counted_by_their_own_name(server: ApiServer, cluster: Cluster) -> None:
    ready(server)
    server.remove("Node", "spot-1", "")
    assert (
        f"group gpu: no node has {MIG} now; the pool must grow from nothing"
        in (levels(cluster, "ci/mig-values.yaml")["warn"])
    )
    server.put(_mig_node(4))
    container = {"name": "c", "resources": {"limits": {MIG: "1", "nvidia.com/gpu": "0"}}}
    busy = {"metadata": {"name": "train"}, "spec": {"nodeName": "parts", "containers": [container]}}
    server.put({"apiVersion": "v1", "kind": "Pod", **busy}, namespace="ml")
    found = levels(cluster, "ci/mig-values.yaml")
    text = f"group gpu: room for 3 pods of 1 {MIG} on 1 nodes, an upgrade's second cluster included"
    assert text in found["ok"]
    assert "node parts: driver 580.95.05" in found["ok"]


def test_claimed_devices_are_said_not_to_be_counted(server: ApiServer, cluster: Cluster) -> None:
    ready(server)
    found = levels(cluster, "ci/podspec-values.yaml")
    assert [text for text in found["warn"] if text.startswith("group")] == [
        "group gpu gets its GPUs by a resource claim: whether a node has the device is not looked at"
    ]


# Quotas


def _quota(server: ApiServer, hard: dict[str, str], used: dict[str, str] | None = None, **spec: Any) -> None:
    metadata = {"name": "team"}
    status = {"hard": hard, "used": used or {}}
    server.put(
        {
            "apiVersion": "v1",
            "kind": "ResourceQuota",
            "metadata": metadata,
            "spec": {"hard": hard, **spec},
            "status": status,
        }
    )


@pytest.mark.parametrize(
    ("hard", "used", "level", "text"),
    [
        ({f"requests.{MIG}": "2", "pods": "40"}, {}, "ok", "quota team has room"),
        (
            {f"requests.{MIG}": "0"},
            {},
            "fail",
            f"quota team: the fewest pods need 1 of requests.{MIG}, it allows 0",
        ),
        (
            {f"requests.{MIG}": "4"},
            {f"requests.{MIG}": "4"},
            "warn",
            f"quota team: 0 of requests.{MIG} are left, the fewest pods need 1",
        ),
        (
            {f"requests.{MIG}": "1"},
            {},
            "warn",
            f"quota team: an upgrade needs 2 of requests.{MIG}, it allows 1",
        ),
        # A head of 8Gi and its autoscaler of 512Mi, two gateways of 8Gi, a replica of 48Gi.
        (
            {"memory": "70Gi"},
            {},
            "fail",
            "quota team: the fewest pods need 72.5Gi of memory, it allows 70.0Gi",
        ),
        # 2 and half a CPU, twice 4, and 6.
        (
            {"cpu": "16"},
            {},
            "fail",
            "quota team: the fewest pods need 16.5 of cpu, it allows 16",
        ),
        ({"count/pods": "3"}, {}, "fail", "quota team: the fewest pods need 4 of count/pods, it allows 3"),
    ],
)
def test_quotas_are_read_before_they_refuse_a_pod(
    server: ApiServer, cluster: Cluster, hard: dict[str, str], used: dict[str, str], level: str, text: str
) -> None:
    ready(server)
    server.put(_mig_node(4))
    _quota(server, hard, used)
    found = levels(cluster, "ci/mig-values.yaml")
    assert [item for item in found["ok"] + found["warn"] + found["fail"] if item.startswith("quota")] == [
        text
    ]
    assert text in found[level]


def test_a_container_that_a_quota_would_refuse_is_named(server: ApiServer, cluster: Cluster) -> None:
    ready(server)
    _quota(server, {"limits.cpu": "1000"})
    (text,) = (item for item in levels(cluster, "ci/minimal-values.yaml")["warn"] if item.startswith("quota"))
    assert text == (
        "quota team counts limits.cpu, which these do not name: download-weights; "
        "refused, unless a LimitRange gives one"
    )


def test_a_quota_with_scopes_is_not_guessed_at(server: ApiServer, cluster: Cluster) -> None:
    ready(server)
    _quota(server, {"pods": "1"}, scopes=["BestEffort"])
    assert levels(cluster)["warn"] == ["quota team counts some pods only (scopes): not looked at"]
