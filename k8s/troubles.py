"""Why do pods of a cluster not run? From their status alone, which the chart's Role may read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_NORMAL = frozenset({"PodInitializing", "ContainerCreating"})


def troubles(pods: list[Any]) -> list[str]:
    """One line for each reason, with the first pod that has it: `POD cannot be scheduled: 0/3 nodes ...`."""
    found: dict[str, str] = {}
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"])):
        for reason in _reasons(pod):
            found.setdefault(reason, f"{pod['metadata']['name']} {reason}")
    return list(found.values())


def _reasons(pod: Any) -> Iterator[str]:
    status = pod.get("status", {})
    if "deletionTimestamp" in pod["metadata"]:
        return
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            yield f"cannot be scheduled: {condition.get('message') or condition.get('reason', '')}"
    for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
        state, last = container.get("state", {}), container.get("lastState", {})
        waiting = state.get("waiting", {})
        ended = state.get("terminated") or last.get("terminated") or {}
        failed = ended.get("exitCode", 0) != 0 and "running" not in state
        if failed:
            text = ended.get("message", "").strip() or ended.get("reason", "no message")
            yield f"container {container['name']} failed with {ended['exitCode']}: {text}"
        elif waiting and waiting.get("reason") not in _NORMAL:
            text = f"{waiting.get('reason', '')} {waiting.get('message', '')}".strip()
            yield f"container {container['name']} waits: {text}"
