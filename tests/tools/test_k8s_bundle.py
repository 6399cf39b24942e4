"""The support bundle: what a fault needs is in it, and no secret is, wherever it stood."""

from __future__ import annotations

import base64
import json
import re
import stat
import zipfile
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from kube.apiserver import ApiServer
from kube.objects import Status
from kube.world import NAME, World, installed

from k8s import __main__ as tool
from k8s import conversation
from k8s.cluster import Cluster
from k8s.redaction import GONE, Redactor

HF_TOKEN = "hf_QzRtYUxv0123456789abcdefgh"
API_KEY, SECOND_KEY = "s3cret-of-acme", "zwölf &küchen/keys+"
REDIS, REGISTRY = "pa55 word/with:odd=chars", "registry-pa55"
MEDIA = "7f" * 32
RESUME = "Zm9vYmFyYmF6cXV4MTIzNDU2Nzg5MEFCQ0RFRg-_"
PEM = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwgg\n-----END PRIVATE KEY-----"
# Secrets that stand in no Secret the tool can read: known by their place or their shape alone.
BY_PLACE = ("env-literal-42", "querykey77", "cookie-abc-1", "basic-dXNlcjpw", "wsproto-key-9", "cmdline-pw-5")
KNOWN = (
    HF_TOKEN,
    API_KEY,
    SECOND_KEY,
    REDIS,
    REGISTRY,
    "Tw1lio-auth",
    "operator-0f-nights",
    "local-hf-token-3",
    "own-key-of-me",
)
ALL = (*KNOWN, *BY_PLACE, MEDIA, RESUME, "MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwgg")


def forms(secret: str) -> set[str]:
    encoded = base64.b64encode(secret.encode()).decode()
    return {
        secret,
        quote(secret, safe=""),
        quote_plus(secret),
        encoded,
        encoded.rstrip("="),
        secret.encode().hex(),
    }


def server_token(cluster: Cluster) -> str:
    """The tool's own, of the kubeconfig."""
    (value,) = cluster.api.configuration.api_key.values()
    return str(value).split()[-1]


def _log() -> str:
    keys = "".join(f"worker knows {secret}!\n" for secret in KNOWN)
    urls = "".join(f"GET http://h/x/{quote(secret, safe='')}\n" for secret in KNOWN)
    encoded = "".join(f"b64 {base64.b64encode(secret.encode()).decode()}\n" for secret in KNOWN)
    return f"""{keys}{urls}{encoded}\
INFO 127.0.0.1 - "GET /api/chat?worker_auth_id=querykey77&x=1 HTTP/1.1" 101
DEBUG headers {{'host': 'x', 'authorization': 'Bearer querykey77', 'a': 'b'}}
DEBUG (b'Cookie', b'session=cookie-abc-1')
proxy-authorization: Basic basic-dXNlcjpw
Sec-WebSocket-Protocol: realtime, openai-insecure-api-key.wsproto-key-9
media secret {MEDIA}
resume with {RESUME} now
{json.dumps({"redis_password": REDIS, "n": 1})}
connecting to redis://user:cmdline-pw-5@redis:6379
{PEM}
replica 3 ready after 41.5 s
"""


