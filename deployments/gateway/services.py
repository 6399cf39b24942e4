"""What a gateway lends to each of its conversations."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from deployments.gateway.failover import Failovers
from deployments.gateway.leases import Leases
from deployments.gateway.moves import Moves
from deployments.gateway.resumes import Resumes
from deployments.gateway.slot import Connect
from deployments.gateway.tracing import Trace
from deployments.gateway.transcripts import Transcripts
from deployments.metrics import Metrics
from personaplex.session.core import Limits
from personaplex.tokenlog import TokenLog


@dataclass(frozen=True)
class Services:
    """One gateway's."""

    leases: Leases
    metrics: Metrics
    limits: Limits
    connect: Connect
    connect_timeout_s: float  # for `connect`: as long as a replica holds a lease nobody claims
    keep: Callable[[str, TokenLog], Awaitable[None]]  # called at the end with the session's name and tokens
    changed: Callable[[], None]  # called when a session went live or joined or left the queue
    trace: Trace | None = None
    transcripts: Transcripts | None = None  # of what users say; None with transcription=off
    failovers: Failovers = field(default_factory=Failovers)
    resumes: Resumes | None = None  # None where no client can come back
    moves: Moves = field(default_factory=Moves)
    wait: Callable[[str], float | None] = lambda session: None  # what one in the queue may be told
    began: Callable[[str], None] = lambda session: None  # called with a session that can talk
    live: set[object] = field(default_factory=set)  # conversations past their handshake
    ending: set[asyncio.Future[None]] = field(default_factory=set)  # sessions and slots that are wound up
