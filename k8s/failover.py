"""Does a conversation outlive the loss of its replica? Shown on the installed service, on request only.

One conversation is held; the replica's pod that shows it is killed (an eviction without grace, which a
disruption budget may still forbid); the conversation must be answered to its end. Laws:

- Refused while any session is live or cannot be counted, and with fewer than two replicas.
- The pod is killed only while ours is the one session that its metrics show.
- Metrics are seconds old. A session that begins in that time would fail over with ours; nothing here can
  exclude that, so run it before the service is opened.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from k8s import conversation, errors, sessions, smoke
from k8s.cluster import Cluster
from k8s.rollout import read
from k8s.sessions import PodLoad

SPEAK_S = 60.0  # Ray exports a gauge every 10 s; the rest is for the kill and for what follows it
SEEN_WITHIN_S = 30.0
LEAST = 0.9  # share of the conversation that is answered: a gap of some seconds is what a failover may cost
INTERVAL_S = 1.0

Talk = Callable[[str, str | None], str]


def _talk(url: str, key: str | None) -> str:
    return conversation.converse(url, key, seconds=SPEAK_S, least=LEAST)


class _Conversation(threading.Thread):
    """One conversation beside us; `error` says why it failed."""

    def __init__(self, talk: Talk, url: str, key: str | None) -> None:
        super().__init__(name="conversation", daemon=True)
        self._talk, self._url, self._key = talk, url, key
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._talk(self._url, self._key)
        except (RuntimeError, OSError, ValueError) as error:
            self.error = error


@dataclass
class Proof:
    """One run; talking, sleeping and the clock are injected."""

    cluster: Cluster
    service: Any
    talk: Talk = _talk
    sleep: Callable[[float], None] = time.sleep
    now: Callable[[], float] = time.monotonic
    ray_cluster: str = field(init=False)

    def __post_init__(self) -> None:
        self.ray_cluster = read(self.service).active

    def run(self, key: str | None = None) -> str:
        """What was seen, in a line. Raises Failed when it was refused or not shown, Blocked, Unreachable."""
        self._check_idle()
        socket_pod, port = smoke.serving_pod(self.cluster, self.service, self.ray_cluster)
        with smoke.tunnel(self.cluster, socket_pod, port) as local:
            url = f"ws://127.0.0.1:{local}{smoke.prefix(self.service)}/api/chat"
            ours = _Conversation(self.talk, url, key)
            ours.start()
            try:
                victim = self._find(ours)
                if victim.pod == socket_pod:
                    raise errors.Failed(
                        f"refused: {socket_pod} holds the socket as well as the session "
                        "(serve.dedicatedNodes is off)"
                    )
                if not ours.is_alive():
                    raise errors.Failed("the conversation ended before its replica: nothing was shown")
                self.cluster.evict(victim.pod, victim.uid, grace_s=0)
            finally:
                ours.join()
        if ours.error is not None:
            raise errors.Failed(f"the conversation did not outlive {victim.pod}: {ours.error}")
        self._check_gone(victim)
        return f"a conversation outlived its replica's pod {victim.pod}"

    def _loads(self) -> tuple[list[PodLoad], int]:
        found = sessions.loads(self.cluster, self.ray_cluster)
        total = sessions.total(found)
        if total is None:
            unknown = ", ".join(load.pod for load in found if load.sessions is None) or "no pod answers"
            raise errors.Failed(f"refused: the sessions of {self.ray_cluster} cannot be counted ({unknown})")
        return found, total

    def _check_idle(self) -> None:
        found, total = self._loads()
        if total:
            raise errors.Failed(f"refused: {total} sessions are live")
        replicas = [load for load in found if load.role == "replica" and load.slots]
        if len(replicas) < 2:
            raise errors.Failed(
                f"refused: {len(replicas)} replica's pod has slots, so the session would have nowhere to go"
            )

    def _find(self, ours: _Conversation) -> PodLoad:
        """The replica's pod that holds our session and nothing else."""
        end = self.now() + SEEN_WITHIN_S
        while ours.is_alive() and self.now() < end:
            found, total = self._loads()
            if total > 1:
                raise errors.Failed(f"refused: {total - 1} sessions beside ours are live now")
            holders = [load for load in found if load.role == "replica" and load.sessions == 1]
            if total == 1 and len(holders) == 1:
                return holders[0]
            self.sleep(INTERVAL_S)
        raise errors.Failed(
            "the conversation was seen at no replica" if ours.error is None else str(ours.error)
        )

    def _check_gone(self, victim: PodLoad) -> None:
        try:
            pod = self.cluster.get(self.cluster.path("pods", victim.pod))
        except errors.NotFound:
            return
        if pod["metadata"]["uid"] == victim.uid and "deletionTimestamp" not in pod["metadata"]:
            raise errors.Failed(f"{victim.pod} is still there: nothing was shown")
