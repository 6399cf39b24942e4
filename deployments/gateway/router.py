"""The placement policy inside Serve's own request router, so that Serve's admission sees every session.

Every gateway runs one. It knows each replica's open leases (Serve's queue lengths, kept current by the calls
themselves) and what the replica says of itself about once a second (`record_routing_stats`: accepting, voices
in its cache). `FIFOMixin` hands a freed slot to whoever waits longest, whichever call found it.

Waiting is cheap: a call that found nothing sleeps, `RequestRouterConfig.max_backoff_s` at most, and full
replicas are asked whether another gateway's session left by one call each LOOK_EVERY_S, however many wait. A
slot that a session of this gateway gave back needs no question.
"""

from __future__ import annotations

import time
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from deployments.policy import Candidate, rank
from deployments.wire.messages import LeaseRequest

LOOK_EVERY_S = 0.2


class SessionRouter(FIFOMixin, RequestRouter):
    """Places sessions by `policy.rank`; `placement` comes from the settings."""

    def initialize_state(self, placement: str = "pack", **_: Any) -> None:
        self._placement = placement
        self._looked = float("-inf")  # when full replicas were last asked, in seconds of the monotonic clock

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The usable replicas one by one, best first; last, together, the full ones, which Serve then asks
        whether a slot became free. When there is none to offer the call sleeps and asks again."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve calls again at once
        request = _request(pending_request)
        replicas = {
            replica.replica_id: replica
            for replica in candidate_replicas
            if replica.replica_id.unique_id not in request.excluded
        }
        known = [self._candidate(replica) for replica in replicas.values()]
        ranked = rank(known, request.voice, self._placement)
        full = [replicas[one.key] for one in known if one.accepting and one.sessions >= one.slots]
        return [[replicas[one.key]] for one in ranked] + ([full] if full and self._may_look() else [])

    def _may_look(self) -> bool:
        now = time.monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return False
        self._looked = now
        return True

    def _candidate(self, replica: RunningReplica) -> Candidate:
        stats = replica.routing_stats
        return Candidate(
            key=replica.replica_id,
            sessions=self.replica_queue_len_cache.get(replica.replica_id) or 0,
            slots=replica.max_ongoing_requests,
            accepting=bool(stats.get("accepting", True)),
            voices=frozenset(stats.get("voices", ())),
        )


def _request(pending: PendingRequest | None) -> LeaseRequest:
    request = pending.args[0] if pending is not None and pending.args else None
    return request if isinstance(request, LeaseRequest) else LeaseRequest("", "")
