"""An operator's word to a service in a cluster: one session is brought to another replica.

Goes to `/api/admin` of the gateway in any serving pod, through a tunnel, with a key of `admin_keys_file`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from k8s import errors, inplace, smoke
from k8s.cluster import Cluster
from k8s.rollout import read
from personaplex import sessions
from personaplex.client_access import read_key
from personaplex.errors import PersonaplexError


def move(cluster: Cluster, name: str, session: str, key_file: Path, report: Callable[[str], None]) -> None:
    """Moves a session of the RayService `name`. Raises Failed where it stays or is not there, NotFound,
    Unreachable."""
    service = cluster.service(name)
    pod, port = smoke.serving_pod(cluster, service, read(service).active)
    prefix = str(inplace.application(service).get("route_prefix") or "/").rstrip("/")
    try:
        key = read_key(key_file)
        with smoke.tunnel(cluster, pod, port) as local:
            url = f"http://127.0.0.1:{local}{prefix}"
            answer = sessions.ask(url, key, "moves", {"session": session})
    except PersonaplexError as error:
        raise errors.Failed(f"{session}: {error}") from error
    report(sessions.outcomes(answer))
    if any(one["outcome"] != sessions.MOVED for one in answer["sessions"]) or answer["gateways_silent"]:
        raise errors.Failed(f"{session} was not moved")
