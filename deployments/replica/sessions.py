"""The sessions of one replica: who holds which slot, from the grant of its lease until the engine closed it.

A slot is held by the lease while nobody connected yet, then by the media link, whatever becomes of the lease
call. A session is opened anew, or rebuilt from the log that its gateway sends. When the engine fails, every
session is told SessionLost. Knows no Ray; runs on one event loop but for `deliver`.

A session whose client may come back is detached when its gateway says so or is lost: its slot is freed at
once, its log is kept for `resume_grace_s`. Whoever shows its token gets the log, from a session that looks
alive too, which then ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from deployments import metrics
from deployments.metrics import Metrics
from deployments.parts import ReplicaSettings
from deployments.replica.comebacks import Comebacks
from deployments.replica.holders import Holder, Holders
from deployments.replica.numbers import EngineNumbers
from deployments.replica.questions import QUESTIONS, Questions
from deployments.replica.rebuilds import Rebuilds
from deployments.replica.running import RunningLog
from deployments.replica.unauthenticated import Unauthenticated
from deployments.wire import messages
from deployments.wire.handshake import Keyring, ReplicaHandshake
from deployments.wire.link import Link
from deployments.wire.messages import MessageKind, Opening, SlotReady
from deployments.wire.transfer import LogReceiver
from personaplex.engine.events import Batch, Closed, Encoded, EngineEvent, Faulted, Opened, Refused, Stepped
from personaplex.engine.interface import Stepper
from personaplex.engine.loop import EngineLoop
from personaplex.errors import (
    EngineFault,
    LogRefused,
    PersonaplexError,
    ProtocolError,
    ResumeRefused,
    SessionLost,
    SessionTaken,
)
from personaplex.sessionlog import SessionLog, SessionRecorder

FAILED = "the server running this session failed; please connect again"

_Packed = tuple[EngineEvent, bytes | None]


class Sessions:
    """Made before the engine, whose loop is `engine`; `slots` is to be set once it has started."""

    def __init__(
        self,
        settings: ReplicaSettings,
        make: Callable[[], Stepper],
        published: Metrics,
        changed: Callable[[], None],
        keyring: Keyring,
        name: str,
    ) -> None:
        """`make` builds the engine, on its thread. `changed` is called when a slot is taken or freed.
        `keyring` holds the application's secret, `name` is the replica's. `questions` answers what is no
        session's, once it is set."""
        self.certificate = b""  # digest of the media link's, over TLS
        self.questions: Questions | None = None
        self.slots = 0
        self.accepting = True
        self.engine = EngineLoop(
            make,
            self.deliver,
            gather_s=settings.gather_s,
            inbox_limit=settings.burst_frames,
            rebuild_share=settings.rebuild_share,
        )
        self._settings, self._metrics = settings, published
        self._numbers = EngineNumbers(published, self.engine)
        self._event_loop = asyncio.get_running_loop()
        self.holders = Holders(settings.lease_timeout_s, changed)
        self._unauthenticated = Unauthenticated(settings.lease_timeout_s)
        self._linked: dict[Link, Holder] = {}
        self._keyring, self._name = keyring, name
        self.comebacks = Comebacks(settings.resume_grace_s, settings.slots, keyring, changed)
        self._rebuilds: Rebuilds[Holder] = Rebuilds(settings.engine_config.rebuilds, self._rebuild)

    def close(self) -> None:
        """Graceful shutdown: takes no new session and ends every other one in words."""
        self.accepting = False
        for holder in self._linked.values():
            holder.running = None
        for link in list(self._linked):
            link.close(SessionLost("the server is being stopped; please connect again"))

    # Media links

    def accept(self) -> Link:
        """A connection came in."""
        link = Link(
            self._message,
            self._lost,
            handshake=ReplicaHandshake(self._keyring, self._name),
            certificate=self.certificate,
            outbox=self._settings.burst_frames,
            stall_s=self._settings.stall_limit_s,
        )
        self._unauthenticated.add(link, self.slots)
        return link

    def _message(self, link: Link, kind: MessageKind, payload: bytes) -> None:
        holder = self._linked.get(link)
        if self.comebacks.takes(link):
            self.comebacks.answer(link, kind)
        elif holder is None and kind is MessageKind.TAKE:
            self._give(link, payload)
        elif holder is None and self.questions is not None and (kind in QUESTIONS or link in self.questions):
            self._unauthenticated.remove(link)
            self.questions.receive(link, kind, payload)
        elif holder is None:
            self._claim(link, kind, payload)
        elif kind is MessageKind.FRAME and holder.number is not None:
            timestamp, frame = messages.unpack_frame(payload)
            if holder.running is not None:
                holder.running.fed(timestamp, frame)
            self.engine.push(holder.number, frame, timestamp)
        elif kind is MessageKind.LOG and holder.log is not None:
            self._receive_log(holder, holder.log, payload)
        elif kind in (MessageKind.CLOSE, MessageKind.DETACH):
            if kind is MessageKind.CLOSE:
                holder.running = None
            link.close()
        else:
            raise ProtocolError("a message that does not belong here")

    def _claim(self, link: Link, kind: MessageKind, payload: bytes) -> None:
        if kind not in (MessageKind.OPEN, MessageKind.REBUILD):
            raise ProtocolError("the first message must open the session")
        try:
            opening = messages.unpack_opening(payload)
            self.holders.check(opening.token)
            if kind is MessageKind.OPEN:
                persona = messages.unpack_open(opening.rest)
                holder = self._take(link, opening)
                self._keep_log(holder, SessionRecorder(persona, self._settings.rebuild_audio_s))
                self._start(holder, lambda: self.engine.open(persona))
            else:
                log = LogReceiver(messages.unpack_rebuild(opening.rest))
                self._await_log(self._take(link, opening), log)
        except (LogRefused, SessionLost) as error:
            self._unauthenticated.reject(link, error)

    def _take(self, link: Link, opening: Opening) -> Holder:
        """Whoever has the token is from now on at the other end of `link`."""
        holder = self.holders.claim(link, opening)
        self._unauthenticated.remove(link)
        self._linked[link] = holder
        return holder

    def _start(self, holder: Holder, begin: Callable[[], int]) -> None:
        """Hands the session to the engine; `begin` gives its number there."""
        try:
            number = begin()
        except EngineFault:
            self._end(holder, SessionLost(FAILED))
            return
        self.holders.opened(holder, number)

    def _await_log(self, holder: Holder, log: LogReceiver) -> None:
        holder.log = log
        self._event_loop.call_later(self._settings.lease_timeout_s, self._give_up_log, holder)

    def _give_up_log(self, holder: Holder) -> None:
        if holder.log is not None:
            self._end(holder, LogRefused("the session log did not come in time"))

    def _receive_log(self, holder: Holder, log: LogReceiver, piece: bytes) -> None:
        whole = log.add(piece)
        if whole is None:
            return
        holder.log = None
        try:
            session = SessionLog.unpack(whole)
        except LogRefused as error:
            self._end(holder, error)
            return
        if holder.held:
            self._keep_log(holder, SessionRecorder.of(session, self._settings.rebuild_audio_s))
        self._rebuilds.add(holder, session)

    def _rebuild(self, holder: Holder, log: SessionLog) -> None:
        self._start(holder, lambda: self.engine.rebuild(log))

    def _lost(self, link: Link) -> None:
        self._unauthenticated.remove(link)
        self.comebacks.lost(link)
        if self.questions is not None:
            self.questions.lost(link)
        holder = self._linked.pop(link, None)
        if holder is None:
            return
        self._detach(holder)
        if holder.number in self.holders.open:
            self.engine.close(holder.number)  # Closed comes when the slot is free
        else:
            self._free(holder)

    # Sessions whose clients may come back

    def _keep_log(self, holder: Holder, recorder: SessionRecorder) -> None:
        if holder.held and self._settings.resume_grace_s:
            holder.running = RunningLog(recorder, holder.generation, holder.held)

    def _detach(self, holder: Holder) -> None:
        running, holder.running = holder.running, None
        if running is not None:
            self.comebacks.keep(holder.request.session, running)

    def _give(self, link: Link, token: bytes) -> None:
        """Somebody has come back: gives the session's log to whoever shows its token."""
        try:
            claim = self.comebacks.read(token)
            for holder in self.holders.open.values():
                if holder.running is not None and holder.request.session == claim.session:
                    self._interrupt(holder, holder.running, claim.counter)
                    break
            self.comebacks.give(link, claim)
        except ResumeRefused as error:
            self._unauthenticated.reject(link, error)
        else:
            self._unauthenticated.remove(link)

    def _interrupt(self, holder: Holder, running: RunningLog, counter: int) -> None:
        """Its client has come back by another way. Raises ResumeRefused for another token than its own."""
        if not running.takes(counter):
            raise ResumeRefused
        self._detach(holder)
        assert holder.link is not None
        holder.link.close(SessionTaken())

    # Events of the engine

    def deliver(self, batch: Batch) -> None:
        """Takes the engine's events."""
        # On the engine's thread: its arrays may be written again by the next tick, so bytes are made here.
        packed = [(event, _pack(event)) for event in batch.events]
        self._event_loop.call_soon_threadsafe(self._dispatch, batch, packed)

    def _dispatch(self, batch: Batch, packed: list[_Packed]) -> None:
        for event, payload in packed:
            match event:
                case Stepped(session) if session in self.holders.open:
                    assert payload is not None
                    self._reply(self.holders.open[session], event, payload)
                case Opened(session) if session in self.holders.open:
                    self._ready(self.holders.open[session], event)
                case Refused(session, error) if session in self.holders.open:
                    self._end(self.holders.pop(session), error)
                case Closed(session) if session in self.holders.open:
                    self._free(self.holders.pop(session))
                case Encoded() if self.questions is not None:
                    self.questions.encoded(event)
                case Faulted():
                    self._fail()
        self._numbers.publish(batch)

    def _ready(self, holder: Holder, event: Opened) -> None:
        assert holder.link is not None
        ready = SlotReady(event.prefill_s, event.frame, event.voice_digest, event.window)
        if holder.running is not None:
            holder.running.recorder.voice_digest = event.voice_digest
            holder.running.ready = True
        holder.link.send(MessageKind.READY, messages.pack_ready(ready))
        self._rebuilds.done(holder)

    def _reply(self, holder: Holder, event: Stepped, payload: bytes) -> None:
        assert holder.link is not None
        if holder.running is not None:
            holder.running.answered(event.timestamp, messages.reply_tokens(payload), event.output.text)
        dropped = holder.link.dropped
        holder.link.send_frame(MessageKind.REPLY, payload)
        self._metrics.add(metrics.FRAMES_DROPPED, holder.link.dropped - dropped, place="link_out")

    def _fail(self) -> None:
        self.accepting = False
        for holder in self.holders.pop_all():
            self._end(holder, SessionLost(FAILED))

    def _end(self, holder: Holder, error: PersonaplexError) -> None:
        """Tells the gateway why, and frees a holder that has no slot of the engine any more."""
        holder.running = None
        if holder.link is not None:
            holder.link.close(error)
        self._free(holder)

    def _free(self, holder: Holder) -> None:
        self.holders.free(holder)
        self._rebuilds.done(holder)


def _pack(event: EngineEvent) -> bytes | None:
    if not isinstance(event, Stepped):
        return None
    said = event.output
    return messages.pack_reply(messages.Reply(said.frame, said.pcm, said.tokens, said.text, event.timestamp))
