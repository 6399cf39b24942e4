"""The Helm chart: everything it renders is valid, everything it refuses says why.

Upgrades and the Serve config have files of their own: test_chart_upgrade.py, test_chart_serve.py.
"""

from __future__ import annotations

import copy
import difflib
import subprocess
import sys
import tarfile
from typing import Any

import jsonschema
import pytest
import yaml
from kube import chart, golden, kuberay, schemas

from k8s import sizing

ALL = [(values, sets, version) for values, sets in chart.CASES.items() for version in chart.VERSIONS]


@pytest.mark.parametrize(("values", "sets"), chart.CASES.items(), ids=list(chart.CASES))
def test_lint_strict(values: str, sets: tuple[str, ...]) -> None:
    options = [part for item in sets for part in ("--set", item)]
    done = chart.helm("lint", "--strict", str(chart.CHART), "--values", str(chart.CHART / values), *options)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("values", "sets", "version"), ALL, ids=lambda value: str(value))
def test_every_document_is_valid(values: str, sets: tuple[str, ...], version: str) -> None:
    documents = chart.render(values, sets, version)
    assert {"RayService", "Pod"} <= {document["kind"] for document in documents}
    for document in documents:
        schemas.validate(document, version)
    assert kuberay.violations(chart.only(documents, "RayService")) == []


@pytest.mark.parametrize("name", golden.RENDERS)
def test_golden_render(name: str) -> None:
    """Any change of what is rendered is seen in review."""
    path = golden.FOLDER / f"{name}.yaml"
    expected, rendered = path.read_text().splitlines(True), golden.rendered(name).splitlines(True)
    difference = "".join(difflib.unified_diff(expected, rendered, str(path), "rendered"))
    assert not difference, f"{difference}\nIf this is wanted: python tests/kube/golden.py"


def test_generated_parts_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "helm/generate.py", "--check"], cwd=chart.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("card", chart.CARDS)
def test_slots_follow_from_the_card(card: str) -> None:
    args = _arguments(chart.render(f"values-{card}.yaml", (chart.TOKEN,)))
    assert args["slots"] == sizing.slots(sizing.CARDS[card]) > 0


def test_a_card_too_small_for_the_weights_holds_nothing() -> None:
    assert sizing.slots(sizing.Card(16 * 2**30, 600e9)) == 0


def _arguments(documents: list[Any]) -> Any:
    service = chart.only(documents, "RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]


# What must not render, and what is said.
REFUSED = {
    "misspelt value": (("gatway.minPods=3",), "additional properties 'gatway' not allowed"),
    "misspelt setting": (("settings.slotz=3",), "additional properties 'slotz' not allowed"),
    "setting out of range": (("settings.slots=0",), "/settings/slots"),
    "derived setting": (
        ("settings.replicas_max=3",),
        "settings.replicas_max is derived: use replicaGroups.*.maxPods",
    ),
    "key in values": (("settings.api_keys={a}",), "settings.api_keys is derived: use apiKeys.existingSecret"),
    "tag latest": (("image.tag=latest",), "the tag latest names no version"),
    "bad digest": (("image.digest=sha256:12",), "/image/digest"),
    "long name": (("fullnameOverride=" + "a" * 48,), "has 48 characters; KubeRay allows 47"),
    "name with capitals": (("fullnameOverride=Talk",), "must begin with a letter"),
    "drain too short": (
        ("timeouts.nodeDrainSeconds=60",),
        "graceful shutdown (longest session, its wait and 5 s) takes 1865",
    ),
    "grace too short": (("timeouts.terminationGraceSeconds=1895",), "not more than the node drain of 1895"),
    "old cluster gone too soon": (
        ("timeouts.clusterDeletionDelaySeconds=60",),
        "less than the longest session of 1800",
    ),
    "no replica group": (("replicaGroups.gpu=null",), "nothing would run the model"),
    "more than the most": (("gateway.minPods=9",), "gateway: minPods is more than maxPods"),
    "static but elastic": (
        ("autoscaler.enabled=false",),
        "without autoscaler.enabled minPods must equal maxPods",
    ),
    "group called gateway": (("replicaGroups.gateway.minPods=1",), "replicaGroups"),
    "too few GPUs": (("replicaGroups.gpu.perPod=2",), "2 replicas of 1 GPUs do not fit in 1"),
    "too few ports": (
        ("settings.media_port_max=21000", "replicaGroups.gpu.perPod=2", "replicaGroups.gpu.gpusPerPod=2"),
        "1 media ports for 2 replicas",
    ),
    "unquoted bytes": (("replicaGroups.gpu.objectStoreBytes=500000000",), "objectStoreBytes"),
    "claim without a name": (
        ("weights.source=claim",),
        "weights.source claim needs weights.claim.existingClaim",
    ),
    "prefetch into nothing": (
        ("weights.prefetch.enabled=true",),
        "weights.prefetch.enabled needs weights.source claim",
    ),
    "no token": (("huggingFace.existingSecret=",), "settings.model 7b is gated"),
    "no weights": (("weights.source=none",), "settings.model 7b needs weights.source node or claim"),
    "model auto": (("settings.model=auto",), "settings.model auto could serve noise"),
    "ingress without host": (("ingress.enabled=true",), "ingress.enabled needs ingress.hosts"),
    "route without gateway": (("httpRoute.enabled=true",), "httpRoute.enabled needs httpRoute.parentRefs"),
    "incremental without class": (
        ("upgrade.strategy=NewClusterWithIncrementalUpgrade",),
        "needs upgrade.incremental.gatewayClassName",
    ),
    "step above surge": (
        (
            "upgrade.strategy=NewClusterWithIncrementalUpgrade",
            "upgrade.incremental.gatewayClassName=istio",
            "upgrade.incremental.maxSurgePercent=10",
        ),
        "stepSizePercent is more than maxSurgePercent",
    ),
    "redis secret alone": (
        ("redis.existingSecret=redis",),
        "redis.existingSecret is set without redis.address",
    ),
    "ray token alone": (
        ("rayAuth.existingSecret=t",),
        "rayAuth.existingSecret is set without rayAuth.enabled",
    ),
    "another Ray": (("rayVersion=2.9.0",), "/rayVersion"),
    "privileged port": (("serve.port=80",), "/serve/port"),
}


@pytest.mark.parametrize(("sets", "message"), REFUSED.values(), ids=list(REFUSED))
def test_wrong_values_are_refused_with_a_reason(sets: tuple[str, ...], message: str) -> None:
    assert message in chart.refused(*sets)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (("httpRoute.enabled=true", "httpRoute.parentRefs[0].name=g"), "needs the Gateway API"),
        (("monitoring.podMonitor.enabled=true",), "need the Prometheus operator"),
        (("monitoring.rules.enabled=true",), "need the Prometheus operator"),
    ],
)
def test_features_of_missing_crds_are_refused(sets: tuple[str, ...], message: str) -> None:
    assert message in chart.refused(*sets, apis=())


