"""Is the service well? Ready, then one real conversation over WebSocket."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from k8s import conversation, errors, inplace
from k8s.cluster import Cluster
from k8s.rollout import read

CHUNK = 65_536


def smoke(
    cluster: Cluster, name: str, report: Callable[[str], None], url: str | None = None, key: str | None = None
) -> None:
    """Talks to the RayService `name`, through `url` or through a tunnel to one of its serving pods.

    Raises Failed when it is not ready or does not answer, NotFound, Unreachable.
    """
    service = cluster.service(name)
    state = read(service)
    if not state.ready:
        raise errors.Failed(f"{name}: {state.describe()}")
    report(f"{name}: {state.describe()}")
    if url is not None:
        report(_converse(url, key))
        return
    pod, port = serving_pod(cluster, service, state.active)
    with tunnel(cluster, pod, port) as local:
        report(f"talking to {pod}")
        report(_converse(f"ws://127.0.0.1:{local}{prefix(service)}/api/chat", key))


def prefix(service: Any) -> str:
    """The path in front of the service's own ones, without a slash at its end."""
    return str(inplace.application(service).get("route_prefix") or "/").rstrip("/")


def serving_pod(cluster: Cluster, service: Any, ray_cluster: str) -> tuple[str, int]:
    """A ready pod behind the service, and its port. Raises Failed when there is none."""
    (port,) = (
        item["port"] for item in service["spec"]["serveService"]["spec"]["ports"] if item["name"] == "serve"
    )
    for pod in cluster.pods(f"ray.io/cluster={ray_cluster},ray.io/serve=true"):
        conditions = {item["type"]: item["status"] for item in pod.get("status", {}).get("conditions", [])}
        if conditions.get("Ready") == "True":
            return pod["metadata"]["name"], port
    raise errors.Failed(f"no ready pod of {ray_cluster} serves")


@contextlib.contextmanager
def tunnel(cluster: Cluster, pod: str, port: int) -> Iterator[int]:
    """A port on this machine that leads to a pod, for as long as the block lasts. Raises Unreachable."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threads: list[threading.Thread] = []

        def accept() -> None:
            while True:
                try:
                    near, _ = server.accept()
                except OSError:  # closed: the block is over
                    return
                thread = threading.Thread(target=_relay, args=(cluster, pod, port, near))
                threads.append(thread)
                thread.start()

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept()
            acceptor.join()
            for thread in threads:
                thread.join()


def _relay(cluster: Cluster, pod: str, port: int, near: socket.socket) -> None:
    """Copies bytes both ways until one side closes."""
    with near:
        try:
            far = cluster.tunnel(pod, port)
        except errors.Unreachable:
            return  # the client sees its connection close, and says so
        try:
            while True:
                for source in select.select([near, far], [], [])[0]:
                    data = source.recv(CHUNK)
                    if not data:
                        return
                    (far if source is near else near).sendall(data)
        except OSError:
            return
        finally:
            far.close()


def _converse(url: str, key: str | None) -> str:
    try:
        return conversation.converse(url, key).strip()
    except RuntimeError as error:
        raise errors.Failed(f"no conversation over {url}: {error}") from error
