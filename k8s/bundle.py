"""A support bundle: one zip file for somebody who has to find a fault without access to the cluster.

    summary.txt      the findings, and what was left out and why
    objects/*.yaml   the service, its clusters and pods, policies, budgets, events, the operator's deployment
    metrics/POD.txt  series of the service and of Ray Serve
    info.json        what `/api/info` answers
    logs/POD/*.txt   the end of each container's log, and of the run before it where it was started again

Secrets are never in it: they are read only to be searched for, and everything passes the Redactor. Logs are
left out when a Secret that the service uses cannot be read, since its values could then stand in them unseen.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from k8s import errors, preflight, sessions, smoke
from k8s.cluster import Cluster
from k8s.nodes import Finding
from k8s.redaction import Redactor
from k8s.rollout import read
from k8s.verify import NETWORK, POLICY
from personaplex.files import replacing

SERIES = ("ray_personaplex_", "ray_serve_")
LOCAL_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "PERSONAPLEX_API_KEYS")  # of whoever runs the tool
DEPLOYMENTS = "/apis/apps/v1/deployments"


def known_secrets(cluster: Cluster, service: Any, more: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """Values that must not leave, and why some are not known.

    Of each Secret that the pods refer to, of the tool's own credentials, and `more`.
    """
    found, problems = [*more, *(os.environ.get(name, "") for name in LOCAL_SECRETS)], []
    found += [str(value) for value in cluster.api.configuration.api_key.values()]
    found += [value.split()[-1] for value in found if value.split()]  # "Bearer TOKEN"
    for name in sorted(preflight.references(service["spec"].get("rayClusterConfig", {}))):
        try:
            data = cluster.get(cluster.path("secrets", name)).get("data") or {}
            found += [base64.b64decode(value).decode(errors="replace") for value in data.values()]
        except errors.NotFound:
            continue
        except (errors.ToolError, binascii.Error) as error:
            problems.append(f"secret {name}: {error}")
    return [value for value in found if value], problems


@dataclass
class Bundle:
    """Collects the files, each safe to be shown; `left_out` says what is missing and why."""

    cluster: Cluster
    redactor: Redactor
    files: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def collect(self, service: Any, findings: list[Finding], with_logs: bool) -> None:
        """Everything that may be read; a part that may not is left out and said."""
        uid, state = service["metadata"]["uid"], read(service)
        self._yaml("rayservice", lambda: service)
        owned = [
            item
            for item in self.cluster.clusters()
            if any(owner["uid"] == uid for owner in item["metadata"].get("ownerReferences", []))
        ]
        self._yaml("rayclusters", lambda: owned)
        names = [item["metadata"]["name"] for item in owned]
        pods = [pod for name in names for pod in self.cluster.pods(f"ray.io/cluster={name}")]
        self._yaml("pods", lambda: pods)
        core = "/api/v1"
        in_namespace = (
            ("networkpolicies", NETWORK),
            ("poddisruptionbudgets", POLICY),
            ("resourcequotas", core),
            ("events", core),
        )
        for plural, root in in_namespace:
            self._listed(plural, self.cluster.path(plural, root=root))
        labels = "app.kubernetes.io/name=kuberay-operator"
        self._yaml("operator", lambda: self.cluster.list(DEPLOYMENTS, labelSelector=labels))
        for pod in pods:
            self._metrics(pod["metadata"]["name"])
            if with_logs:
                self._logs(pod)
        self._try("info.json", lambda: self._info(service, state.active))
        self._summary(findings)

    def write(self, path: Path) -> None:
        """One zip file that only its owner may read. Raises OSError."""
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in sorted(self.files.items()):
                archive.writestr(name, text)
        with replacing(path) as part:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.write(whole.getvalue())

    def _try(self, name: str, make: Callable[[], str]) -> None:
        try:
            self.files[name] = make()
        except errors.ToolError as error:
            self.left_out.append(self.redactor.text(f"{name}: {error}"))

    def _yaml(self, name: str, get: Callable[[], Any]) -> None:
        self._try(
            f"objects/{name}.yaml", lambda: yaml.safe_dump(self.redactor.document(get()), sort_keys=False)
        )

    def _listed(self, name: str, path: str) -> None:
        self._yaml(name, lambda: self.cluster.list(path))

    def _metrics(self, pod: str) -> None:
        def read_series() -> str:
            lines = self.cluster.scrape(pod, sessions.METRICS_PORT).splitlines()
            return self.redactor.text("\n".join(line for line in lines if line.startswith(SERIES)) + "\n")

        self._try(f"metrics/{pod}.txt", read_series)

    def _logs(self, pod: Any) -> None:
        name, status = pod["metadata"]["name"], pod.get("status", {})
        for item in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
            for previous in (False, True)[: 2 if item.get("restartCount") else 1]:
                suffix = "-previous" if previous else ""
                self._log(f"logs/{name}/{item['name']}{suffix}.txt", name, item["name"], previous)

    def _log(self, file: str, pod: str, container: str, previous: bool) -> None:
        self._try(file, lambda: self.redactor.text(self.cluster.log(pod, container, previous=previous)))

    def _info(self, service: Any, ray_cluster: str) -> str:
        pod, port = smoke.serving_pod(self.cluster, service, ray_cluster)
        text = self.cluster.scrape(pod, port, f"{smoke.prefix(service)}/api/info")
        try:
            return json.dumps(self.redactor.document(json.loads(text)), indent=2) + "\n"
        except ValueError as error:
            raise errors.Failed("the answer is no JSON") from error

    def _summary(self, findings: list[Finding]) -> None:
        lines = [f"{finding.level:<4}  {finding.text}" for finding in findings]
        lines += ["", "left out:", *(self.left_out or ["nothing"])]
        self.files["summary.txt"] = "\n".join(self.redactor.text(line) for line in lines) + "\n"


def save(
    cluster: Cluster, name: str, findings: list[Finding], path: Path, keys: Iterable[str] = ()
) -> list[str]:
    """Writes the bundle of one service; what was left out. Raises ToolError or OSError."""
    service = cluster.service(name)
    secrets, problems = known_secrets(cluster, service, keys)
    redactor = Redactor(secrets)
    if redactor.too_short:
        problems.append(f"{redactor.too_short} secret values are too short to be searched for")
    bundle = Bundle(cluster, redactor, left_out=[f"logs: {problem}" for problem in problems])
    bundle.collect(service, findings, with_logs=not problems)
    bundle.write(path)
    return bundle.left_out