def test_an_old_kubernetes_is_refused() -> None:
    done = chart.template("ci/minimal-values.yaml", version="1.30")
    assert "incompatible with Kubernetes" in done.stderr


def test_features_that_need_crds_are_off_by_default() -> None:
    """A first install needs KubeRay and nothing else."""
    kinds = {document["kind"] for document in chart.render("ci/minimal-values.yaml")}
    assert not kinds & {"HTTPRoute", "PodMonitor", "PrometheusRule", "Ingress"}


def _broken(service: Any, *path: Any, value: Any) -> Any:
    service = copy.deepcopy(service)
    place = service
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return service


CLUSTER = ("spec", "rayClusterConfig")
HEAD = (*CLUSTER, "headGroupSpec")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("metadata", "name"), "a" * 48, "47"),
        (("metadata", "annotations", "ray.io/initializing-timeout"), "soon", "duration"),
        ((*HEAD, "template", "spec", "restartPolicy"), "Always", "restartPolicy"),
        ((*HEAD, "template", "spec", "containers", 0, "ports"), [], "serve"),
        ((*HEAD, "rayStartParams", "redis-password"), "x", "redis settings"),
        ((*HEAD, "rayStartParams", "labels"), "x=y", "labels"),
        ((*CLUSTER, "rayVersion"), "2.40.0", "2.52"),
        ((*CLUSTER, "workerGroupSpecs", 0, "rayStartParams", "num-cpus"), "1", "both"),
        (
            (*HEAD, "template", "spec", "containers", 0, "env"),
            [{"name": "RAY_REDIS_ADDRESS"}],
            "redis settings",
        ),
    ],
)
def test_the_rules_of_kuberay_bite(path: tuple[Any, ...], value: Any, message: str) -> None:
    service = chart.only(chart.render("ci/everything-values.yaml"), "RayService")
    assert message in " ".join(kuberay.violations(_broken(service, *path, value=value)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ((*HEAD, "template", "spec", "terminationGraceSeconds"), 5),
        (
            (
                *CLUSTER,
                "workerGroupSpecs",
                1,
                "template",
                "spec",
                "containers",
                0,
                "volumeMounts",
                0,
                "mountpath",
            ),
            "/x",
        ),
        ((*CLUSTER, "autoscalerOptions", "idleTimeout"), 5),
        (("spec", "serveconfigV2"), ""),
    ],
)
def test_the_schema_of_rayservice_bites(path: tuple[Any, ...], value: Any) -> None:
    service = chart.only(chart.render("ci/everything-values.yaml"), "RayService")
    with pytest.raises(jsonschema.ValidationError):
        schemas.validate(_broken(service, *path, value=value), "1.34")


def test_unknown_kinds_fail() -> None:
    with pytest.raises(schemas.UnknownKind, match="RayServise"):
        schemas.validate({"apiVersion": "ray.io/v1", "kind": "RayServise"}, "1.34")


def test_the_chart_packages(tmp_path: Any) -> None:
    done = chart.helm("package", str(chart.CHART), "--destination", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("personaplex-*.tgz")
    with tarfile.open(archive) as tar:
        packed = {name.removeprefix("personaplex/") for name in tar.getnames()}
    assert {"Chart.yaml", "values.schema.json", "README.md", "templates/rayservice.yaml"} <= packed
    assert not any(name.startswith("ci") for name in packed)
