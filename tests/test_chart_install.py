"""The real helm and kubectl against an API server: install, upgrade, roll back, uninstall."""

from __future__ import annotations

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

    _helm(kubeconfig, "rollback", "talk", "1")
    assert _settings(server)["slots"] == 16
    history = yaml.safe_load(_helm(kubeconfig, "history", "talk", "-o", "yaml"))
    assert [entry["revision"] for entry in history] == [1, 2, 3]

    _helm(kubeconfig, "uninstall", "talk")
    assert server.objects == {}


def test_kubectl_applies_the_manifests(server: ApiServer, kubeconfig: Path) -> None:
    command = [tools.fetch().kubectl, "--kubeconfig", str(kubeconfig), "apply", "--validate=false", "-k"]
    overlay = str(chart.ROOT / "k8s/overlays/h100")
    for expected in ("created", "unchanged"):
        done = subprocess.run([*command, overlay], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert f"rayservice.ray.io/personaplex {expected}" in done.stdout
