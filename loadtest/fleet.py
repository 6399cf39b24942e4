"""The simulated replicas: who has room, who holds which voices, and where the next session goes.

Placement is the service's own (`deployments.policy.rank`). Replicas with as many sessions and the same voices
differ for it in their names only, so the first of each kind stands for all: the choice is the same as over
the whole fleet, and a thousand replicas cost as little as a few.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from deployments.policy import Candidate, rank
from personaplex.config import EngineConfig

ReplicaKind = tuple[int, frozenset[str]]


@dataclass
class SimulatedReplica:
    """One GPU. `voices` are those of its cache, the last used last; `since` is when it was asked for."""

    key: str
    since: float
    sessions: int = 0
    draining: bool = False
    voices: OrderedDict[str, None] = field(default_factory=OrderedDict)
    kind: ReplicaKind | None = None  # among those with room; None when it takes no session
    begun: float = 0.0  # sum of the moments its live sessions began
    live: int = 0
    holders: dict[int, Any] = field(default_factory=dict)  # its sessions, by their numbers
    rebuilding_until: float = 0.0


class SimulatedFleet:
    """Replicas that are up. Keys are unique and sort by age."""

    def __init__(self, slots: int, placement: str) -> None:
        self._slots, self._placement = slots, placement
        self._kinds: dict[ReplicaKind, set[str]] = {}
        self.replicas: dict[str, SimulatedReplica] = {}

    def add(self, replica: SimulatedReplica) -> None:
        self.replicas[replica.key] = replica
        self._file(replica)

    def place(self, voice: str) -> tuple[SimulatedReplica, bool] | None:
        """Takes a slot for a session, and says whether its voice was cached; None when all are full."""
        candidates = [
            Candidate(min(keys), sessions, self._slots, voices=voices)
            for (sessions, voices), keys in self._kinds.items()
        ]
        ranked = rank(candidates, voice, self._placement)
        if not ranked:
            return None
        replica = self.replicas[ranked[0].key]
        cached = voice in replica.voices
        replica.voices[voice] = None
        replica.voices.move_to_end(voice)
        if len(replica.voices) > EngineConfig.voice_cache:
            replica.voices.popitem(last=False)
        replica.sessions += 1
        self._file(replica)
        return replica, cached

    def leave(self, replica: SimulatedReplica) -> None:
        """Gives a slot back; a draining replica goes with its last session."""
        replica.sessions -= 1
        self._file(replica)
        self._remove_if_done(replica)

    def remove(self, replica: SimulatedReplica) -> None:
        """It died."""
        del self.replicas[replica.key]
        self._unfile(replica)

    def drain(self, count: int) -> list[SimulatedReplica]:
        """Takes the `count` newest replicas out of service, as Serve does whatever their load."""
        newest = sorted((one for one in self.replicas.values() if not one.draining), key=lambda one: one.key)
        chosen = newest[len(newest) - count :]
        for replica in chosen:
            replica.draining = True
            self._file(replica)
            self._remove_if_done(replica)
        return chosen

    @property
    def serving(self) -> int:
        return sum(not replica.draining for replica in self.replicas.values())

    def _file(self, replica: SimulatedReplica) -> None:
        """Keeps `_kinds` in step with one replica."""
        self._unfile(replica)
        room = replica.sessions < self._slots and not replica.draining
        replica.kind = (replica.sessions, frozenset(replica.voices)) if room else None
        if replica.kind is not None:
            self._kinds.setdefault(replica.kind, set()).add(replica.key)

    def _unfile(self, replica: SimulatedReplica) -> None:
        if replica.kind is not None:
            keys = self._kinds[replica.kind]
            keys.discard(replica.key)
            if not keys:
                del self._kinds[replica.kind]
            replica.kind = None

    def _remove_if_done(self, replica: SimulatedReplica) -> None:
        if replica.draining and not replica.sessions:
            del self.replicas[replica.key]
