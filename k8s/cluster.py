"""What the tool asks of a cluster: a few reads, one delete, one eviction, one tunnel into a pod.

Objects are plain dictionaries as the API server sends them: half of them are KubeRay's and have no classes.
Reads are tried again when a connection is lost; writes carry the UID of what was looked at, so that trying
again can never hit another object of the same name.
"""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes
import urllib3
import yaml
from kubernetes.stream import portforward

from k8s import errors

DEFAULT_KUBECONFIG = "~/.kube/config"
OWN_NAMESPACE = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
RAY = "/apis/ray.io/v1"
ATTEMPTS = 5
TIMEOUT_S = 15.0
LOG_LINES, LOG_BYTES = 2_000, 2**20
_TRY_AGAIN = frozenset({429, 500, 502, 503, 504})


class Cluster:
    """One namespace of one cluster."""

    def __init__(
        self, api: kubernetes.client.ApiClient, namespace: str, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.api = api
        self.namespace = namespace
        self._sleep = sleep

    @classmethod
    def connect(cls, namespace: str | None = None, context: str | None = None) -> Cluster:
        """From KUBECONFIG, or a pod's service account. Raises Unreachable when neither can be used."""
        configuration, config = kubernetes.client.Configuration(), _untyped(kubernetes.config)
        configuration.retries = False  # they are counted here, not in the pool below
        files = os.environ.get("KUBECONFIG", DEFAULT_KUBECONFIG)
        try:
            if any(os.path.exists(os.path.expanduser(file)) for file in files.split(os.pathsep)):
                config.load_kube_config(files, context, client_configuration=configuration)
                contexts, active = config.list_kube_config_contexts(files)
                chosen = next((item for item in contexts if item["name"] == context), active)
                namespace = namespace or chosen["context"].get("namespace", "default")
            else:
                config.load_incluster_config(client_configuration=configuration)
                namespace = namespace or Path(OWN_NAMESPACE).read_text(encoding="utf-8").strip()
        except (kubernetes.config.ConfigException, OSError) as error:
            raise errors.Unreachable(f"no cluster is configured: {error}") from error
        except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
            # The client reads a kubeconfig without checking its shape.
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise errors.Unreachable(f"the kubeconfig {files} cannot be used: {why}") from error
        return cls(kubernetes.client.ApiClient(configuration), namespace)

    def path(self, plural: str, name: str = "", *, root: str = "/api/v1") -> str:
        return f"{root}/namespaces/{self.namespace}/{plural}" + (f"/{name}" if name else "")

    def service(self, name: str) -> Any:
        """The RayService. Raises NotFound."""
        return self.get(self.path("rayservices", name, root=RAY))

    def clusters(self) -> list[Any]:
        """All RayClusters of the namespace."""
        return self.list(self.path("rayclusters", root=RAY))

    def pods(self, selector: str) -> list[Any]:
        return self.list(self.path("pods"), labelSelector=selector)

    def list(self, path: str, **query: str) -> list[Any]:
        """All pages of a list."""
        items, token = [], ""
        while True:
            page = self.get(path, **query, limit="500", **({"continue": token} if token else {}))
            items += page["items"]
            token = page["metadata"].get("continue", "")
            if not token:
                return items

    def get(self, path: str, **query: str) -> Any:
        """One object. Raises NotFound, Forbidden or Unreachable."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._request("GET", path, query=query)
            except errors.Unreachable:
                if attempt == ATTEMPTS:
                    raise
                self._sleep(0.25 * 2**attempt)
        raise AssertionError("unreachable")

    def delete(self, path: str, uid: str) -> bool:
        """Deletes exactly the object with this UID; False when it is gone already.

        Raises Conflict when another object has its name now, Unreachable when the answer was lost: look
        again.
        """
        options = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid},
        }
        try:
            self._request("DELETE", path, body=options)
        except errors.NotFound:
            return False
        return True

    def evict(self, pod: str, uid: str, grace_s: int | None = None) -> None:
        """Asks for the end of one pod: a graceful one, or within `grace_s`; 0 kills it.

        Raises Blocked when a disruption budget forbids it.
        """
        options: dict[str, Any] = {"preconditions": {"uid": uid}}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": self.namespace},
            "deleteOptions": options,
        }
        self._request("POST", self.path("pods", f"{pod}/eviction"), body=body)

    def log(self, pod: str, container: str, *, previous: bool = False) -> str:
        """The end of one container's log, whole lines. Raises NotFound, Forbidden, Failed or Unreachable."""
        path = self.path("pods", f"{pod}/log")
        query = {"container": container, "tailLines": str(LOG_LINES), "limitBytes": str(LOG_BYTES)}
        status, data = self._send("GET", path, query=query | ({"previous": "true"} if previous else {}))
        if status != 200:
            _checked("GET", path, status, data)
        if len(data) >= LOG_BYTES:
            data = data[: data.rfind(b"\n") + 1]
        return data.decode(errors="replace")

    def scrape(self, pod: str, port: int, path: str = "/metrics") -> str:
        """One HTTP GET inside a pod, through a tunnel of the API server; no NetworkPolicy stands in its way.

        Raises Unreachable for whatever goes wrong: a scrape is either whole or none.
        """
        connection = http.client.HTTPConnection("localhost", port, timeout=TIMEOUT_S)
        try:
            connection.sock = self.tunnel(pod, port)
            connection.sock.settimeout(TIMEOUT_S)
            connection.request("GET", path, headers={"Connection": "close"})
            answer = connection.getresponse()
            body = answer.read().decode()
        except (OSError, http.client.HTTPException, UnicodeDecodeError) as error:
            raise errors.Unreachable(f"pod {pod}, port {port}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if answer.status != 200:
            raise errors.Unreachable(f"pod {pod}, port {port}{path}: HTTP {answer.status}")
        return body

    def tunnel(self, pod: str, port: int) -> Any:
        """A socket to a port of a pod. Raises Unreachable."""
        core = kubernetes.client.CoreV1Api(self.api)
        try:
            forward = portforward(
                core.connect_get_namespaced_pod_portforward, pod, self.namespace, ports=str(port)
            )
        except kubernetes.client.ApiException as error:
            raise errors.Unreachable(f"pod {pod}, port {port}: {error.reason}") from error
        return forward.socket(port)

    def _request(self, method: str, path: str, query: dict[str, str] | None = None, body: Any = None) -> Any:
        return _checked(method, path, *self._send(method, path, query, body))

    def _send(
        self, method: str, path: str, query: dict[str, str] | None = None, body: Any = None
    ) -> tuple[int, bytes]:
        """The status and the body of one answer. Raises Unreachable."""
        headers = {"Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        serialized = self.api.param_serialize(
            method=method,
            resource_path=path,
            query_params=list((query or {}).items()),
            header_params=headers,
            body=body,
            auth_settings=["BearerToken"],
        )
        try:
            answer = self.api.call_api(*serialized, _request_timeout=TIMEOUT_S)
            data: bytes = answer.read()  # type: ignore[no-untyped-call]
        except (urllib3.exceptions.HTTPError, kubernetes.client.ApiException) as error:
            reason = getattr(error, "reason", None) or error
            raise errors.Unreachable(f"no answer from the API server: {reason}") from error
        return answer.status, data


def _untyped(module: Any) -> Any:
    """The client's helpers carry no annotations."""
    return module


def _checked(method: str, path: str, status: int, data: bytes) -> Any:
    """The answer's object, or the error that its status stands for."""
    try:
        answer = json.loads(data)
    except ValueError as error:
        raise errors.Unreachable(f"{method} {path}: HTTP {status} that is no JSON") from error
    if 200 <= status < 300:
        return answer
    message = f"{method} {path}: {answer.get('message', f'HTTP {status}')}"
    if status == 429 and method == "POST":
        raise errors.Blocked(message)
    if status in _TRY_AGAIN:
        raise errors.Unreachable(message)
    known = {401: errors.Forbidden, 403: errors.Forbidden, 404: errors.NotFound, 409: errors.Conflict}
    raise known.get(status, errors.Failed)(message)
