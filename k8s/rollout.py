"""Waits until an upgrade has really happened, then releases the old cluster as soon as nobody talks on it.

KubeRay keeps an old cluster for `rayClusterDeletionDelaySeconds` after the switch, because sessions live on
it. That is the longest session plus a margin, on a second set of GPUs; most sessions end long before. This
tool only ever shortens that time. Its laws:

- A release needs several successive readings of zero sessions. A failed reading is not zero and starts the
  count anew.
- A cluster that the RayService names as active or pending is never touched; the names are read again right
  before the delete, and an older answer than one already seen is not believed.
- The delete names the UID of the cluster that was watched.
- What cannot be known is left to KubeRay's own delay, and said.

A change that KubeRay has not carried out is no success, however well the old cluster serves; a state that no
waiting ends is an error at once; and what keeps pods from running is said while it does.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from k8s import errors, inplace, sessions
from k8s.cluster import RAY, Cluster
from k8s.differences import differences
from k8s.troubles import troubles

PATIENCE_S = 3_600.0  # for a new cluster; an in-place change gets the time it may take on top
SETTLED_READINGS = 3  # an in-place update is believed after this many equal readings


@dataclass(frozen=True)
class ServiceState:
    """What matters of a RayService, as one reading shows it."""

    uid: str
    generation: int
    observed: int
    active: str
    pending: str
    ready: bool
    upgrading: bool
    unhealthy: tuple[str, ...]  # applications that do not run, with their message
    given_up: bool = False  # KubeRay's initializing timeout has passed, which nothing but a new object ends

    @property
    def settled(self) -> bool:
        """Whether KubeRay has seen the last change and serves it, all of it, from one cluster."""
        return (
            self.observed >= self.generation
            and bool(self.active)
            and not self.pending
            and self.ready
            and not self.upgrading
            and not self.unhealthy
        )

    def describe(self) -> str:
        if self.observed < self.generation:
            return "KubeRay has not seen the last change yet"
        if self.pending:
            return f"a new cluster is being made: {self.pending}, next to {self.active or 'none'}"
        if not self.active:
            return "no cluster serves yet"
        if self.unhealthy:
            return f"{self.active}: {'; '.join(self.unhealthy)}"
        if self.upgrading:
            return f"traffic is moving to {self.active}"
        return f"{self.active} serves" if self.ready else f"{self.active} is not ready"


def read(service: Any) -> ServiceState:
    """The state in a RayService object."""
    status = service.get("status", {})
    active, pending = status.get("activeServiceStatus", {}), status.get("pendingServiceStatus", {})
    conditions = {item["type"]: item["status"] == "True" for item in status.get("conditions", [])}
    reasons = {item.get("reason") for item in status.get("conditions", []) if item["type"] == "Ready"}
    unhealthy = tuple(
        f"{name} is {application.get('status', 'unknown')} {application.get('message', '')}".rstrip()
        for name, application in sorted(active.get("applicationStatuses", {}).items())
        if application.get("status") != "RUNNING"
    )
    return ServiceState(
        uid=service["metadata"]["uid"],
        generation=service["metadata"].get("generation", 0),
        observed=status.get("observedGeneration", -1),
        active=active.get("rayClusterName", ""),
        pending=pending.get("rayClusterName", ""),
        ready=conditions.get("Ready", False),
        upgrading=conditions.get("UpgradeInProgress", False),
        unhealthy=unhealthy,
        given_up="InitializingTimeout" in reasons,
    )


@dataclass
class Rollout:
    """One run of the tool. `sleep` and `now` are injected; `report` gets each line of progress once.

    Without `timeout_s` it waits as long as the change may rightly take.
    """

    cluster: Cluster
    name: str
    report: Callable[[str], None]
    timeout_s: float | None = None
    interval_s: float = 5.0
    zeros: int = 4  # times interval_s: more than the ten seconds after which Ray exports a change
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic
    _newest: ServiceState | None = field(default=None, init=False)
    _service: Any = field(default=None, init=False)  # the object that _newest was read from
    _said: str = field(default="", init=False)
    _told: set[str] = field(default_factory=set, init=False)

    def run(self, release: bool = True) -> None:
        """On return the upgrade is complete.

        Raises Failed when it never will be, TimedOut, NotFound, Forbidden or Unreachable.
        """
        if self.timeout_s is None:
            self.state()
            self.timeout_s = PATIENCE_S + inplace.longest_s(self._service)
        end = self.now() + self.timeout_s
        self._wait_until_settled(end)
        self._check_replaced()
        if release:
            self._release_all(end)

    def state(self) -> ServiceState:
        """A reading at least as new as every one before it; an answer from a stale cache is asked again.

        Raises Unreachable when only stale answers come, Failed when the service was replaced.
        """
        for _ in range(10):
            service = self.cluster.service(self.name)
            found = read(service)
            newest = self._newest or found
            if found.uid != newest.uid:
                raise errors.Failed(f"{self.name} was deleted and made anew meanwhile")
            if (found.generation, found.observed) >= (newest.generation, newest.observed):
                self._newest, self._service = found, service
                return found
            self.sleep(1.0)
        raise errors.Unreachable("the API server keeps answering from a stale cache")

    def _wait_until_settled(self, end: float) -> None:
        last, readings = None, 0
        while readings < SETTLED_READINGS:
            state = self.state()
            readings = readings + 1 if state.settled and state == last else int(state.settled)
            last = state
            self._say(state.describe())
            if state.given_up:
                again = f"kubectl -n {self.cluster.namespace} delete rayservice {self.name}"
                raise errors.Failed(
                    f"{self.name}: KubeRay gave up for good when its initializing timeout passed; no change "
                    f"is looked at any more. Mend the cause, then: {again}, and helm upgrade (or apply)"
                )
            if not state.settled:
                self._explain(state)
            if readings < SETTLED_READINGS:
                if self.now() >= end:
                    raise errors.TimedOut(f"{self.name}: {state.describe()} after {self.timeout_s:.0f} s")
                self.sleep(self.interval_s)

    def _explain(self, state: ServiceState) -> None:
        """Says, each thing once, which way the change goes and what keeps its pods from running."""
        if state.active and not state.pending and state.unhealthy and state.observed >= state.generation:
            with contextlib.suppress(errors.Failed):  # a Serve config unlike ours: nothing is known of it
                self._tell(*(f"in place, {way.describe()}" for way in inplace.ways(self._service)))
        ray_cluster = state.pending or state.active
        if ray_cluster:
            try:
                self._tell(*troubles(self.cluster.pods(f"ray.io/cluster={ray_cluster}")))
            except (errors.Unreachable, errors.Forbidden) as error:
                self._tell(f"{ray_cluster}: its pods cannot be read: {error}")

    def _check_replaced(self) -> None:
        """Raises Failed when the cluster that serves is not what the RayService asks for.

        Looks more than once: KubeRay adds a new worker group to the running cluster, a little later.
        """
        for attempt in range(SETTLED_READINGS):
            if attempt:
                self.sleep(self.interval_s)
            active = self.state().active
            running = self.cluster.get(self.cluster.path("rayclusters", active, root=RAY))
            found = differences(self._service["spec"].get("rayClusterConfig", {}), running.get("spec", {}))
            if not found:
                return
        strategy = self._service["spec"].get("upgradeStrategy", {}).get("type", "not set")
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise errors.Failed(
            f"nothing was replaced: {active} differs from what {self.name} asks for at "
            f"{', '.join(found[:3])}{more} (upgradeStrategy.type is {strategy})"
        )

    def _release_all(self, end: float) -> None:
        zeros: dict[str, int] = {}
        while True:
            state = self.state()
            old = self._old_clusters(state)
            if not old:
                self._say("no old cluster is left")
                return
            if self.now() >= end:
                names = ", ".join(item["metadata"]["name"] for item in old)
                raise errors.TimedOut(f"old clusters are still there: {names}; KubeRay's own delay ends them")
            for item in old:
                self._watch(item, zeros)
            self.sleep(self.interval_s)

    def _old_clusters(self, state: ServiceState) -> list[Any]:
        """RayClusters that belong to this RayService, serve no more and are not on their way out."""
        return [
            item
            for item in self.cluster.clusters()
            if any(owner["uid"] == state.uid for owner in item["metadata"].get("ownerReferences", []))
            and item["metadata"]["name"] not in (state.active, state.pending)
            and "deletionTimestamp" not in item["metadata"]
        ]

    def _watch(self, item: Any, zeros: dict[str, int]) -> None:
        """One reading of one old cluster; deletes it after `zeros` readings of nothing."""
        name, uid = item["metadata"]["name"], item["metadata"]["uid"]
        try:
            found = sessions.loads(self.cluster, name)
        except errors.Unreachable as error:
            found = []
            self._say(f"{name}: cannot be read: {error}")
        count = sessions.total(found)
        zeros[uid] = zeros.get(uid, 0) + 1 if count == 0 else 0
        if count is None:
            problems = ", ".join(f"{load.pod}: {load.problem}" for load in found if load.sessions is None)
            self._say(f"{name}: sessions unknown ({problems or 'no pod answers'}); it stays")
        elif count:
            self._say(f"{name}: {count} sessions left")
        elif zeros[uid] >= self.zeros:
            self._release(name, uid)

    def _release(self, name: str, uid: str) -> None:
        state = self.state()
        if not state.settled or name in (state.active, state.pending):
            self._say(f"{name}: another change is under way; it stays")
            return
        try:
            gone = self.cluster.delete(self.cluster.path("rayclusters", name, root=RAY), uid)
        except (errors.Conflict, errors.Unreachable) as error:
            self._say(f"{name}: not deleted ({error}); looking again")
            return
        self._say(f"{name}: released" if gone else f"{name}: gone already")

    def _tell(self, *lines: str) -> None:
        for line in lines:
            if line not in self._told:
                self._told.add(line)
                self.report(line)

    def _say(self, line: str) -> None:
        if line != self._said:
            self._said = line
            self.report(line)
