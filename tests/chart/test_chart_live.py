"""The chart's own Serve config on a real Ray: what `values-dev.yaml` renders is deployed and talked to."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from kube import chart
from kube.apiserver import ApiServer
from kube.world import NAME, installed
from ports import free_port

from k8s import __main__ as tool
from k8s import conversation, sessions

READY_WITHIN_S = 150.0


class Live:
    """A running `serve run`: its port, and Ray's own files."""

    def __init__(self, port: int, files: Path) -> None:
        self.port = port
        self.files = files

    def metrics(self) -> str:
        """All metrics of the one node, as Prometheus would scrape them from a pod."""
        targets = json.loads((self.files / "prom_metrics_service_discovery.json").read_text())[0]["targets"]
        pages = []
        for target in targets:
            with contextlib.suppress(urllib.error.URLError):  # the head's exporters of other things
                pages.append(urllib.request.urlopen(f"http://{target}/metrics", timeout=10).read().decode())
        return "".join(pages)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """`serve run` of the rendered file, in a Ray of its own."""
    port = free_port()
    surge = (
        "gateway.surgePods=1",
        "replicaGroups.cpu.surgePods=1",
    )  # so that overrides of deployments are deployed
    service = chart.only(chart.render("values-dev.yaml", (f"serve.port={port}", *surge)), "RayService")
    assert service["spec"]["serveConfigV2"].count("max_surge_percent") == 2
    folder = Path(tempfile.mkdtemp(prefix="chart-", dir="/tmp"))  # Ray's socket paths must stay short
    (folder / "serve.yaml").write_text(service["spec"]["serveConfigV2"])
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PERSONAPLEX_"))
    }
    environment |= {
        "RAY_ADDRESS": "local",
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    command = [Path(sys.executable).parent / "serve", "run", str(folder / "serve.yaml")]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_ready(process, port, folder / "log")
        yield Live(port, folder / "ray")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    pytest.fail(f"not ready within {READY_WITHIN_S:.0f} s:\n{log.read_text()}")


def test_an_idle_service_shows_zero_sessions_and_not_nothing(live: Live) -> None:
    """A release of an old cluster waits for zeros; a series born with the first session never shows one."""
    wanted = {name for names in sessions.BUSY.values() for name in names}
    end, text = time.monotonic() + 30, ""
    while time.monotonic() < end and not all(sessions.samples(text, name) for name in wanted):
        text = live.metrics()
        time.sleep(0.5)
    assert {name: sum(sessions.samples(text, name)) for name in wanted} == dict.fromkeys(wanted, 0.0)
    assert sum(sessions.samples(text, sessions.SLOTS)) == 4


def test_it_holds_a_conversation(live: Live) -> None:
    report = conversation.converse(f"ws://127.0.0.1:{live.port}/api/chat")
    assert report


def test_its_settings_arrived(live: Live) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{live.port}/api/info", timeout=10) as answer:
        info = json.load(answer)
    values = yaml.safe_load((chart.CHART / "values-dev.yaml").read_text())["settings"]
    assert info["model"] == values["model"]
    assert info["slots"] == values["slots"]
    assert info["session_limit_s"] == values["session_limit_s"]


def test_a_conversation_that_fails_is_an_error(live: Live) -> None:
    with pytest.raises(RuntimeError):
        conversation.converse(f"ws://127.0.0.1:{live.port}/nothing/here")


# The Kubernetes client leaves a socket whose other side closed first to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_smoke_and_sessions_work_through_tunnels(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The operator's tool against the live service, in pods that an API server tunnels to."""
    conditions = [{"type": "Ready", "status": "True"}]
    with ApiServer() as server:
        service = chart.only(chart.render("values-dev.yaml"), "RayService")
        service = {**service, "metadata": {"name": "dev", "uid": "u"}}
        active = {"rayClusterName": "one", "applicationStatuses": {"personaplex": {"status": "RUNNING"}}}
        service["status"] = {"observedGeneration": 1, "activeServiceStatus": active, "conditions": conditions}
        server.put(service)
        owner = {"kind": "RayService", "name": "dev", "uid": "u"}
        ray_cluster = {"name": "one", "ownerReferences": [owner]}
        server.put({"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": ray_cluster, "spec": {}})
        for role in ("gateway", "replica"):
            labels = {"ray.io/cluster": "one", "ray.io/serve": "true", "app.kubernetes.io/component": role}
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": role, "labels": labels},
                "spec": {},
            }
            server.put({**pod, "status": {"phase": "Running", "conditions": conditions}})
            server.backends[role, 8000] = ("127.0.0.1", live.port)
            server.pages[role, sessions.METRICS_PORT] = live.metrics
        path = tmp_path / "kubeconfig"
        path.write_text(server.kubeconfig())
        monkeypatch.setenv("KUBECONFIG", str(path))
        assert tool.main(["smoke", "dev"]) == 0, capsys.readouterr().err
        assert "dev: one serves" in capsys.readouterr().out
        # Ray exports a gauge some seconds after it was set.
        end, out = time.monotonic() + 30, ""
        while "one (active): 0 sessions" not in out and time.monotonic() < end:
            assert tool.main(["sessions", "dev"]) == 0, capsys.readouterr().out
            out = capsys.readouterr().out
            time.sleep(0.5)
        assert "one (active): 0 sessions" in out
        assert re.search(r"replica +replica +0 +4", out)
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_verify_passes_and_its_bundle_holds_no_secret(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The self check holds a real conversation, and real logs go into the bundle."""
    token, bundle = "hf_L1ve0123456789abcdefghij", tmp_path / "support.zip"
    monkeypatch.setenv("HF_TOKEN", token)
    log = (live.files.parent / "log").read_text()
    assert "replica" in log
    with ApiServer() as server:
        installed(server, "values-dev.yaml")
        for pod in server.find("Pod"):
            name = pod["metadata"]["name"]
            server.backends[name, 8000] = ("127.0.0.1", live.port)
            server.pages[name, sessions.METRICS_PORT] = live.metrics
            server.logs[name, "ray"] = f"{log}\nthe hub was asked with {token}\n"
        path = tmp_path / "kubeconfig"
        path.write_text(server.kubeconfig())
        monkeypatch.setenv("KUBECONFIG", str(path))
        code = tool.main(["verify", NAME, "-n", "speech", "--bundle", str(bundle)])
        printed = capsys.readouterr()
        assert code == 0, printed
        assert "a conversation through a tunnel to a gateway" in printed.out
        assert "fail" not in printed.out
        (kubeconfig,) = yaml.safe_load(path.read_text())["users"]
    with zipfile.ZipFile(bundle) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    assert any("the hub was asked with" in text for text in files.values()), "no log is in it"
    for secret in (token, *map(str, kubeconfig["user"].values())):
        assert not [name for name, text in files.items() if secret in text]
    gc.collect()
