"""The replica deployment: one engine with its thread, leases over Serve, media over TCP.

A slot is held from the grant of its lease until the engine has closed it: by the lease while nobody connected
yet (`lease_timeout_s` at most), then by the media link, whatever becomes of the lease call. The lease call
ends when the slot is free, so Serve never counts a slot as free before it is. When the engine fails, every
session is told SessionLost, no new one is taken and the health check fails: Serve then replaces the process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments import logs, metrics
from deployments.keysync import KeySync
from deployments.parts import ReplicaSettings
from deployments.replica.models import load
from deployments.replica.questions import QUESTIONS, Questions
from deployments.replica.reporter import Reporter
from deployments.settings import AUTO
from deployments.wire import messages
from deployments.wire.handshake import ReplicaHandshake
from deployments.wire.link import Link, listen
from deployments.wire.messages import Grant, LeaseRequest, MessageKind, Refusal, ReplicaStatus, SessionStatus
from deployments.wire.tls import replica_context
from personaplex.engine.interface import Loaded, Stepper
from personaplex.engine.loop import (
    Batch,
    Closed,
    Encoded,
    EngineEvent,
    EngineLoop,
    Faulted,
    Opened,
    Refused,
    Stepped,
)
from personaplex.errors import EngineFault, PersonaplexError, ProtocolError, SessionLost

logger = logging.getLogger(__name__)

UNAUTHENTICATED_SPARE = 16  # connections that have shown no lease, beyond two per slot

_ANYWHERE = ("0.0.0.0", "::")
_Packed = tuple[EngineEvent, bytes | None]


@dataclass(eq=False)
class _Holder:
    """Whoever holds a lease: a gateway that has not connected yet (`number` is None) or a session of the
    engine."""

    request: LeaseRequest
    began: float = field(default_factory=time.monotonic)
    link: Link | None = None
    number: int | None = None
    freed: asyncio.Event = field(default_factory=asyncio.Event)


class Replica:
    """Made by Serve, one per process; every method runs on its event loop but `_from_engine`."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: ReplicaSettings, fleet: DeploymentHandle[Any]
    ) -> None:
        logs.configure(settings.log_level, settings.log_format)
        self._settings = settings
        self._name = serve.get_replica_context().replica_tag
        self._event_loop = asyncio.get_running_loop()
        self._metrics = metrics.replica_metrics()
        self._unclaimed: dict[bytes, _Holder] = {}  # by one-time token
        self._unauthenticated: dict[Link, asyncio.TimerHandle] = {}  # no lease shown yet; oldest first
        self._linked: dict[Link, _Holder] = {}
        self._open: dict[int, _Holder] = {}  # by the engine loop's number
        self._published: dict[str, int] = {}  # totals as last published
        self._accepting = True
        self._certificate = b""  # digest of the media link's, over TLS
        self._engine = EngineLoop(
            self._load,
            self._from_engine,
            gather_s=settings.gather_s,
            inbox_limit=settings.burst_frames,
        )
        began = time.monotonic()
        started = asyncio.wrap_future(self._engine.start())
        self._slots = await asyncio.wait_for(started, settings.load_timeout_s)
        self._questions = Questions(
            self._loaded.engine.count_tokens, settings.prompt_tokens, self._engine.encode
        )
        self._keys = KeySync(fleet)
        tls = None
        if settings.media_tls != "off":
            tls, self._certificate = await asyncio.to_thread(replica_context, settings.media_tls_dir)
        self._host = settings.media_host or _node_address()
        await asyncio.wait_for(self._keys.known(), settings.load_timeout_s)
        self._server, self._port = await listen(
            self._accept,
            self._host,
            settings.media_port_min,
            settings.media_port_max,
            tls=tls,
            tls_timeout_s=settings.lease_timeout_s,
        )
        self._reporter = Reporter(fleet, self._status, self._close_sessions)
        self._publish_slots()
        loaded = time.monotonic() - began
        self._metrics.set(metrics.LOAD_SECONDS, loaded)
        self._keeping = asyncio.ensure_future(self._metrics.keep())
        logger.info("replica ready: %d slots, %.1f s to load", self._slots, loaded)

    async def lease(self, request: LeaseRequest) -> AsyncIterator[Grant | Refusal]:
        """Holds one slot; see the module. Serve admits at most `slots` of these calls at a time."""
        if not self._accepting:
            yield Refusal()
            return
        token, holder = secrets.token_bytes(messages.TOKEN_BYTES), _Holder(request)
        self._unclaimed[token] = holder
        self._publish_slots()
        expiry = self._event_loop.call_later(self._settings.lease_timeout_s, self._drop, token)
        try:
            yield Grant(self._reachable, self._port, token, self._name, self._slots)
            await holder.freed.wait()
        finally:
            expiry.cancel()
            self._drop(token)

    async def check_health(self) -> None:
        """Raises EngineFault when the engine's thread has ended or is stuck."""
        self._engine.check(self._settings.stall_limit_s)

    async def record_routing_stats(self) -> dict[str, Any]:
        return {"accepting": self._accepting, "voices": list(self._engine.usage.voices)}

    async def __del__(self) -> None:
        if hasattr(self, "_reporter"):
            self._keeping.cancel()
            self._keys.close()
            await self._reporter.close()
            self._server.close()
            await asyncio.to_thread(self._engine.stop)

    @property
    def _reachable(self) -> str:
        """Where gateways reach the media port."""
        return _node_address() if self._host in _ANYWHERE else self._host

    def _status(self) -> ReplicaStatus:
        now = time.monotonic()
        holders = [*self._unclaimed.values(), *self._open.values()]
        return ReplicaStatus(
            replica=self._name,
            node=_node_address(),
            pid=os.getpid(),
            model=self._loaded.name,
            voices=tuple(self._loaded.voices),
            slots=self._slots,
            accepting=self._accepting,
            sessions=tuple(
                SessionStatus(holder.request.session, round(now - holder.began, 1)) for holder in holders
            ),
            engine={
                "model": self._loaded.name if self._settings.model == AUTO else self._settings.model,
                "repo": self._settings.hf_repo,
                "revision": self._settings.hf_revision,
                "dtype": self._settings.dtype,
                "weights": self._settings.weights,
                "kv": self._settings.kv,
            },
            host=self._reachable,
            port=self._port,
        )

    def _close_sessions(self) -> None:
        self._accepting = False
        for link in list(self._linked):
            link.close(SessionLost("the server is being stopped; please connect again"))

    def _load(self) -> Stepper:
        # On the engine's thread, which is to own the device.
        self._loaded: Loaded = load(self._settings)
        return self._loaded.engine

    # Media links

    def _accept(self) -> Link:
        link = Link(
            self._message,
            self._lost,
            handshake=ReplicaHandshake(self._keys.keyring, self._name),
            certificate=self._certificate,
            outbox=self._settings.burst_frames,
            stall_s=self._settings.stall_limit_s,
        )
        self._unauthenticated[link] = self._event_loop.call_later(
            self._settings.lease_timeout_s, self._reject, link, SessionLost("nothing was said in time")
        )
        # A gateway claims as soon as it is connected, so the oldest is the likeliest never to.
        if len(self._unauthenticated) > 2 * self._slots + UNAUTHENTICATED_SPARE:
            oldest = next(iter(self._unauthenticated))
            self._reject(oldest, SessionLost("too many connections without a lease"))
        return link

    def _reject(self, link: Link, error: PersonaplexError) -> None:
        self._unauthenticated.pop(link).cancel()
        link.close(error)

    def _message(self, link: Link, kind: MessageKind, payload: bytes) -> None:
        holder = self._linked.get(link)
        if holder is None:
            self._claim_or_ask(link, kind, payload)
        elif kind is MessageKind.FRAME and holder.number is not None:
            timestamp, frame = messages.unpack_frame(payload)
            self._engine.push(holder.number, frame, timestamp)
        elif kind is MessageKind.CLOSE:
            link.close()
        else:
            raise ProtocolError("a message that does not belong here")

    def _claim_or_ask(self, link: Link, kind: MessageKind, payload: bytes) -> None:
        if kind not in QUESTIONS and link not in self._questions:
            self._claim(link, kind, payload)
            return
        if link in self._unauthenticated:
            self._unauthenticated.pop(link).cancel()
        self._questions.receive(link, kind, payload)

    def _claim(self, link: Link, kind: MessageKind, payload: bytes) -> None:
        if kind is not MessageKind.OPEN:
            raise ProtocolError("the first message must open the session")
        token = messages.open_token(payload)
        if token not in self._unclaimed:
            self._reject(link, SessionLost("the lease ran out; please connect again"))
            return
        persona = messages.unpack_open(payload)
        holder = self._unclaimed.pop(token)
        self._unauthenticated.pop(link).cancel()
        holder.link = link
        self._linked[link] = holder
        try:
            holder.number = self._engine.open(persona)
        except EngineFault:
            self._end(holder, SessionLost("the server running this session failed; please connect again"))
            return
        self._open[holder.number] = holder

    def _lost(self, link: Link) -> None:
        if link in self._unauthenticated:
            self._unauthenticated.pop(link).cancel()
        self._questions.lost(link)
        holder = self._linked.pop(link, None)
        if holder is None:
            return
        if holder.number in self._open:
            self._engine.close(holder.number)  # Closed comes when the slot is free
        else:
            self._free(holder)

    def _drop(self, token: bytes) -> None:
        """Ends a lease nobody claimed."""
        holder = self._unclaimed.pop(token, None)
        if holder is not None:
            self._free(holder)

    # Events of the engine

    def _from_engine(self, batch: Batch) -> None:
        # On the engine's thread: its arrays may be written again by the next tick, so bytes are made here.
        packed = [(event, _pack(event)) for event in batch.events]
        self._event_loop.call_soon_threadsafe(self._dispatch, batch, packed)

    def _dispatch(self, batch: Batch, packed: list[_Packed]) -> None:
        for event, payload in packed:
            match event:
                case Stepped(session) if session in self._open:
                    assert payload is not None
                    self._reply(self._open[session], payload)
                case Opened(session) if session in self._open:
                    self._ready(self._open[session], event)
                case Refused(session, error) if session in self._open:
                    self._end(self._open.pop(session), error)
                case Closed(session) if session in self._open:
                    self._free(self._open.pop(session))
                case Encoded():
                    self._questions.encoded(event)
                case Faulted():
                    self._fail()
        self._publish(batch)

    def _ready(self, holder: _Holder, event: Opened) -> None:
        assert holder.link is not None
        holder.link.send(MessageKind.READY, messages.pack_ready(event.prefill_s))

    def _reply(self, holder: _Holder, payload: bytes) -> None:
        assert holder.link is not None
        dropped = holder.link.dropped
        holder.link.send_frame(MessageKind.REPLY, payload)
        self._metrics.add(metrics.FRAMES_DROPPED, holder.link.dropped - dropped, place="link_out")

    def _fail(self) -> None:
        self._accepting = False
        lost = SessionLost("the server running this session failed; please connect again")
        for holder in list(self._open.values()):
            self._end(holder, lost)
        self._open.clear()

    def _end(self, holder: _Holder, error: PersonaplexError) -> None:
        """Tells the gateway why, and frees a holder that has no slot of the engine any more."""
        if holder.link is not None:
            holder.link.close(error)
        self._free(holder)

    def _free(self, holder: _Holder) -> None:
        holder.freed.set()
        self._publish_slots()

    # Numbers

    @property
    def _used(self) -> int:
        return len(self._unclaimed) + len(self._open)

    def _publish_slots(self) -> None:
        self._reporter.changed()
        self._metrics.set(metrics.SLOTS_TOTAL, self._slots)
        self._metrics.set(metrics.SLOTS_USED, self._used)

    def _publish(self, batch: Batch) -> None:
        if batch.work == "tick":
            self._metrics.observe(metrics.TICK_SECONDS, batch.seconds)
            self._metrics.observe(metrics.TICK_SLOTS, batch.slots)
        elif batch.work == "prefill":
            self._metrics.observe(metrics.PREFILL_SECONDS, batch.seconds)
        counters, usage = self._engine.counters, self._engine.usage
        self._publish_total(metrics.FRAMES_DROPPED, counters.frames_dropped, place="inbox")
        self._publish_total(metrics.FRAMES_LATE, counters.frames_late)
        self._publish_total(metrics.TICKS_LATE, counters.ticks_late)
        self._publish_total(metrics.VOICE_CACHE, usage.voice_hits, result="hit")
        self._publish_total(metrics.VOICE_CACHE, usage.voice_misses, result="miss")
        for series, value in (
            (metrics.INBOX_FRAMES, counters.frames_waiting),
            (metrics.POSITIONS, usage.positions),
            (metrics.DEVICE_BYTES, usage.device_bytes),
        ):
            self._metrics.set(series, value)

    def _publish_total(self, series: metrics.Series, total: int, **labels: str) -> None:
        """Adds to a counter what a total has grown by."""
        key = series.name + "".join(labels.values())
        self._metrics.add(series, total - self._published.get(key, 0), **labels)
        self._published[key] = total


def _node_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def _pack(event: EngineEvent) -> bytes | None:
    if not isinstance(event, Stepped):
        return None
    said = event.output
    return messages.pack_reply(messages.Reply(said.frame, said.pcm, said.tokens, said.text, event.timestamp))
