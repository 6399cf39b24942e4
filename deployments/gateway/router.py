"""The placement policy inside Serve's own request router, so that Serve's admission sees every session.

Every gateway runs one. It knows each replica's open leases (Serve's queue lengths, kept current by the calls
themselves) and what the replica says of itself about once a second (`record_routing_stats`: accepting, voices
in its cache). A freed slot goes to whose turn it is (turns.py), whichever call found it; where somebody at
another gateway comes first, it is left to them for a moment.

Waiting is cheap: a call that found nothing sleeps, `RequestRouterConfig.max_backoff_s` at most, and full
replicas are asked whether another gateway's session left by one call each LOOK_EVERY_S, however many wait. A
slot that a session of this gateway gave back needs no question.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from deployments.gateway import watchers
from deployments.gateway.turns import YIELD_S, QueuedRequest, Turns
from deployments.policy import Candidate, rank
from deployments.wire.messages import LeaseRequest

LOOK_EVERY_S = 0.2


class SessionRouter(FIFOMixin, RequestRouter):
    """Places sessions by `policy.rank`; `placement` comes from the settings."""

    def initialize_state(self, placement: str = "pack", **_: Any) -> None:
        self._placement = placement
        self._looked = float("-inf")  # when full replicas were last asked, in seconds of the monotonic clock
        self._free_since: dict[Any, float] = {}  # replicas whose free slot is left to another gateway

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's own; tells the watchers."""
        super().update_replicas(replicas)
        watchers.tell(frozenset(replica.replica_id.unique_id for replica in replicas))

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
        ranked = await self._mine(rank(known, request.voice, self._placement))
        full = [replicas[one.key] for one in known if one.accepting and one.sessions >= one.slots]
        return [[replicas[one.key]] for one in ranked] + ([full] if full and self._may_look() else [])

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """Puts the call whose turn it is first, for FIFOMixin to take."""
        name = replica.replica_id.unique_id
        waiting = [(call, request) for call, request in self._waiting() if name not in request.excluded]
        if waiting:
            turns = waiting[0][1].turns
            assert turns is not None
            chosen = turns.pick([request for _, request in waiting])
            turns.sent(chosen)
            self._free_since.pop(replica.replica_id, None)  # of another free slot the moment begins anew
            (first,) = (call for call, request in waiting if request is chosen)
            others = (call for call in self._pending_requests_to_fulfill if call is not first)
            self._pending_requests_to_fulfill = deque((first, *others))
        super()._fulfill_next_pending_request(replica, request_metadata)

    async def _mine(self, free: list[Candidate]) -> list[Candidate]:
        """Those of the replicas with a free slot whose slot need not be left to another gateway."""
        turns = self._turns() if free else None
        if turns is not None:
            await turns.refresh()
        waiting = [request for _, request in self._waiting()]
        if turns is None or not turns.yields(waiting):
            self._free_since.clear()
            return free
        now = time.monotonic()
        self._free_since = {one.key: self._free_since.get(one.key, now) for one in free}
        return [one for one in free if now - self._free_since[one.key] >= YIELD_S]

    def _turns(self) -> Turns | None:
        """This gateway's, known from any call that waits."""
        return next((request.turns for _, request in self._waiting()), None)

    def _waiting(self) -> list[tuple[PendingRequest, QueuedRequest]]:
        """The calls that wait, and what is known of them."""
        return [
            (call, call.args[0])
            for call in self._pending_requests_to_fulfill
            if not call.future.done() and call.args and isinstance(call.args[0], QueuedRequest)
        ]

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
