"""One session in a gateway: a WebSocket on one side, a replica on the other, the session core between.

The core decides, this file does: it turns socket messages, what the replica says and time into events, and
the core's commands into bytes. Everything runs on one event loop. In the end the TokenLog goes to `keep`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from dataclasses import dataclass
from typing import Any

from ray.exceptions import TaskCancelledError
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from deployments.gateway.audio import AudioStep
from deployments.gateway.leases import Claim
from deployments.gateway.outbox import Outbox
from deployments.gateway.protocols.moshi import MoshiTranslator
from deployments.gateway.protocols.translator import Begin, Message, Reply, Translator
from deployments.gateway.recorder import Recording
from deployments.gateway.resumes import Taken
from deployments.gateway.services import Services
from deployments.gateway.stats import SessionStats
from deployments.gateway.transcripts import Heard, Transcript
from deployments.gateway.upstream import Upstream
from personaplex.config import FRAME_SECONDS, Pcm
from personaplex.errors import (
    ClientError,
    NoCapacity,
    PersonaplexError,
    RecordingFailed,
    RepeatedlyLost,
    SessionLost,
)
from personaplex.persona import Persona
from personaplex.session.core import SessionCore, State
from personaplex.session.events import (
    Begun,
    Close,
    Command,
    EngineLost,
    Event,
    Failed,
    FeedAudio,
    PeerClosed,
    SessionNotice,
    Tick,
    UserText,
)
from personaplex.session.moshi import close_reason

logger = logging.getLogger(__name__)

FAILED = "the server failed; please connect again"
# A persona and a ticket (see `Begin`) to the persona with the voice it brings, and its claim.
Claiming = Callable[[Persona, str], Awaitable[tuple[Persona, Claim]]]
LAST_WORDS_S = 5.0  # that a record waits for the words of its end
CLOSE_TIMEOUT_S = 2.0  # for a client to take what is left and answer the close


# Closes by a client that will not come back; a connection that was cut reads as 1005, as does a close without
# a code.
CLEAN_CODES = (1000, 1001)


@dataclass(frozen=True)
class Comeback:
    """A session whose client is back, after it had heard `heard` frames of the agent and read the text of
    `read`."""

    taken: Taken
    heard: int
    read: int


class Conversation:
    """Made for one accepted WebSocket; `run` lasts as long as the session."""

    def __init__(
        self,
        socket: WebSocket,
        session: str,
        services: Services,
        *,
        protocol: Translator | None = None,
        status: bool = False,
        recording: Recording | None = None,
        begin: Claiming | None = None,
        resumable: bool = False,
        comeback: Comeback | None = None,
        transcribe: bool = False,
    ) -> None:
        """`protocol`: /api/chat's unless another is given. `status`: see `SessionCore`. `recording` gets what
        happens; who began it ends it. `begin` claims the slot of a session whose client says only after the
        upgrade which one it wants. `resumable`: its client may come back after it was lost. `comeback`: it
        has. `transcribe`: what the user says is read, where the service does that, for the record and for the
        client if it asked for `status`."""
        self._socket, self._session, self._services = socket, session, services
        before = 0 if comeback is None else comeback.taken.log.frames
        if protocol is None:
            protocol = MoshiTranslator(time.monotonic, services.limits.burst_s, frames_before=before)
        self._resumable, self._comeback = resumable, comeback
        self._cleanly = False  # whether the client said that it leaves
        self._protocol, self._claim_slot = protocol, begin
        self._stats = SessionStats(session, services.metrics, services.trace, protocol.name)
        self._recording: Recording | None = None
        self._transcript: Transcript | None = None
        if transcribe and services.transcripts is not None:
            self._transcript = services.transcripts.open(self._on_heard)
        self._upstream = Upstream(
            session,
            services,
            self._stats,
            self._on,
            self._on_agent_frame,
            resumable=resumable,
            on_heard=None if self._transcript is None else self._transcript.hear,
        )
        self._audio = AudioStep(
            protocol.transcoder, services.limits, services.metrics, self._on, self._upstream.send_frame
        )
        limits = services.limits
        limits = dataclasses.replace(limits, bytes_per_s=limits.bytes_per_s * protocol.byte_share)
        self._core = SessionCore(
            protocol.transcoder.headers(),
            limits,
            self._stats.began,
            status=status,
            user_text=status or protocol.user_text,
            handshake_delay_s=protocol.handshake_delay_s if comeback is None else 0.0,
            begin_s=limits.idle_s if begin is not None else float("inf"),
            talked_s=before * FRAME_SECONDS,
        )
        self._loop = asyncio.get_running_loop()
        if recording is not None:
            self.record(recording)
        self._unsent = Outbox(protocol.open(), services.limits.burst_share)
        self._tasks: list[asyncio.Future[None]] = []
        self._claim: Claim | None = None
        self._close: Close | None = None
        self._writable = asyncio.Event()  # something is unsent, or the end has come
        self._writable.set()
        self._closed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._was_live = False

    @property
    def error(self) -> PersonaplexError | None:
        """Why our side ended the session; None when the client left."""
        return self._core.error

    @property
    def over(self) -> bool:
        """Whether the session has ended, though its client may still have to be told."""
        return self._core.state in (State.CLOSING, State.CLOSED)

    @property
    def talked_s(self) -> float:
        """Seconds since the handshake, 0 before it; what they were once the session has ended."""
        return self._stats.talked_s

    def end(self, error: PersonaplexError) -> None:
        """Ends the session with `error`, which its client is told."""
        self._on(Failed(error))

    def record(self, recording: Recording) -> None:
        """What happens goes to `recording` too; who began it ends it. Before the session has its slot."""
        self._recording = recording
        recording.on_failure = self._on_recording_failed
        self._upstream.record(recording)

    async def last_words(self) -> None:
        """After `run`: returns once everything that the user said is in the record, or after LAST_WORDS_S."""
        if self._transcript is not None:
            await self._transcript.settled(LAST_WORDS_S)

    async def run(self, persona: Persona | None = None, claim: Claim | None = None) -> None:
        """Serves the client until either side ends it. The claim is this session's from now on; without one
        the session waits for its client to say what it wants."""
        self._claim = claim
        if persona is not None and claim is not None:
            self._start(self._serve(persona, claim))
        self._start(self._read())
        self._start(self._write())
        try:
            await self._closed.wait()
        finally:
            # Serve cancels a handler, more than once, when its client has gone: what frees things comes first
            # and awaits nothing, what has to wait goes on without us.
            if self._claim is not None:
                self._claim.give_up()
            self._finish()
            ending = asyncio.ensure_future(self._wind_up())
            self._services.ending.add(ending)
            ending.add_done_callback(self._services.ending.discard)
            self._stats.close(self._core.error, self._core.pacer, self._audio.transcoder, self._core.ignored)
            await asyncio.shield(ending)

    # Tasks

    def _start(self, task: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.ensure_future(task))

    async def _read(self) -> None:
        try:
            while (message := await self._receive()) is not None:
                data = message.get("bytes")
                self._understand(message["text"] if data is None else data)
        except Exception:  # a task root, and a fault of ours: what the connection raises ends in _receive
            logger.exception("session %s failed", self._session)
            self._on(Failed(SessionLost(FAILED)))
        else:
            self._on(PeerClosed())  # nobody is there any more, whatever the cause

    async def _receive(self) -> MutableMapping[str, Any] | None:
        """The client's next message; None when its connection is gone."""
        try:
            message = await self._socket.receive()
        except (WebSocketDisconnect, RuntimeError, TaskCancelledError):
            return None  # RuntimeError: Starlette, when it was closed before; the last: Serve, client gone
        except Exception as error:  # noqa: BLE001  Serve raises all sorts when its proxy is gone
            logger.warning("session %s: its connection is gone: %s", self._session, type(error).__name__)
            return None
        if message["type"] == "websocket.disconnect":
            self._cleanly = message.get("code", 1005) in CLEAN_CODES
            return None
        return message

    async def _write(self) -> None:
        try:
            while True:
                await self._writable.wait()
                self._writable.clear()
                while self._unsent:
                    message = self._unsent.take()
                    if isinstance(message, str):
                        await self._socket.send_text(message)
                    else:
                        await self._socket.send_bytes(message)
                if self._close is not None:
                    await self._socket.close(self._close.code, close_reason(self._close.reason))
                    return
        except (WebSocketDisconnect, RuntimeError):  # the reader notices too, and says so
            pass
        except Exception as error:  # noqa: BLE001  a task root, as above
            logger.warning("session %s: its connection is gone: %s", self._session, type(error).__name__)
            self._on(PeerClosed())

    async def _serve(self, persona: Persona, claim: Claim | None, ticket: str = "") -> None:
        """Connects to the replica; from then on what it says carries the session."""
        try:
            if claim is None:
                assert self._claim_slot is not None
                persona, claim = await self._claim_slot(persona, ticket)
                self._claim = claim
                if self.over:
                    claim.give_up()
                    return
            if self._comeback is None:
                await self._upstream.open(persona, claim)
            else:
                await self._upstream.go_on(
                    self._comeback.taken, self._comeback.heard, self._comeback.read, claim
                )
        except PersonaplexError as error:
            self._on(Failed(error))
        except OSError:
            self._on(EngineLost())
        except Exception:  # a task root: the client is told, the log has the reason
            logger.exception("session %s failed", self._session)
            self._on(Failed(SessionLost(FAILED)))

    # Events and commands

    def _understand(self, message: Message) -> None:
        for meaning in self._protocol.read(message):
            match meaning:
                case Reply(answer):
                    if self._close is None:
                        self._send(answer)
                        self._check_unsent()
                case Begin(persona, ticket):
                    self._on(Begun())
                    if self._core.state is State.OPENING:
                        self._start(self._serve(persona, None, ticket))
                case _:
                    self._on(meaning)

    def _send(self, message: Message) -> None:
        self._unsent.put(message)
        self._writable.set()

    def _on_heard(self, heard: Heard) -> None:
        if self._recording is not None and isinstance(heard, UserText):
            self._recording.user_text(heard.segment)
        self._on(heard)

    def _on_agent_frame(self, number: int, pcm: Pcm, stale: bool) -> None:
        self._audio.encode(number, pcm, stale)

    def _on_recording_failed(self, error: RecordingFailed) -> None:
        """On the recorder's thread."""
        notice = SessionNotice("recording", {"recorded": False, "reason": str(error)})
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._on, notice)

    def _on(self, event: Event) -> None:
        if self._core.state is State.CLOSED:
            return
        commands = self._core.receive(event, time.monotonic())
        for command in commands:
            self._do(command)
        self._notice_change()
        if commands:
            self._check_unsent()

    def _check_unsent(self) -> None:
        if self._unsent.full and self._close is None:
            self._unsent.clear()
            self._on(Failed(ClientError("the client does not read what it is sent")))

    def _do(self, command: Command) -> None:
        match command:
            case FeedAudio(data):
                self._audio.feed(data)
            case Close():
                self._close = command
                self._writable.set()
                self._loop.call_later(CLOSE_TIMEOUT_S, self._closed.set)
            case _:
                for message in self._protocol.write(command):
                    self._send(message)

    def _notice_change(self) -> None:
        state = self._core.state
        if state is State.LIVE:
            if not self._was_live:
                self._was_live = True
                self._services.live.add(self)
                self._services.changed()
                self._stats.live()
                self._services.began(self._session)
        elif self.over:
            self._audio.stop()
            self._upstream.stop()
            if state is State.CLOSED:
                self._closed.set()
        self._set_timer(self._core.deadline())

    def _set_timer(self, due: float | None) -> None:
        # One that rings too early does no harm, and most are moved on by every message.
        if due is None or (self._timer is not None and self._timer_due <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_due = due
        self._timer = self._loop.call_later(max(0.0, due - time.monotonic()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._on(Tick())

    # The end

    def _finish(self) -> None:
        self._on(PeerClosed())  # what still comes changes nothing, sets no timer and is not why it ended
        for task in self._tasks:
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if self._resumable and _is_kept(self._core.error, self._cleanly):
            self._upstream.detach()
        self._upstream.close()
        if self._transcript is not None:
            self._transcript.end()
            if self._recording is None:
                self._transcript.close()  # nobody is left to be told
        self._services.live.discard(self)

    async def _wind_up(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._upstream.release(CLOSE_TIMEOUT_S)
        states = (self._socket.client_state, self._socket.application_state)
        if WebSocketState.DISCONNECTED not in states:
            close = self._close or Close(1011, "")  # the first where the client did not take it in time
            with contextlib.suppress(RuntimeError, WebSocketDisconnect, OSError, asyncio.TimeoutError):
                closing = self._socket.close(close.code, close_reason(close.reason))
                await asyncio.wait_for(closing, CLOSE_TIMEOUT_S)
        # Last: whatever becomes of it, all else is done.
        await self._services.keep(self._session, self._upstream.log)


def _is_kept(error: PersonaplexError | None, cleanly: bool) -> bool:
    """Whether the client of a session that ended with `error`, or by the client's leaving, may come back to
    it. One that found no slot after its replica was lost may find one later; one that may be what its
    replicas died of is not tried again."""
    if error is None:
        return not cleanly
    return isinstance(error, SessionLost | NoCapacity) and not isinstance(error, RepeatedlyLost)
