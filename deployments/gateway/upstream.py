"""A session's connection to the replica that holds its slot: the lease, the link, and the messages on it.

`open` gets lease and link once; `send_frame` sends the user's frames. What the replica says becomes events,
given to `emit`, and frames, given to `on_frame`. The session's TokenLog is kept as the replies come.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from deployments import metrics
from deployments.gateway.leases import Claim, Lease, Leases
from deployments.gateway.recorder import Recording
from deployments.gateway.stats import SessionStats
from deployments.gateway.tracing import Trace
from deployments.metrics import Metrics
from deployments.wire import messages
from deployments.wire.link import Link, OnLost, OnMessage
from deployments.wire.messages import Grant, LeaseRequest, MessageKind
from personaplex.config import FRAME_SECONDS, Pcm, frames_in
from personaplex.errors import ProtocolError
from personaplex.persona import Persona
from personaplex.record.format import Row
from personaplex.session.core import Limits
from personaplex.session.events import (
    AgentText,
    EngineLost,
    Event,
    Failed,
    LeaseGranted,
    Queued,
    Ready,
)
from personaplex.tokenlog import TokenLog

STALE_S = 2 * FRAME_SECONDS  # a frame that waited longer for its slot is late through no fault of its sender


Connect = Callable[[Grant, OnMessage, OnLost], Awaitable[Link]]


@dataclass(frozen=True)
class Services:
    """What a gateway lends to each of its conversations."""

    leases: Leases
    metrics: Metrics
    limits: Limits
    connect: Connect
    connect_timeout_s: float  # for `connect`: as long as a replica holds a lease nobody claims
    keep: Callable[[str, TokenLog], Awaitable[None]]  # called at the end with the session's name and tokens
    changed: Callable[[], None]  # called when a session went live or joined or left the queue
    trace: Trace | None = None
    live: set[str] = field(default_factory=set)  # names of the sessions past their handshake
    ending: set[asyncio.Future[None]] = field(default_factory=set)  # sessions that are being wound up


class Upstream:
    """Made with its session. `stop` ends the media, `close` the link, `release` gives the slot back."""

    def __init__(
        self,
        session: str,
        services: Services,
        stats: SessionStats,
        emit: Callable[[Event], None],
        on_frame: Callable[[int, Pcm, bool], None],
        recording: Recording | None = None,
    ) -> None:
        """`on_frame(number, pcm, stale)` takes the agent's frames; `stale` ones answer frames that waited for
        the slot."""
        self.log = TokenLog()
        self._session, self._services, self._stats, self._emit = session, services, stats, emit
        self._on_frame = on_frame
        self._metrics = services.metrics
        self._recording = recording
        self._link: Link | None = None
        self._lease: Lease | None = None
        self._details: dict[str, Any] = {}
        self._stopped = False
        # Arrivals and frames, for a slot that is not ready.
        self._early: deque[tuple[float, Pcm]] = deque(maxlen=frames_in(services.limits.burst_s))
        self._ready = False
        self._stale = 0  # of the first replies: to frames that waited for the slot

    async def open(self, persona: Persona, claim: Claim) -> None:
        """Returns once the persona was sent to the replica; Ready follows. Raises NoCapacity, OSError."""
        self._metrics.observe(metrics.PROMPT_CHARACTERS, len(persona.text_prompt))
        try:
            grant, link = await self._join(claim)
        except OSError:  # the replica has just ended or is out of reach; another one may do better
            claim = await self._services.leases.claim(LeaseRequest.of(self._session, persona))
            grant, link = await self._join(claim)
        self._stats.note(replica=grant.replica, prompt_characters=len(persona.text_prompt))
        self._metrics.add(metrics.SESSIONS_ADMITTED)
        self._emit(LeaseGranted())
        link.send(MessageKind.OPEN, messages.pack_open(grant.token, persona))
        self._details = {
            "session": self._session,
            "voice": persona.voice,
            "text_seed": persona.sampling.text_seed,
            "audio_seed": persona.sampling.audio_seed,
        }
        if self._recording is not None:
            self._details["recorded"] = True

    def record(self, recording: Recording) -> None:
        """What happens goes to `recording` too, from now on; before `open`."""
        self._recording = recording

    def send_frame(self, frame: Pcm) -> None:
        """Sends one frame of the user; while the slot is not ready the newest burst is kept for it."""
        if not self._ready:
            self._metrics.add(metrics.FRAMES_DROPPED, len(self._early) == self._early.maxlen, place="early")
            self._early.append((time.monotonic(), frame))
            return
        assert self._link is not None
        dropped = self._link.dropped
        self._link.send_frame(MessageKind.FRAME, messages.pack_frame(_micros() % 2**32, frame))
        self._metrics.add(metrics.FRAMES_DROPPED, self._link.dropped - dropped, place="link_in")

    def stop(self) -> None:
        """Stops both directions; later messages are ignored."""
        self._stopped = True

    def close(self) -> None:
        """Closes the link, if there is one. Idempotent."""
        if self._link is not None:
            self._link.close()

    async def release(self, timeout_s: float) -> None:
        """Gives the slot back, once the replica says that it is free or did not for `timeout_s`."""
        if self._lease is not None:
            if self._link is not None:
                self._link.close()  # it may have been connecting until just now
                await self._lease.wait_freed(timeout_s)
            self._lease.release()

    # The way to a slot

    async def _join(self, claim: Claim) -> tuple[Grant, Link]:
        """A lease and the link to its replica. Raises NoCapacity, OSError once the lease is given back."""
        self._lease = lease = await claim.lease(self._queue)
        self._services.changed()
        self._stats.phase("queue" if self._stats.queued else "lease", time.monotonic() - claim.began)
        began = time.monotonic()
        try:
            link = await self._connect(lease.grant)
        except OSError:
            lease.release()
            self._lease = None
            self.close()  # it may have been there just too late; what it says next is of no account
            self._link = None
            raise
        self._stats.phase("connect", time.monotonic() - began)
        return lease.grant, link

    async def _connect(self, grant: Grant) -> Link:
        """The link, once it is there. Raises OSError, TimeoutError among them."""
        # asyncio.wait_for may swallow the cancellation of a session that ends just when the link is there.
        connecting = asyncio.ensure_future(self._keep_link(grant))
        try:
            if not (await asyncio.wait({connecting}, timeout=self._services.connect_timeout_s))[0]:
                raise TimeoutError("the replica did not answer in time")
            return connecting.result()
        finally:
            connecting.cancel()
            await asyncio.wait({connecting})

    async def _keep_link(self, grant: Grant) -> Link:
        self._link = await self._services.connect(grant, self._on_message, self._on_lost)
        return self._link

    def _queue(self, place: int) -> None:
        self._stats.queued = True
        self._services.changed()
        self._emit(Queued(place))

    # What the replica says

    def _on_message(self, link: Link, kind: MessageKind, payload: bytes) -> None:
        if self._stopped:
            return
        match kind:
            case MessageKind.REPLY:
                self._receive_reply(messages.unpack_reply(payload))
            case MessageKind.READY:
                self._stats.phase("prefill", messages.unpack_ready(payload))
                self._emit(Ready(self._details))
                self._send_early()
            case MessageKind.CLOSE:
                self._emit(Failed(messages.unpack_error(payload)))
            case _:
                raise ProtocolError("a message that does not belong here")

    def _on_lost(self, link: Link) -> None:
        # One that was given up while it was connecting is of no account.
        if link is self._link and not self._stopped:
            self._emit(EngineLost())

    def _receive_reply(self, reply: messages.Reply) -> None:
        self.log.append(reply.tokens, forced=reply.frame == 0)
        latency_s = ((_micros() - reply.timestamp) % 2**32) / 1e6
        self._record(reply, latency_s)
        self._on_frame(reply.frame, reply.pcm, reply.frame < self._stale)
        if reply.frame % metrics.SAMPLED == 0:
            self._metrics.observe(metrics.FRAME_SECONDS, latency_s)
        if reply.text:
            self._emit(AgentText(reply.text))

    def _record(self, reply: messages.Reply, latency_s: float) -> None:
        if self._recording is not None:
            row = Row(reply.frame, time.monotonic(), latency_s, reply.tokens, forced=reply.frame == 0)
            self._recording.frame(row, reply.text)

    def _send_early(self) -> None:
        now = time.monotonic()
        self._ready = True
        self._stale = sum(now - arrived > STALE_S for arrived, _ in self._early)
        while self._early:
            self.send_frame(self._early.popleft()[1])


def _micros() -> int:
    return time.monotonic_ns() // 1_000
