"""The Helm chart: everything it renders is valid.

Upgrades, the Serve config, pods and wrong values have files of their own: test_chart_upgrade.py,
test_chart_serve.py, test_chart_pods.py, test_chart_refused.py.
"""

from __future__ import annotations

import copy
import difflib
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kube import chart, golden, kuberay, schemas

from k8s import sizing

CASES = [pytest.param(values, sets, id=values) for values, sets in chart.CASES.items()]


@pytest.mark.parametrize(("values", "sets"), CASES)
def test_lint_strict(values: str, sets: tuple[str, ...]) -> None:
    options = [part for item in sets for part in ("--set", item)]
    done = chart.helm("lint", "--strict", str(chart.CHART), "--values", str(chart.CHART / values), *options)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", chart.VERSIONS)
@pytest.mark.parametrize(("values", "sets"), CASES)
def test_every_document_is_valid(values: str, sets: tuple[str, ...], version: str) -> None:
    documents = chart.render(values, sets)
    assert {"RayService", "Pod"} <= {document["kind"] for document in documents}
    for document in documents:
        schemas.validate(document, version)
    assert kuberay.violations(chart.only(documents, "RayService")) == []


def test_the_oldest_and_the_newest_kubernetes_get_the_same() -> None:
    renders = [chart.render("ci/everything-values.yaml", version=version) for version in ("1.31", "1.37")]
    assert renders == 2 * [chart.render("ci/everything-values.yaml")]


@pytest.mark.parametrize("release", kuberay.RELEASES)
@pytest.mark.parametrize(("values", "sets"), CASES)
def test_every_rayservice_is_known_whole_to_kuberay(values: str, sets: tuple[str, ...], release: str) -> None:
    """An unknown field would be dropped in silence. One's own token is the only value that asks for more."""
    service = chart.only(chart.render(values, sets), "RayService")
    if (values, release) == ("ci/auth-values.yaml", "1.5.1"):
        with pytest.raises(jsonschema.ValidationError, match="secretName"):
            kuberay.check(service, release)
    else:
        kuberay.check(service, release)


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
    documents = chart.render("ci/minimal-values.yaml", (f"card={card}",))
    assert _arguments(documents)["slots"] == sizing.slots(sizing.CARDS[card]) > 0
    selector = chart.pod_templates(documents)["gpu"]["spec"]["nodeSelector"]
    assert f"NVIDIA-{card.upper()}" in selector["nvidia.com/gpu.product"]


def test_what_is_given_beside_a_card_wins(tmp_path: Path) -> None:
    """Zero and none included, which are as good as any other value."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "card: h200\nsettings: {slots: 5, spare_slots: 0}\nreplicaGroups: {gpu: {nodeSelector: {}}}\n"
    )
    documents = chart.render(str(path), (chart.TOKEN,))
    assert (_arguments(documents)["slots"], _arguments(documents)["spare_slots"]) == (5, 0)
    assert "nodeSelector" not in chart.pod_templates(documents)["gpu"]["spec"]
    assert "slots" not in _arguments(chart.render("ci/minimal-values.yaml"))
    of_the_cpu = chart.pod_templates(chart.render("values-dev.yaml", ("card=h100",)))["cpu"]["spec"]
    assert "nodeSelector" not in of_the_cpu


def test_a_card_too_small_for_the_weights_holds_nothing() -> None:
    assert sizing.slots(sizing.Card(16 * 2**30, 600e9)) == 0


def _arguments(documents: list[Any]) -> Any:
    service = chart.only(documents, "RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]


@pytest.mark.parametrize(
    ("values", "proxies"),
    [
        ((), 1),
        (("serve.haProxy=false",), 0),
        (("ingress.enabled=true", "ingress.hosts={a.example}"), 2),
        (("serve.haProxy=false", "ingress.enabled=true", "ingress.hosts={a.example}"), 1),
        (("settings.trusted_proxies=3",), 3),
        (("settings.trusted_proxies=0", "settings.sessions_per_address=0"), 0),
    ],
)
def test_as_many_proxies_are_trusted_as_name_the_client(values: tuple[str, ...], proxies: int) -> None:
    assert _arguments(chart.render("values.yaml", (chart.TOKEN, *values)))["trusted_proxies"] == proxies


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
        kuberay.check(_broken(service, *path, value=value), "1.7.0")
    if "template" in path:
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
