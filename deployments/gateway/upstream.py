"""A session's way to the replicas: frames out, replies in, whichever replica holds its slot.

`open` gets the first slot; `send_frame` takes the user's frames from then on. What a replica says becomes
events, given to `emit`, and frames, given to `on_frame`. The session's log is kept as the replies come, so
that another replica can go on with it. Laws:

1. Every frame of the user is kept until it was answered. At most a burst waits for a slot, the newest one.
2. Only the current slot's replies count, each once, in the order of their numbers. A candidate's count from
   the first that nobody gave yet: it is the current slot from then on, and nothing of the old one reaches
   anybody.
3. A current slot that is lost can answer no more, so a candidate takes its place as soon as it is ready. One
   that is only silent is valid until then: if it has caught up before, the search is given up.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from deployments import metrics
from deployments.gateway.failover import LOST, LOST_LIMIT, LOST_WORDS, MOVED, SILENT, Failover, Failovers
from deployments.gateway.leases import Claim, Leases
from deployments.gateway.moves import Moves
from deployments.gateway.recorder import Recording
from deployments.gateway.resumes import Resumes, Taken
from deployments.gateway.silence import SilenceWatch
from deployments.gateway.slot import Connect, Slot, UserFrame
from deployments.gateway.stats import SessionStats
from deployments.gateway.tracing import Trace
from deployments.gateway.transcripts import Transcripts
from deployments.metrics import Metrics
from deployments.wire import messages
from deployments.wire.messages import NOTHING_HELD, Held, LeaseRequest, MessageKind, SlotReady
from deployments.wire.orders import BUSY, ENDED
from personaplex.config import FRAME_SECONDS, Pcm, frames_in
from personaplex.errors import (
    EngineFault,
    LogRefused,
    NoCapacity,
    PersonaplexError,
    ProtocolError,
    SessionLost,
    UnknownVersion,
)
from personaplex.persona import Persona
from personaplex.record.format import Row
from personaplex.session.core import Limits
from personaplex.session.events import (
    AgentText,
    Event,
    Failed,
    LeaseGranted,
    Queued,
    Ready,
    SessionNotice,
)
from personaplex.sessionlog import SessionRecorder
from personaplex.tokenlog import TokenLog

logger = logging.getLogger(__name__)

STALE_S = 2 * FRAME_SECONDS  # a frame that waited longer for its slot is late through no fault of its sender
UNANSWERED_LIMIT = 1_024  # frames: more than the queues between a gateway and an engine hold
CAUGHT_UP = 2  # frames without an answer, of a replica that keeps up
SETTLED_FRAMES = 25  # answered: whatever lost the replica before, the session is not to blame
# What clients are told that asked for status.
INTERRUPTED, CONTINUED, WINDOW, RECONNECT = "interrupted", "continued", "window", "reconnect"
TEXTS_KEPT = 128  # pieces of text; more than a client can have missed
LEAVE_TIMEOUT_S = 2.0  # for a replica to say that a slot is free


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
    transcripts: Transcripts | None = None  # of what users say; None with transcription=off
    failovers: Failovers = field(default_factory=Failovers)
    resumes: Resumes | None = None  # None where no client can come back
    moves: Moves = field(default_factory=Moves)
    wait: Callable[[str, int], float | None] = lambda session, place: None  # of a session at its place
    live: set[str] = field(default_factory=set)  # names of the sessions past their handshake
    ending: set[asyncio.Future[None]] = field(default_factory=set)  # sessions and slots that are wound up


class Upstream:
    """Made with its session. `stop` ends the media, `close` the links, `release` gives the slots back."""

    def __init__(
        self,
        session: str,
        services: Services,
        stats: SessionStats,
        emit: Callable[[Event], None],
        on_frame: Callable[[int, Pcm, bool], None],
        recording: Recording | None = None,
        *,
        resumable: bool = False,
        on_heard: Callable[[int, Pcm], None] | None = None,
    ) -> None:
        """`on_frame(number, pcm, stale)` takes the agent's frames; `stale` ones answer frames that waited for
        the slot. `resumable`: the client may come back after its connection was lost, if the service lets
        it. `on_heard(number, pcm)` gets each frame of the user once the agent's frame of that number has
        answered it; without, nobody transcribes the session."""
        self._session, self._services, self._stats, self._emit = session, services, stats, emit
        self._on_frame = on_frame
        self._metrics = services.metrics
        self._recording = recording
        self._on_heard = on_heard
        self._recorder: SessionRecorder | None = None
        self._generations = itertools.count()
        self._resumes = services.resumes if resumable else None
        self._held = NOTHING_HELD
        self._taken: Taken | None = None  # what the session goes on from, until it does
        self._texts: deque[tuple[int, str]] = deque(maxlen=TEXTS_KEPT)
        self._current: Slot | None = None
        self._failover: Failover | None = None
        self._search: asyncio.Future[None] | None = None
        self._measured: Failover | None = None  # took over, but has not caught up yet
        self._losses = 0  # since the session last said anything
        self._details: dict[str, Any] = {}
        self._was_ready = self._interrupted = self._stopped = self._asked_over = False
        self._announced: Slot | None = None  # whose token the client was sent
        self._unanswered: deque[UserFrame] = deque()
        self._timestamp = 0
        self._burst_frames = frames_in(services.limits.burst_s)
        self._stale = 0  # replies before this number answer frames that waited for the slot
        self._settled = 0  # from this number on
        self._window = 0  # of the first frame that no longer knows the beginning, until the client is told
        self._watch = SilenceWatch(services.failovers.after_s, self._owed, self._on_silent)

    @property
    def log(self) -> TokenLog:
        """The session's tokens so far."""
        return TokenLog() if self._recorder is None else self._recorder.tokens

    async def open(self, persona: Persona, claim: Claim) -> None:
        """Returns once the persona was sent to the replica; Ready follows. Raises NoCapacity, OSError."""
        self._metrics.observe(metrics.PROMPT_CHARACTERS, len(persona.text_prompt))
        self._recorder = SessionRecorder(persona, self._services.failovers.audio_s)
        if self._resumes is not None:
            self._held = Held(0)
        slot = await self._get_slot(persona, claim)
        slot.open(persona)

    async def go_on(self, taken: Taken, heard: int, claim: Claim) -> None:
        """`open` for a session whose client has come back, after it had heard `heard` frames of the agent.
        Raises NoCapacity, OSError, LogRefused; then `taken` was given back."""
        log = taken.log
        self._recorder = SessionRecorder.of(log, self._services.failovers.audio_s)
        self._generations = itertools.count(taken.generation + 1)
        self._held = Held(taken.counter, used=True)
        self._taken = taken
        self._texts.extend(taken.texts)
        lost = [text for frame, text in taken.texts if frame >= heard]
        self._details["resumed"] = {
            "frame": log.frames,
            "lost_frames": max(0, log.frames - heard),
            "lost_text": "".join(lost),
        }
        try:
            slot = await self._get_slot(log.persona, claim)
            packed = await asyncio.to_thread(log.pack)
            slot.rebuild(packed, log.frames)
        except BaseException:
            taken.give_back()
            raise

    async def _get_slot(self, persona: Persona, claim: Claim) -> Slot:
        self._details |= {
            "session": self._session,
            "voice": persona.voice,
            "text_seed": persona.sampling.text_seed,
            "audio_seed": persona.sampling.audio_seed,
        }
        if self._recording is not None:
            self._details["recorded"] = True
        if self._on_heard is not None:
            self._details["transcription"] = True
        try:
            slot = await self._join(claim)
        except OSError:  # the replica has just ended or is out of reach; another one may do better
            claim = await self._services.leases.claim(LeaseRequest.of(self._session, persona))
            slot = await self._join(claim)
        self._stats.note(replica=slot.replica, prompt_characters=len(persona.text_prompt))
        self._metrics.add(metrics.SESSIONS_ADMITTED)
        self._emit(LeaseGranted())
        return slot

    @property
    def replica(self) -> str:
        """Where the session goes on, "" before it does and once it has ended."""
        ready = self._was_ready and not self._stopped and self._current is not None
        return self._current.replica if ready and self._current is not None else ""

    @property
    def frames(self) -> int:
        """Answered so far."""
        return len(self.log)

    @property
    def session(self) -> str:
        """Its name."""
        return self._session

    def ask_over(self) -> bool:
        """Asks the client to come back by another gateway; False for one that cannot, or was asked before."""
        if self._resumes is None or self._asked_over or not self.replica:
            return False
        self._asked_over = True
        self._emit(SessionNotice(RECONNECT))
        return True

    async def move(self) -> str:
        """Brings the session to another replica while it goes on at its own; MOVED, or why it stayed."""
        if not self.replica:
            return ENDED
        if self._failover is not None:
            return BUSY
        failover = self._begin_failover(MOVED)
        assert self._search is not None
        await asyncio.wait({self._search})
        return MOVED if failover.continued else failover.outcome

    def record(self, recording: Recording) -> None:
        """What happens goes to `recording` too, from now on; before `open`."""
        self._recording = recording

    def send_frame(self, frame: Pcm) -> None:
        """Sends one frame of the user; while no slot is ready the newest burst is kept for one."""
        if self._held.used and self._was_ready and self._current is not None:
            self._held = Held(self._current.generation)  # it is heard, so it has got the new token
        waiting = UserFrame(self._next_timestamp(), time.monotonic(), frame)
        self._unanswered.append(waiting)
        ready = [slot for slot in self._slots() if slot.ready and not slot.ended]
        while len(self._unanswered) > (UNANSWERED_LIMIT if ready else self._burst_frames):
            self._unanswered.popleft()
            self._metrics.add(metrics.FRAMES_DROPPED, 0 if ready else 1, place="early")
        for slot in ready:
            dropped = slot.dropped
            slot.send_frame(waiting)
            self._metrics.add(metrics.FRAMES_DROPPED, slot.dropped - dropped, place="link_in")
        if ready and len(self._unanswered) == 1:
            self._watch.asked()

    def stop(self) -> None:
        """Stops both directions; later messages are ignored."""
        self._stopped = True
        self._services.moves.remove(self)
        self._watch.stop()
        if self._search is not None:
            self._search.cancel()

    def detach(self) -> None:
        """As `close`, but the client may come back: the session's log is kept, here and by its replica."""
        self.stop()
        if self._resumes is None or self._recorder is None or not len(self.log) or self._current is None:
            return
        with contextlib.suppress(LogRefused):  # the sound of its last frame is not known
            log, generation = self._recorder.log(), self._current.generation
            self._resumes.keep(self._session, log, generation, self._held.generation, self._texts)
        self._current.detach()

    def close(self) -> None:
        """Closes the links, if there are any. Idempotent."""
        self.stop()
        if self._taken is not None:
            self._taken.give_back()
            self._taken = None
            self._metrics.add(metrics.RESUMES, outcome="failed")
        for slot in self._slots():
            slot.close()

    async def release(self, timeout_s: float) -> None:
        """Gives the slot back, once the replica says that it is free or did not for `timeout_s`."""
        if self._search is not None:
            await asyncio.wait({self._search})
        if self._current is not None:
            await self._current.release(timeout_s)

    # The way to a slot

    async def _join(self, claim: Claim) -> Slot:
        """A lease and the link to its replica. Raises NoCapacity, OSError once the lease is given back."""
        self._current = slot = self._make_slot()
        await slot.join(claim, self._queue)
        self._services.changed()
        self._stats.phase("queue" if self._stats.queued else "lease", time.monotonic() - claim.began)
        began = time.monotonic()
        await slot.connect()
        self._stats.phase("connect", time.monotonic() - began)
        return slot

    def _make_slot(self) -> Slot:
        return Slot(
            next(self._generations),
            self._services.connect,
            self._services.connect_timeout_s,
            self._burst_frames,
            self._on_message,
            self._on_end,
            self._held,
        )

    def _queue(self, place: int) -> None:
        self._stats.queued = True
        self._services.changed()
        self._emit(Queued(place, self._services.wait(self._session, place)))

    def _slots(self) -> list[Slot]:
        """The current slot and the candidate, as far as there are any."""
        candidate = None if self._failover is None else self._failover.candidate
        return [slot for slot in (self._current, candidate) if slot is not None]

    # What the replicas say

    def _on_message(self, slot: Slot, kind: MessageKind, payload: bytes) -> None:
        if self._stopped or slot not in self._slots():
            return
        if kind is MessageKind.REPLY:
            self._receive_reply(slot, messages.unpack_reply(payload))
        else:
            self._receive_ready(slot, messages.unpack_ready(payload))

    def _receive_ready(self, slot: Slot, ready: SlotReady) -> None:
        if slot.ready or ready.frame != slot.frame:
            raise ProtocolError("a slot that is ready for something else")
        assert self._recorder is not None
        try:
            heard = self._recorder.sound_since(ready.frame)
        except LogRefused as error:
            slot.close()
            self._on_end(slot, NoCapacity(str(error)))
            return
        self._recorder.voice_digest = ready.voice_digest
        if not self._was_ready and ready.window > 0 and ready.frame <= ready.window:
            self._window = ready.window
        if self._failover is not None:
            self._failover.ready()
        if not self._was_ready:
            self._was_ready = True
            self._stats.phase("prefill", ready.prefill_s)
            if self._taken is not None:
                self._taken.confirm()
                self._taken = None
                self._metrics.add(metrics.RESUMES, outcome="continued")
            self._announced = slot
            self._emit(Ready({**self._details, **self._ticket(slot)}))
            self._services.moves.add(self)
        self._feed(slot, heard)

    def _feed(self, slot: Slot, heard: list[Pcm]) -> None:
        """Sends a slot that has just become ready what the user said since, answered elsewhere or not."""
        now = time.monotonic()
        again = [UserFrame(0, now, pcm) for pcm in heard]
        late = sum(now - frame.arrived > STALE_S for frame in self._unanswered)
        self._stale = len(self.log) + late
        slot.begin([*again, *self._unanswered])
        candidate = self._failover is not None and slot is self._failover.candidate
        assert self._current is not None
        if candidate and (self._current.ended or not (again or self._unanswered)):
            self._take_over(slot)
        self._watch.restart()

    def _receive_reply(self, slot: Slot, reply: messages.Reply) -> None:
        slot.replied()
        number = len(self.log)
        if reply.frame < number:  # another slot was first
            self._switch_when_level(slot, reply.frame, number)
            return
        if slot is not self._current:
            self._take_over(slot)
        if reply.frame != number or not slot.ready:
            raise ProtocolError("a reply out of order")
        assert self._recorder is not None
        frame = self._take_answered(reply.timestamp)
        self._recorder.answered(None if frame is None else frame.pcm, reply.tokens)
        self._watch.heard()
        latency_s = ((_micros() - reply.timestamp) % 2**32) / 1e6
        self._record(reply, latency_s)
        self._on_frame(reply.frame, reply.pcm, reply.frame < self._stale)
        if self._on_heard is not None and frame is not None:
            self._on_heard(reply.frame, frame.pcm)
        if reply.frame % metrics.SAMPLED == 0:
            self._metrics.observe(metrics.FRAME_SECONDS, latency_s)
        if reply.text:
            self._texts.append((reply.frame, reply.text))
            self._emit(AgentText(reply.text))
        if self._losses and reply.frame >= self._settled:
            self._losses = 0
        if 0 < self._window <= reply.frame:
            self._window = 0
            self._emit(SessionNotice(WINDOW, {"frame": reply.frame}))
        if self._interrupted or self._measured is not None:
            self._notice_progress(frame)

    def _switch_when_level(self, slot: Slot, frame: int, number: int) -> None:
        """A session that is being moved leaves its old replica as soon as the new one has said as much."""
        moving = self._failover is not None and self._failover.cause == MOVED
        if moving and slot is not self._current and frame == number - 1:
            self._take_over(slot)

    def _take_answered(self, timestamp: int) -> UserFrame | None:
        """The frame that a reply answers; those before it were dropped on their way, and counted there."""
        for place, frame in enumerate(self._unanswered):
            if frame.timestamp == timestamp:
                for _ in range(place + 1):
                    self._unanswered.popleft()
                return frame
        return None

    def _record(self, reply: messages.Reply, latency_s: float) -> None:
        if self._recording is not None:
            row = Row(reply.frame, time.monotonic(), latency_s, reply.tokens, forced=reply.frame == 0)
            self._recording.frame(row, reply.text)

    # Replicas that are lost

    def _owed(self) -> bool:
        current = self._current
        return bool(self._unanswered) and current is not None and current.ready and not current.ended

    def _on_silent(self) -> None:
        if self._failover is None and not self._stopped:
            assert self._current is not None
            self._services.failovers.suspects.add(self._current.replica)
            self._begin_failover(SILENT)

    def _on_end(self, slot: Slot, error: PersonaplexError | None) -> None:
        if self._stopped:
            return
        if self._failover is not None and slot is self._failover.candidate:
            self._failover.ended(error)
        elif slot is self._current:
            if error is not None and not isinstance(error, SessionLost | EngineFault | UnknownVersion):
                self._emit(Failed(error))
                return
            self._services.failovers.suspects.add(slot.replica)
            self._lose(error)

    def _lose(self, error: PersonaplexError | None) -> None:
        """The current slot is gone."""
        self._losses += 1
        if self._losses > LOST_LIMIT:
            self._emit(Failed(error or SessionLost(LOST_WORDS)))
        elif self._failover is None:
            self._begin_failover(LOST)
        elif self._failover.candidate is not None and self._failover.candidate.ready:
            self._take_over(self._failover.candidate)

    def _begin_failover(self, cause: str) -> Failover:
        assert self._recorder is not None
        assert self._current is not None
        now = time.monotonic()
        self._failover = Failover(
            self._session,
            cause,
            self._recorder,
            self._services.failovers,
            self._services.leases,
            self._make_slot,
            self._leave,
            lost=self._current,
            since=self._watch.since if self._unanswered else now,
            losses=self._losses,
        )
        self._search = asyncio.ensure_future(self._run(self._failover))
        if self._was_ready and not self._interrupted and cause != MOVED:
            self._interrupted = True
            self._emit(SessionNotice(INTERRUPTED))
        return self._failover

    async def _run(self, failover: Failover) -> None:
        try:
            await failover.run()
        except PersonaplexError as error:
            self._fail(failover, error)
        except Exception:  # a task root: the client is told, the log has the reason
            logger.exception("session %s: its failover failed", self._session)
            self._fail(failover, SessionLost(LOST_WORDS))

    def _fail(self, failover: Failover, error: PersonaplexError) -> None:
        """No other replica can be had: the end, unless the old one may still answer."""
        assert self._current is not None
        self._failover = None
        failover.outcome = _outcome(error)
        if not failover.stopped:
            self._count(failover, failover.outcome)
        if self._current.ended:
            self._emit(Failed(error))
        else:
            self._watch.restart()

    def _take_over(self, slot: Slot) -> None:
        """`slot`, the candidate, is the session's from now on."""
        assert self._failover is not None
        assert self._current is not None
        failover, old = self._failover, self._current
        self._current, self._failover = slot, None
        self._measured = None if failover.cause == MOVED else failover
        self._losses, self._settled = failover.losses, len(self.log) + SETTLED_FRAMES
        failover.taken()
        self._leave(old)
        self._count(failover, "continued")
        phases = {f"{name}_s": round(seconds, 4) for name, seconds in failover.times.phases().items()}
        self._stats.note(replica=slot.replica, generation=slot.generation)
        fields = {"session": self._session, "cause": failover.cause, "from": old.replica, **phases}
        fields |= {"to": slot.replica, "generation": slot.generation, "frame": len(self.log)}
        logger.info("session %s goes on at another replica", self._session, extra={"fields": fields})
        self._continue(slot, **phases)

    def _count(self, failover: Failover, outcome: str) -> None:
        self._metrics.add(metrics.MOVES if failover.cause == MOVED else metrics.FAILOVERS, outcome=outcome)

    def _continue(self, slot: Slot, **details: Any) -> None:
        if self._interrupted or slot is not self._announced:
            self._interrupted, self._announced = False, slot
            told = {"generation": slot.generation, "frame": len(self.log), **details, **self._ticket(slot)}
            self._emit(SessionNotice(CONTINUED, told))

    def _ticket(self, slot: Slot) -> dict[str, Any]:
        """What the client can come back with."""
        if self._resumes is None:
            return {}
        token = self._resumes.token(self._session, slot.generation)
        return {"resume": token, "grace_s": self._resumes.grace_s}

    def _notice_progress(self, frame: UserFrame | None) -> None:
        """After a reply of a silent replica, or of a new one that has not caught up."""
        if self._interrupted and len(self._unanswered) <= CAUGHT_UP:
            self._withdraw()
        elif self._measured is not None:
            self._measure(self._measured, frame)

    def _withdraw(self) -> None:
        """The silent replica answers again and has caught up."""
        assert self._current is not None
        if self._failover is not None and self._search is not None:
            self._failover = None
            self._search.cancel()
            self._metrics.add(metrics.FAILOVERS, outcome="recovered")
        self._services.failovers.suspects.clear(self._current.replica)
        self._continue(self._current)

    def _measure(self, failover: Failover, frame: UserFrame | None) -> None:
        now, times = time.monotonic(), failover.times
        if len(self.log) == self._settled - SETTLED_FRAMES + 1:
            phases = {**times.phases(), "answer": now - times.ready, "gap": now - times.answered}
            for phase, seconds in phases.items():
                self._metrics.observe(metrics.FAILOVER_SECONDS, seconds, phase=phase)
        if frame is None or frame.arrived >= times.ready or not self._unanswered:
            self._measured = None
            self._metrics.observe(metrics.FAILOVER_SECONDS, now - times.ready, phase="catch_up")

    def _leave(self, slot: Slot) -> None:
        """Gives a slot back without keeping the session waiting."""
        slot.close()
        leaving = asyncio.ensure_future(slot.release(LEAVE_TIMEOUT_S))
        self._services.ending.add(leaving)
        leaving.add_done_callback(self._services.ending.discard)

    def _next_timestamp(self) -> int:
        self._timestamp = max(_micros(), self._timestamp + 1)
        return self._timestamp % 2**32


def _outcome(error: PersonaplexError) -> str:
    """Of a failover that found no replica."""
    if isinstance(error, NoCapacity):
        return "no_capacity"
    return "refused" if isinstance(error, LogRefused) else "failed"


def _micros() -> int:
    return time.monotonic_ns() // 1_000
