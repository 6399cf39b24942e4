"""How a change of the Serve config alone is carried out, and how long it may take.

Serve replaces a share of a deployment's replicas at a time. With `max_surge_percent` a replacement starts
first, which never ends without room for one more. Without it each is told to stop first, and its replacement
starts beside it where there is room, else in its place. Either way a replica that stops moves its sessions to
free slots at others and waits for those that find none; a gateway holds its clients' sockets and waits for
their sessions' own end. With the setting `drain_limit_s` neither waits for longer than that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from k8s import errors

BATCH = 0.2  # Serve's rolling_update_percentage
QUEUE_TIMEOUT_S, CLOSE_MARGIN_S = 60.0, 5.0  # the service's, see `Settings.drain_timeout_s`
_MOST = {"gateway": "gateways_max", "replica": "replicas_max"}  # deployment -> setting


@dataclass(frozen=True)
class Way:
    """One deployment: the most replicas it has, its surge in percent, the seconds one may take to stop, and
    whether it is `drain_limit_s` that says so."""

    deployment: str
    most: int
    surge: int
    stop_s: float
    limited: bool = False

    @property
    def at_once(self) -> int:
        """Replicas that stop at a time, when there are the most."""
        return max(int(BATCH * self.most), 1)

    @property
    def longest_s(self) -> float:
        """Until the last replica has stopped, when every one waits for the longest session."""
        return math.ceil(self.most / self.at_once) * self.stop_s

    def describe(self) -> str:
        return f"{self.deployment}: {self._order()}; {self._sessions()}"

    def _order(self) -> str:
        if self.surge:
            more = math.ceil(self.surge * self.most / 100)
            return (
                f"up to {more} more start before as many stop, and without room for them the old ones go on "
                "serving and the change waits"
            )
        return f"up to {self.at_once} of {self.most} at a time stop, then their replacements start"

    def _sessions(self) -> str:
        wait = f"up to {self.stop_s:.0f} s each, {self.longest_s / 3_600:.1f} h in all"
        end = "drain_limit_s" if self.limited else "their own end"
        if self.deployment == "gateway":
            others = "are lost then" if self.limited else f"stay to {end}"
            asked = "clients that can come back are asked over to the new ones"
            return f"{asked}, the others' sessions {others}, {wait}"
        if self.most == 1 and not self.surge:
            return (
                "its sessions move to its replacement where that has room to start beside it, else it waits "
                f"for {end}, {wait}, and nobody new is served meanwhile"
            )
        if self.surge:
            return (
                "their sessions move to free slots at others; those that find none wait for one or for "
                f"{end}, {wait}"
            )
        whose = "one replica" if self.at_once == 1 else f"{self.at_once} replicas"
        return (
            f"their sessions move to free slots at the others, which need room for those of {whose}; those "
            f"that find none wait for one or for {end}, {wait}"
        )


def ways(service: Any) -> list[Way]:
    """How each deployment of a RayService would change. Raises Failed for a Serve config unlike ours."""
    return list(_ways(service["spec"]))


def longest_s(service: Any) -> float:
    """The longest an in-place change may take; 0 for a Serve config unlike ours."""
    try:
        return max((way.longest_s for way in ways(service)), default=0.0)
    except errors.Failed:
        return 0.0


def application(service: Any) -> Any:
    """The one application in a RayService's Serve config. Raises Failed."""
    try:
        config = yaml.safe_load(service["spec"]["serveConfigV2"])
        (found,) = config["applications"]
        return found if isinstance(found, dict) else {}
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise errors.Failed("serveConfigV2 holds no single application") from error


def _ways(spec: Any) -> Iterator[Way]:
    found = application({"spec": spec})
    settings, overrides = found.get("args") or {}, found.get("deployments") or []
    surges = {item.get("name"): item.get("max_surge_percent", 0) for item in overrides}
    pods = [
        group["template"]["spec"] for group in spec.get("rayClusterConfig", {}).get("workerGroupSpecs", [])
    ]
    stop_s = max((pod.get("terminationGracePeriodSeconds", 30) for pod in pods), default=30)
    for deployment, setting in _MOST.items():
        limit_s = _limit_s(deployment, settings)
        yield Way(
            deployment,
            int(settings.get(setting, 1)),
            int(surges.get(deployment) or 0),
            min(float(stop_s), limit_s),
            limited=limit_s < stop_s,
        )


def _limit_s(deployment: str, settings: Any) -> float:
    """What `drain_limit_s` makes of the time one may take to stop (`Settings.drain_timeout_s`)."""
    limit_s = settings.get("drain_limit_s")
    if limit_s is None:
        return math.inf
    gateways_s = float(settings.get("queue_timeout_s", QUEUE_TIMEOUT_S)) + CLOSE_MARGIN_S
    return float(limit_s) + (gateways_s if deployment == "gateway" else 0.0)
