"""One session in a gateway: a WebSocket on one side, a media link on the other, the session core between.

The core decides, this file does: it turns socket messages, link messages and time into events and the core's
commands into bytes. Everything runs on one event loop; nothing here blocks it for longer than one message's
Opus work. The session's TokenLog is kept until its end and then handed to `keep`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from deployments import media, metrics
from deployments.account import Account
from deployments.lease import Grant, Lease, LeaseRequest, Leases
from deployments.media import Kind, Link, OnLost, OnMessage
from deployments.metrics import Metrics
from deployments.tracing import Trace
from personaplex.audio.transcoder import Transcoder
from personaplex.errors import ClientError, PersonaplexError, ProtocolError, SessionLost
from personaplex.persona import VOICES, Persona
from personaplex.session.core import BACKLOG_LIMIT, Limits, SessionCore, State
from personaplex.session.events import (
    AgentAudio,
    AgentText,
    Close,
    Command,
    EngineLost,
    Event,
    Failed,
    FeedAudio,
    LeaseGranted,
    PeerClosed,
    Queued,
    Ready,
    Received,
    ReceivedText,
    Send,
    Tick,
)
from personaplex.tokenlog import TokenLog

logger = logging.getLogger(__name__)

UNSENT_LIMIT = 256  # messages a client may leave unread: 20 s of speech
CLOSE_TIMEOUT_S = 2.0  # for a client to take what is left and answer the close
FEED_BYTES = 4_096  # of Ogg decoded at a time: about a second, well under a frame's time to decode
QUIET = 1e-6  # mean square of speech nobody misses: -60 dBFS


Connect = Callable[[Grant, OnMessage, OnLost], Awaitable[Link]]


@dataclass(frozen=True)
class Services:
    """What a gateway lends to each of its conversations."""

    leases: Leases
    metrics: Metrics
    limits: Limits
    low_latency: bool
    connect: Connect
    connect_timeout_s: float  # for `connect`: as long as a replica holds a lease nobody claims
    keep: Callable[[str, TokenLog], Awaitable[None]]  # called at the end with the session's name and tokens
    changed: Callable[[], None]  # called when a session went live or joined or left the queue
    trace: Trace | None = None
    live: set[str] = field(default_factory=set)  # names of the sessions past their handshake
    ending: set[asyncio.Future[None]] = field(default_factory=set)  # sessions that are being wound up


class Conversation:
    """Made for one accepted WebSocket; `run` lasts as long as the session."""

    def __init__(self, socket: WebSocket, session: str, services: Services) -> None:
        self._socket, self._session, self._services = socket, session, services
        self._metrics = services.metrics
        self._transcoder = Transcoder(low_latency=services.low_latency, clock=time.monotonic)
        self._account = Account(session, services.metrics, services.trace)
        self._core = SessionCore(self._transcoder.headers(), services.limits, self._account.began)
        self._log = TokenLog()
        self._loop = asyncio.get_running_loop()
        self._link: Link | None = None
        self._lease: Lease | None = None
        self._unsent: deque[bytes] = deque()
        self._close: Close | None = None
        self._writable = asyncio.Event()  # something is unsent, or the end has come
        self._closed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due: float | None = None
        self._unheard: deque[bytes] = deque()  # of the client's stream, to be decoded
        self._unheard_bytes = 0
        self._decode_seconds = 0.0  # since the last reply
        self._was_live = False

    async def run(self, admit: Callable[[], AbstractContextManager[Persona]]) -> None:
        """Serves the client until either side ends it. `admit` is entered for as long as the session lasts;
        it may raise a PersonaplexError, which the client is told."""
        tasks = [asyncio.ensure_future(task) for task in (self._read(), self._write(), self._serve(admit))]
        try:
            await self._closed.wait()
        finally:
            # Serve cancels a handler, more than once, when its client has gone: what frees things comes first
            # and awaits nothing, what has to wait goes on without us.
            self._finish(tasks)
            ending = asyncio.ensure_future(self._wind_up(tasks))
            self._services.ending.add(ending)
            ending.add_done_callback(self._services.ending.discard)
            await asyncio.shield(ending)

    # Tasks

    async def _read(self) -> None:
        try:
            while True:
                message = await self._socket.receive()
                if message["type"] == "websocket.disconnect":
                    break
                data = message.get("bytes")
                self._on(ReceivedText(message["text"]) if data is None else Received(data))
        except (WebSocketDisconnect, RuntimeError):  # RuntimeError: Starlette, when it was closed before
            pass
        self._on(PeerClosed())

    async def _write(self) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            while True:
                await self._writable.wait()
                self._writable.clear()
                while self._unsent:
                    await self._socket.send_bytes(self._unsent.popleft())
                if self._close is not None:
                    await self._socket.close(self._close.code, self._close.reason)
                    return

    async def _serve(self, admit: Callable[[], AbstractContextManager[Persona]]) -> None:
        """Gets a slot and connects to it; from then on the link's messages carry the session."""
        try:
            with admit() as persona:
                await self._open(persona)
                await self._closed.wait()
        except PersonaplexError as error:
            self._on(Failed(error))
        except OSError:
            self._on(EngineLost())
        except Exception:  # a task root: the client is told, the log has the reason
            logger.exception("session %s failed", self._session)
            self._on(Failed(SessionLost("the server failed; please connect again")))

    async def _open(self, persona: Persona) -> None:
        voice = persona.voice if persona.voice in VOICES else ""
        self._metrics.observe(metrics.PROMPT_CHARACTERS, len(persona.text_prompt))
        request = LeaseRequest(self._session, voice)
        try:
            grant, link = await self._join(request)
        except OSError:  # the replica has just ended or is out of reach; another one may do better
            grant, link = await self._join(request)
        self._account.note(replica=grant.replica, prompt_characters=len(persona.text_prompt))
        self._metrics.add(metrics.SESSIONS_ADMITTED)
        self._on(LeaseGranted())
        link.send(Kind.OPEN, media.pack_open(grant.token, persona))
        self._details = {
            "session": self._session,
            "voice": persona.voice,
            "text_seed": persona.sampling.text_seed,
            "audio_seed": persona.sampling.audio_seed,
        }

    async def _join(self, request: LeaseRequest) -> tuple[Grant, Link]:
        """A lease and the link to its replica. Raises NoCapacity, OSError once the lease is given back."""
        began = time.monotonic()
        self._lease = lease = await self._services.leases.acquire(request, self._queue)
        self._services.changed()
        self._account.phase("queue" if self._account.queued else "lease", time.monotonic() - began)
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
        self._on(Queued(place))

    # The media link

    def _hear_link(self, link: Link, kind: Kind, payload: bytes) -> None:
        if self._core.state in (State.CLOSING, State.CLOSED):
            return
        match kind:
            case Kind.REPLY:
                self._say(media.unpack_reply(payload))
            case Kind.READY:
                self._account.phase("prefill", media.unpack_ready(payload))
                self._on(Ready(self._details))
            case Kind.CLOSE:
                self._on(Failed(media.unpack_error(payload)))
            case _:
                raise ProtocolError("a message that does not belong here")

    def _lose_link(self, link: Link) -> None:
        # One that was given up while it was connecting is of no account.
        if link is self._link and self._core.state not in (State.CLOSING, State.CLOSED):
            self._on(EngineLost())

    def _say(self, reply: media.Reply) -> None:
        self._metrics.observe(metrics.FRAME_SECONDS, ((_micros() - reply.mark) % 2**32) / 1e6)
        self._log.append(reply.tokens, forced=reply.frame == 0)
        began = time.perf_counter()
        page = self._transcoder.send(reply.pcm)
        spent = self._decode_seconds + time.perf_counter() - began
        self._metrics.observe(metrics.TRANSCODE_SECONDS, spent)
        self._decode_seconds = 0.0
        self._on(AgentAudio(page, quiet=float(np.dot(reply.pcm, reply.pcm)) < QUIET * len(reply.pcm)))
        self._on(AgentText(reply.text))

    # Events and commands

    def _on(self, event: Event) -> None:
        if self._core.state is State.CLOSED:
            return
        for command in self._core.receive(event, time.monotonic()):
            self._do(command)
        self._notice_change()
        if len(self._unsent) > UNSENT_LIMIT and self._close is None:
            self._unsent.clear()
            self._on(Failed(ClientError("the client does not read what it is sent")))

    def _notice_change(self) -> None:
        state = self._core.state
        if state is State.LIVE and not self._was_live:
            self._was_live = True
            self._services.live.add(self._session)
            self._services.changed()
            self._account.live()
        if state is State.CLOSED:
            self._closed.set()
        self._set_timer(self._core.deadline())

    def _do(self, command: Command) -> None:
        match command:
            case Send(data):
                self._unsent.append(data)
                self._writable.set()
            case FeedAudio(data):
                self._feed(data)
            case Close():
                self._close = command
                self._writable.set()
                self._loop.call_later(CLOSE_TIMEOUT_S, self._closed.set)

    def _feed(self, data: bytes) -> None:
        """Queues bytes of the client's stream. A long backlog is decoded in pieces, others in between."""
        idle = not self._unheard
        self._unheard_bytes += len(data)
        if self._unheard_bytes > BACKLOG_LIMIT:
            self._refuse(ProtocolError(f"more than {BACKLOG_LIMIT // 1024} KiB of audio wait to be decoded"))
            return
        self._unheard.extend(data[start : start + FEED_BYTES] for start in range(0, len(data), FEED_BYTES))
        if idle:
            self._decode()

    def _decode(self) -> None:
        if self._core.state is not State.LIVE or self._link is None:
            return
        began = time.perf_counter()
        try:
            frames = self._transcoder.receive(self._unheard[0])
        except PersonaplexError as error:
            self._refuse(error)
            return
        self._decode_seconds += time.perf_counter() - began
        self._unheard_bytes -= len(self._unheard.popleft())
        for frame in frames:
            dropped = self._link.dropped
            self._link.send_frame(Kind.FRAME, media.pack_frame(_micros() % 2**32, frame))
            self._metrics.add(metrics.FRAMES_DROPPED, self._link.dropped - dropped, place="link_in")
        if self._unheard:
            self._loop.call_soon(self._decode)

    def _refuse(self, error: PersonaplexError) -> None:
        self._unheard.clear()
        self._on(Failed(error))

    def _set_timer(self, due: float | None) -> None:
        if due == self._timer_due:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = due
        if due is not None:
            self._timer = self._loop.call_later(max(0.0, due - time.monotonic()), self._tick)

    def _tick(self) -> None:
        self._timer = self._timer_due = None
        self._on(Tick())

    # The end

    def _finish(self, tasks: Sequence[asyncio.Future[None]]) -> None:
        for task in tasks:
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if self._link is not None:
            self._link.close()
        self._services.live.discard(self._session)
        self._account.close(self._core.error, self._core.pacer, self._transcoder)

    async def _wind_up(self, tasks: Sequence[asyncio.Future[None]]) -> None:
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._lease is not None:
            if self._link is not None:
                self._link.close()  # it may have been connecting until just now
                await self._lease.wait_freed(CLOSE_TIMEOUT_S)
            self._lease.release()
        states = (self._socket.client_state, self._socket.application_state)
        if WebSocketState.DISCONNECTED not in states:
            with contextlib.suppress(RuntimeError, WebSocketDisconnect, OSError, asyncio.TimeoutError):
                await asyncio.wait_for(self._socket.close(1011), CLOSE_TIMEOUT_S)
        await self._services.keep(self._session, self._log)  # last: whatever becomes of it, all else is done


def _micros() -> int:
    return time.monotonic_ns() // 1_000