@pytest.fixture
def world(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(conversation, "converse", lambda url, key=None: "spoken")
    monkeypatch.setenv("HF_TOKEN", "local-hf-token-3")
    world = installed(server, "ci/everything-values.yaml")
    registry = {"auths": {"registry.example": {"username": "bot", "password": REGISTRY}}}
    secrets = {
        "hf": {"token": HF_TOKEN},
        "keys": {"keys": f"# ours\n{API_KEY}  label=acme sessions=20\n{SECOND_KEY}\n"},
        "redis": {"password": REDIS, "user": "speech-redis"},
        "registry": {".dockerconfigjson": json.dumps(registry)},
        "operators": {"keys": "operator-0f-nights\n"},
        "twilio": {"token": "Tw1lio-auth"},
    }
    for name, data in secrets.items():
        encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
        server.put({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": encoded})
    _hide(server)
    return world


def _hide(server: ApiServer) -> None:
    """Secrets wherever people and controllers leave them."""
    (service,) = server.find("RayService")
    config = service["spec"]["rayClusterConfig"]
    env = config["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    reference = {"secretKeyRef": {"name": "twilio", "key": "token"}}
    env += [
        {"name": "TWILIO", "valueFrom": reference},
        {"name": "ANYTHING", "value": "env-literal-42"},
        {"name": "RAY_AUTH_TOKEN", "value": "env-literal-42"},
    ]
    config["headGroupSpec"]["rayStartParams"]["redis-password"] = "cmdline-pw-5"
    service["metadata"]["annotations"] = {
        "kubectl.kubernetes.io/last-applied-configuration": json.dumps({"password": REDIS}),
        "example.org/note": "env-literal-42",
        "personaplex.io/gpu-driver": "580",
    }
    text = service["spec"]["serveConfigV2"]
    service["spec"]["serveConfigV2"] = (
        f"{text}\n      api_keys: [{json.dumps(API_KEY)}]\n      hf_token: querykey77\n"
    )
    kept = server.put(service)
    kept["status"]["observedGeneration"] = kept["metadata"]["generation"]
    server.put(kept)
    (ray_cluster,) = server.find("RayCluster")
    server.put({**ray_cluster, "spec": config})
    for pod in server.find("Pod"):
        container = pod["spec"]["containers"][0]
        container["env"] = [*container["env"], *env[-3:]]
        container["args"] = ["ray start --redis-password=cmdline-pw-5", "--password", "cmdline-pw-5"]
        name = pod["metadata"]["name"]
        server.put(pod)
        server.logs[name, "ray"] = _log()
        server.pages[name, 8000] = lambda: json.dumps({"model": "tiny", "note": API_KEY})
    (pod,) = server.find("Pod", "one-gpu-0")
    pod["status"]["containerStatuses"][0]["restartCount"] = 1
    pod["status"]["message"] = f"token={HF_TOKEN} was refused"
    server.put(pod)
    server.logs["one-gpu-0", "ray-previous"] = "Traceback: it broke with " + REDIS + "\n"
    event = {"apiVersion": "v1", "kind": "Event", "metadata": {"name": "e"}}
    server.put(
        {
            **event,
            "message": f"Failed to pull with https://bot:{REGISTRY}@registry.example",
            "type": "Warning",
        }
    )


def _bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, str]:
    keys = tmp_path / "mine"
    keys.write_text("own-key-of-me\n")
    path = tmp_path / "support.zip"
    arguments = ["verify", NAME, "-n", "speech", "--api-keys-file", str(keys), "--bundle", str(path)]
    assert tool.main(arguments) == code, capsys.readouterr()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_no_secret_is_in_it(
    world: World, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = _bundle(tmp_path, capsys)
    whole = "\n".join(f"{name}\n{text}" for name, text in files.items())
    assert "s3cret" in _log()  # the search below has something to find
    for secret in ALL:
        for form in forms(secret):
            assert form not in whole, (secret, next(name for name, text in files.items() if form in text))
    assert server_token(cluster) not in whole


def test_what_a_fault_needs_is_in_it(
    world: World, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = _bundle(tmp_path, capsys)
    objects = {f"objects/{name}.yaml" for name in ("rayservice", "rayclusters", "pods", "events", "operator")}
    assert objects | {"objects/networkpolicies.yaml", "objects/poddisruptionbudgets.yaml"} <= set(files)
    assert "replica 3 ready after 41.5 s" in files["logs/one-gpu-0/ray.txt"]
    assert files["logs/one-gpu-0/ray-previous.txt"].startswith("Traceback: it broke with ")
    assert "ray_personaplex_slots" in files["metrics/one-gpu-0.txt"]
    assert json.loads(files["info.json"])["model"] == "tiny"
    service = files["objects/rayservice.yaml"]
    assert "slots: 16" in service
    assert "personaplex.io/gpu-driver: '580'" in service
    assert "name: RAY_worker_niceness\n" in service
    assert re.search(r"name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S\s+value: '\d+'", service)
    assert re.search(
        r"secretKeyRef:\s+name: redis\s+key: password", service
    )  # which Secret, not what it holds
    assert "api_keys_file: /etc/personaplex/keys" in service
    assert "image: registry.example/personaplex-serve@sha256:0000" in service
    summary = files["summary.txt"]
    assert f"ok    {NAME}: one serves" in summary
    assert "left out:\nnothing" in summary.replace("secret ray-token", "")


def test_without_the_secrets_there_are_no_logs(
    world: World, server: ApiServer, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their values could stand there and nobody would know them."""

    def forbid(method: str, path: str) -> web.Response | None:
        if path.endswith("/secrets/redis"):
            raise Status(403, "Forbidden", f"{path} is forbidden")
        return None

    server.faults.append(forbid)
    files = _bundle(tmp_path, capsys)
    assert not [name for name in files if name.startswith("logs/")]
    assert "logs: secret redis: GET " in files["summary.txt"]
    assert "objects/pods.yaml" in files


def test_a_secret_too_short_to_search_for_leaves_the_logs_out(
    world: World, server: ApiServer, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"password": base64.b64encode(b"abc").decode(), "user": ""}
    server.put({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "redis"}, "data": data})
    files = _bundle(tmp_path, capsys)
    assert not [name for name in files if name.startswith("logs/")]
    assert "too short to be searched for" in files["summary.txt"]


def test_what_may_not_be_read_is_left_out_and_said(
    world: World, server: ApiServer, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def forbid(method: str, path: str) -> web.Response | None:
        if path.endswith(("/events", "/deployments")) or "/one-gpu-1/log" in path:
            raise Status(403, "Forbidden", f"{path} is forbidden")
        return None

    server.faults.append(forbid)
    files = _bundle(tmp_path, capsys)
    missing = {"objects/events.yaml", "objects/operator.yaml", "logs/one-gpu-1/ray.txt"}
    assert not missing & set(files)
    assert all(f"\n{name}: GET " in files["summary.txt"] for name in missing)


def test_a_long_log_is_cut_at_a_line(
    world: World, server: ApiServer, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A secret cut in two would be no longer known."""
    line = f"{'-' * 700} {API_KEY}\n"
    server.logs["one-gpu-0", "ray"] = line * 3_000
    text = _bundle(tmp_path, capsys)["logs/one-gpu-0/ray.txt"]
    assert len(text) > 2**19
    assert set(text.splitlines()) == {f"{'-' * 700} {GONE}"}


def test_a_bundle_of_a_service_that_is_ill(
    world: World, server: ApiServer, cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That is when it is wanted: it is written although checks fail."""
    server.remove("Pod", "one-gpu-1")
    assert "fail  group gpu: 1 of at least 2 pods run" in _bundle(tmp_path, capsys, code=1)["summary.txt"]


# The redactor alone


@pytest.mark.parametrize(
    "text",
    [
        "listening on 0.0.0.0:8000",
        "node 4f2a9c0d8e7b6a5f4e3d2c1b0a9f8e7d joined",
        "image registry.example/a@sha256:" + "0a" * 32,
        "secretName: hf",
        "api_keys_file: /etc/personaplex/keys",
        "tokens 17 of 17",
        "2026-11-27 00:00:01,123 INFO replica.py:77 -- session a1b2c3 ended: left",
    ],
)
def test_plain_text_stays(text: str) -> None:
    assert Redactor(["something-else"]).text(text) == text


def test_plain_objects_stay() -> None:
    item: Any = {
        "imagePullSecrets": [{"name": "registry"}],
        "automountServiceAccountToken": False,
        "authOptions": {"mode": "token", "secretName": "ray-token"},
        "volumes": [
            {"name": "k", "secret": {"secretName": "keys", "items": [{"key": "keys", "path": "keys"}]}}
        ],
        "replicas": 3,
        "env": [{"name": "HF_HOME", "value": "/models"}, {"name": "RAY_IP", "value": "10.0.0.1"}],
    }
    assert Redactor().document(item) == item


def test_what_is_taken_out_hides_nothing_else() -> None:
    shown = Redactor(["pass", "wo"]).text("start --password=tiger ?a=b\nfine")
    assert "tiger" not in shown
    assert shown.endswith("\nfine")


@given(st.text(min_size=4, max_size=40).filter(lambda text: text.strip() == text), st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_a_known_secret_never_stays(secret: str, around: str) -> None:
    redactor = Redactor([secret])
    for form in forms(secret):
        shown = redactor.text(f"{around} {form} {around}")
        assert form not in shown.replace(GONE, "") or form in around


def test_a_long_line_is_read_in_linear_time() -> None:
    """A log of one line must not hold the tool up."""
    for text in ("a" * 10**6, "token" * 10**5, "://" * 10**5, "?a" * 10**5, "Aa1" * 10**5):
        assert len(Redactor(["never-there"]).text(text)) <= len(text) + len(GONE)
