"""A session's line to the replica that holds its slot: the lease, the link, and the media on it.

`open` gets them once. `hear` takes the client's Ogg stream, from its first byte, and sends it on as frames;
of those that come before the slot is ready the newest burst waits for it. What the replica says becomes
events, given to `tell` on the event loop. Nothing here blocks it for longer than one message's Opus work. The
session's TokenLog is kept as the replies come.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deployments import metrics
from deployments.gateway.leases import Claim, Lease, Leases
from deployments.gateway.recorder import Recording
from deployments.gateway.stats import Account
from deployments.gateway.tracing import Trace
from deployments.metrics import Metrics
from deployments.wire import messages
from deployments.wire.link import Link, OnLost, OnMessage
from deployments.wire.messages import Grant, Kind, LeaseRequest
from personaplex.audio.transcoder import NOT_OGG_AFTER_S, Transcoder
from personaplex.config import FRAME_SECONDS, Pcm, frames_in
from personaplex.errors import PersonaplexError, ProtocolError
from personaplex.persona import Persona
from personaplex.record.format import Row
from personaplex.session.core import Limits
from personaplex.session.events import (
    AgentAudio,
    AgentText,
    AudioHeard,
    EngineLost,
    Event,
    Failed,
    LeaseGranted,
    Queued,
    Ready,
)
from personaplex.tokenlog import TokenLog

FEED_BYTES = 1_024  # of Ogg decoded at a time; a page of packets without content lasts 30 s in half of that
UNHEARD_LIMIT = 524_288  # bytes of Ogg that may wait to be decoded: more than 8 s at 510 kb/s
STALE_S = 2 * FRAME_SECONDS  # a frame that waited longer for its slot is late through no fault of its sender
QUIET = 1e-6  # mean square of speech nobody misses: -60 dBFS
HEARD_EVERY_S = 0.5  # AudioHeard is told while audio comes
SAMPLED = 4  # every so many frames are measured: over Ray an observation costs as much as the frame's Ogg


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


class Line:
    """Made with its session. `stop` ends the media, `close` the link, `release` gives the slot back."""

    def __init__(
        self,
        session: str,
        services: Services,
        account: Account,
        tell: Callable[[Event], None],
        recording: Recording | None = None,
    ) -> None:
        self.transcoder = Transcoder(clock=time.monotonic, burst_s=services.limits.burst_s)
        self.log = TokenLog()
        self._session, self._services, self._account, self._tell = session, services, account, tell
        self._metrics = services.metrics
        self._recording = recording
        self._loop = asyncio.get_running_loop()
        self._link: Link | None = None
        self._lease: Lease | None = None
        self._details: dict[str, Any] = {}
        self._stopped = False
        self._unheard: deque[bytes] = deque()  # of the client's stream, to be decoded
        self._unheard_bytes = 0
        # Arrivals and frames, for a slot that is not ready.
        self._early: deque[tuple[float, Pcm]] = deque(maxlen=frames_in(services.limits.burst_s))
        self._ready = False
        self._stale = 0  # of the first replies: to frames that waited for the slot
        self._watch: asyncio.TimerHandle | None = None
        self._decode_seconds = 0.0  # since the last reply
        self._told_heard = float("-inf")  # when AudioHeard was told last

    async def open(self, persona: Persona, claim: Claim) -> None:
        """Returns when the replica was told the persona; Ready follows. Raises NoCapacity, OSError."""
        self._metrics.observe(metrics.PROMPT_CHARACTERS, len(persona.text_prompt))
        try:
            grant, link = await self._join(claim)
        except OSError:  # the replica has just ended or is out of reach; another one may do better
            claim = await self._services.leases.claim(LeaseRequest.of(self._session, persona))
            grant, link = await self._join(claim)
        self._account.note(replica=grant.replica, prompt_characters=len(persona.text_prompt))
        self._metrics.add(metrics.SESSIONS_ADMITTED)
        self._tell(LeaseGranted())
        link.send(Kind.OPEN, messages.pack_open(grant.token, persona))
        self._details = {
            "session": self._session,
            "voice": persona.voice,
            "text_seed": persona.sampling.text_seed,
            "audio_seed": persona.sampling.audio_seed,
        }
        if self._recording is not None:
            self._details["recorded"] = True

    def hear(self, data: bytes) -> None:
        """Takes bytes of the client's stream. A long piece is decoded bit by bit, others in between."""
        idle = not self._unheard
        self._unheard_bytes += len(data)
        if self._unheard_bytes > UNHEARD_LIMIT:
            self._refuse(ProtocolError(f"more than {UNHEARD_LIMIT // 1024} KiB of audio wait to be decoded"))
            return
        self._unheard.extend(data[start : start + FEED_BYTES] for start in range(0, len(data), FEED_BYTES))
        if idle:
            self._decode()

    def stop(self) -> None:
        """From now on nothing is heard and nothing is told."""
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
        self._account.phase("queue" if self._account.queued else "lease", time.monotonic() - claim.began)
        began = time.monotonic()
        try:
            link = await self._connect(lease.grant)
        except OSError:
            lease.release()
            self._lease = None
            raise
        self._account.phase("connect", time.monotonic() - began)
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
        self._link = await self._services.connect(grant, self._hear_link, self._lose_link)
        return self._link

    def _queue(self, place: int) -> None:
        self._account.queued = True
        self._services.changed()
        self._tell(Queued(place))

    # What the replica says

    def _hear_link(self, link: Link, kind: Kind, payload: bytes) -> None:
        if self._stopped:
            return
        match kind:
            case Kind.REPLY:
                self._say(messages.unpack_reply(payload))
            case Kind.READY:
                self._account.phase("prefill", messages.unpack_ready(payload))
                self._tell(Ready(self._details))
                self._send_early()
            case Kind.CLOSE:
                self._tell(Failed(messages.unpack_error(payload)))
            case _:
                raise ProtocolError("a message that does not belong here")

    def _lose_link(self, link: Link) -> None:
        # One that was given up while it was connecting is of no account.
        if link is self._link and not self._stopped:
            self._tell(EngineLost())

    def _say(self, reply: messages.Reply) -> None:
        self.log.append(reply.tokens, forced=reply.frame == 0)
        self._record(reply)
        began = time.perf_counter()
        page = self.transcoder.send(reply.pcm)
        if reply.frame % SAMPLED == 0:
            spent = self._decode_seconds + time.perf_counter() - began
            self._metrics.observe(metrics.TRANSCODE_SECONDS, spent)
            self._metrics.observe(metrics.FRAME_SECONDS, ((_micros() - reply.mark) % 2**32) / 1e6)
        self._decode_seconds = 0.0
        quiet = float(np.dot(reply.pcm, reply.pcm)) < QUIET * len(reply.pcm)
        if quiet and reply.frame < self._stale:
            self._metrics.add(
                metrics.FRAMES_DROPPED, place="silence"
            )  # makes up for what nobody chose to wait
        else:
            self._tell(AgentAudio(page, quiet))
        if reply.text:
            self._tell(AgentText(reply.text))

    def _record(self, reply: messages.Reply) -> None:
        if self._recording is not None:
            latency = ((_micros() - reply.mark) % 2**32) / 1e6
            row = Row(reply.frame, time.monotonic(), latency, reply.tokens, forced=reply.frame == 0)
            self._recording.frame(row, reply.text)

    # What the client says

    def _decode(self) -> None:
        if self._stopped or not self._unheard:
            return
        data = self._unheard.popleft()
        self._unheard_bytes -= len(data)
        self._take(data)
        if self._unheard:
            self._loop.call_soon(self._decode)

    def _take(self, data: bytes) -> None:
        began = time.perf_counter()
        try:
            frames = self.transcoder.receive(data)
        except PersonaplexError as error:
            self._refuse(error)
            return
        self._decode_seconds += time.perf_counter() - began
        for frame in frames:
            self._send(frame)
        if frames and began - self._told_heard >= HEARD_EVERY_S:
            self._told_heard = began
            self._tell(AudioHeard())
        if self.transcoder.astray and self._watch is None:
            self._watch = self._loop.call_later(NOT_OGG_AFTER_S, self._look_again)

    def _look_again(self) -> None:
        """What is no Ogg is named in time, whether more of it comes or not."""
        self._watch = None
        if not self._stopped:
            self._take(b"")

    def _send(self, frame: Pcm) -> None:
        if not self._ready:
            self._metrics.add(metrics.FRAMES_DROPPED, len(self._early) == self._early.maxlen, place="early")
            self._early.append((time.monotonic(), frame))
            return
        assert self._link is not None
        dropped = self._link.dropped
        self._link.send_frame(Kind.FRAME, messages.pack_frame(_micros() % 2**32, frame))
        self._metrics.add(metrics.FRAMES_DROPPED, self._link.dropped - dropped, place="link_in")

    def _send_early(self) -> None:
        now = time.monotonic()
        self._ready = True
        self._stale = sum(now - arrived > STALE_S for arrived, _ in self._early)
        while self._early:
            self._send(self._early.popleft()[1])

    def _refuse(self, error: PersonaplexError) -> None:
        self._unheard.clear()
        self._tell(Failed(error))


def _micros() -> int:
    return time.monotonic_ns() // 1_000
