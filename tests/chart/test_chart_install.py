"""The real helm and kubectl against an API server: install, upgrade, roll back, uninstall."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube import chart
from kube.apiserver import ApiServer

from k8s import tools

VALUES = str(chart.CHART / "ci/everything-values.yaml")
NEW_IMAGE = "image.digest=sha256:" + "2" * 64
UNCHECKED = ("--disable-openapi-validation",)


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


@pytest.fixture
def kubeconfig(server: ApiServer, tmp_path: Path) -> Path:
    path = tmp_path / "kubeconfig"
    path.write_text(server.kubeconfig())
    return path


def _helm(kubeconfig: Path, *arguments: str) -> str:
    environment = {
        "PATH": "/usr/bin:/bin",
        "KUBECONFIG": str(kubeconfig),
        "HOME": str(kubeconfig.parent),
    }
    done = chart.helm(*arguments, "--namespace", "speech", env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _settings(server: ApiServer) -> Any:
    (service,) = server.find("RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]


def test_install_upgrade_rollback_uninstall(server: ApiServer, kubeconfig: Path) -> None:
    out = _helm(
        kubeconfig,
        "install",
        "talk",
        str(chart.CHART),
        "-f",
        VALUES,
        "--disable-openapi-validation",
    )
    assert "python -m k8s rollout talk-personaplex -n speech" in out
    expected = {
        (d["kind"], d["metadata"]["name"])
        for d in chart.render("ci/everything-values.yaml")
        if d["kind"] != "Pod"
    }
    there = {(item["kind"], item["metadata"]["name"]) for item in server.objects.values()}
    assert expected <= there
    (before,) = server.find("RayService")
    assert _settings(server)["slots"] == 16

    _helm(
        kubeconfig,
        "upgrade",
        "talk",
        str(chart.CHART),
        "-f",
        VALUES,
        "--set",
        "settings.slots=8",
        "--disable-openapi-validation",
    )
    (after,) = server.find("RayService")
    assert _settings(server)["slots"] == 8
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert after["metadata"]["generation"] == before["metadata"]["generation"] + 1
    assert after["spec"]["rayClusterConfig"] == before["spec"]["rayClusterConfig"]

    _helm(kubeconfig, "upgrade", "talk", str(chart.CHART), "-f", VALUES, "--set", NEW_IMAGE, *UNCHECKED)
    (job,) = server.find("Job")  # whose template is immutable, so that this is another
    assert job["spec"]["template"]["spec"]["containers"][0]["image"].endswith("2" * 64)

    server.remove("RayService", "talk-personaplex")  # as after KubeRay's initializing timeout
    _helm(kubeconfig, "upgrade", "talk", str(chart.CHART), "-f", VALUES, *UNCHECKED)
    assert server.find("RayService")

    _helm(kubeconfig, "rollback", "talk", "1")
    assert _settings(server)["slots"] == 16
    history = yaml.safe_load(_helm(kubeconfig, "history", "talk", "-o", "yaml"))
    assert [entry["revision"] for entry in history] == [1, 2, 3, 4, 5]

    _helm(kubeconfig, "uninstall", "talk")
    assert server.objects == {}


def test_fields_fixed_at_creation_are_refused(server: ApiServer, kubeconfig: Path) -> None:
    """What an upgrade would run into on a real API server, for every kind that has such fields."""
    job = chart.only(chart.render("ci/everything-values.yaml"), "Job")
    binding = chart.only(chart.render("ci/everything-values.yaml"), "RoleBinding")
    changes = [
        (job, {"spec": {"template": {"spec": {"restartPolicy": "Never"}}}}, "spec.template"),
        (binding, {"roleRef": {"name": "other"}}, "roleRef"),
        (
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": "weights"},
                "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "30Gi"}}},
            },
            {"spec": {"accessModes": ["ReadWriteOnce"]}},
            "spec.accessModes",
        ),
    ]
    command = [
        str(tools.fetch().kubectl),
        "--kubeconfig",
        str(kubeconfig),
        "-n",
        "speech",
        "patch",
        "--type=merge",
    ]
    for item, change, field in changes:
        server.put(item)
        patch = [*command, item["kind"], item["metadata"]["name"], "-p", json.dumps(change)]
        done = subprocess.run(patch, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert f"{field}: field is immutable" in done.stderr
    grown = json.dumps({"spec": {"resources": {"requests": {"storage": "60Gi"}}}})
    done = subprocess.run(
        [*command, "PersistentVolumeClaim", "weights", "-p", grown],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


def test_a_kind_that_the_cluster_lacks_stops_the_install(server: ApiServer, kubeconfig: Path) -> None:
    """The chart does not ask, as `helm template` knows no cluster; helm itself does before it starts."""
    server.missing.add("monitoring.coreos.com/v1")
    with pytest.raises(AssertionError, match="PodMonitor"):
        _helm(kubeconfig, "install", "talk", str(chart.CHART), "-f", VALUES, *UNCHECKED)
    assert not server.find("RayService")


def test_kubectl_applies_the_manifests(server: ApiServer, kubeconfig: Path) -> None:
    command = [tools.fetch().kubectl, "--kubeconfig", str(kubeconfig), "apply", "--validate=false", "-k"]
    overlay = str(chart.ROOT / "k8s/overlays/h100")
    for expected in ("created", "unchanged"):
        done = subprocess.run([*command, overlay], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert f"rayservice.ray.io/personaplex {expected}" in done.stdout
