"""The one thread that owns an engine, and the only access to it from other threads.

Contract: `open`, `rebuild`, `encode`, `push` and `close` may be called from any thread and never wait for the
engine. The thread sleeps until something arrives or a time it chose itself, plans a tick (`schedule.py`),
runs it, then runs at most one chunk of a waiting prompt, of a rebuild or of a recording that becomes a voice,
in turns, so that a joining session never delays the others by more than that. While others are live, rebuilds
and recordings get at most `rebuild_share` of the time.
All events go through the one `deliver` callable, once per tick or prompt chunk, on the engine's thread; a
session's slot is closed only between ticks. The first error of the engine that is not a typed refusal ends
the thread: a broken device is never used again.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from personaplex.config import FRAME_SECONDS, Pcm
from personaplex.engine.interface import Output, PackedVoice, Slot, Stepper, Usage, VoiceEncoding
from personaplex.engine.schedule import FrameQueue, PendingFrame, TickPlan, plan
from personaplex.errors import EngineFault, NoCapacity, PersonaplexError
from personaplex.persona import Persona
from personaplex.sessionlog import SessionLog

logger = logging.getLogger(__name__)

RECORDINGS = 4  # that may wait to become voices
USAGE_TICKS = 25  # between two readings of the engine's usage, while no session opens or closes


@dataclass(frozen=True)
class Opened:
    """The session's slot is live; `prefill_s` is the time since it was opened.

    `frame` is the number of its next output: 0, or where a rebuilt session goes on. `voice_digest`: see
    `SessionLog`. `window`: see `Stepper.window`.
    """

    session: int
    prefill_s: float
    frame: int = 0
    voice_digest: str = ""
    window: int = 0


@dataclass(frozen=True)
class Stepped:
    """One agent frame, in answer to the user's frame pushed with `timestamp`."""

    session: int
    output: Output
    timestamp: int


@dataclass(frozen=True)
class Refused:
    """The engine refused the session; it holds no slot."""

    session: int
    error: PersonaplexError


@dataclass(frozen=True)
class Encoded:
    """A recording has become a voice; or `error` says why it has not."""

    number: int
    voice: PackedVoice | None = None
    error: PersonaplexError | None = None


@dataclass(frozen=True)
class Closed:
    """The session's slot is free again; its last event."""

    session: int


@dataclass(frozen=True)
class Faulted:
    """The engine cannot go on; no session gets another event."""

    error: EngineFault


EngineEvent = Opened | Stepped | Refused | Encoded | Closed | Faulted
Chunk = Literal["prefill", "rebuild", "voice"]


@dataclass(frozen=True)
class Batch:
    """The events of one piece of work, how long it took and over how many slots it ran."""

    work: Literal["tick", "prefill", "rebuild", "voice", "control"]
    events: tuple[EngineEvent, ...]
    seconds: float = 0.0
    slots: int = 0


@dataclass
class Counters:
    """Totals since start; written by the loop, read from any thread."""

    frames_dropped: int = 0  # by a full inbox
    frames_late: int = 0  # answered more than one frame after they were pushed
    frames_waiting: int = 0  # in all inboxes when the last tick began; not a total
    ticks: int = 0
    ticks_late: int = 0  # longer than one frame


@dataclass
class _Session:
    opened: float
    queue: FrameQueue
    persona: Persona | None = None  # of a new session, until it is admitted
    log: SessionLog | None = None  # of one that goes on, until it is admitted
    frame: int | None = None  # where a session goes on that is rebuilt
    slot: Slot | None = None


@dataclass
class _Work:
    """What the thread does next, taken under the lock."""

    opens: list[_Session]
    closes: list[_Session]
    step: list[tuple[_Session, PendingFrame]] = field(default_factory=list)
    chunk: Chunk | None = None


@dataclass
class _Recording:
    """A recording that waits to become a voice, or becomes one."""

    number: int
    pcm: Pcm
    encoding: VoiceEncoding | None = None


class EngineLoop:
    """Runs the engine that `make` builds, in the thread that owns it, until `stop` or its first fault."""

    def __init__(
        self,
        make: Callable[[], Stepper],
        deliver: Callable[[Batch], None],
        *,
        gather_s: float,
        inbox_limit: int,
        rebuild_share: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`gather_s`: see `schedule.plan`. `inbox_limit`: frames a session may send at once; of more
        that wait the oldest is dropped and counted. `rebuild_share`, above 0 and at most 1: see the module.
        `deliver` must not block and must not raise."""
        assert 0 < rebuild_share <= 1, "a share of the time"
        self.counters = Counters()
        self.usage = Usage()  # of the engine; written by the loop, read from any thread
        self._make, self._deliver, self._clock = make, deliver, clock
        self._gather_s, self._inbox_limit, self._rebuild_share = gather_s, inbox_limit, rebuild_share
        self._numbers = itertools.count()
        self._started: Future[int] = Future()
        self._wake = threading.Condition()
        # Everything below is guarded by _wake.
        self._sessions: dict[int, _Session] = {}
        self._opens: list[_Session] = []
        self._closes: list[_Session] = []
        self._recordings: deque[_Recording] = deque()
        self._waiting = {"prefill": 0, "rebuild": 0}  # sessions with a slot that is not live yet
        self._rebuild_at = 0.0  # when a rebuild, or a voice, may run again beside live sessions
        self._last_chunk: Chunk = "voice"
        self._silent = 0  # live sessions without a frame
        self._gathering = False  # asleep only to let more frames join the tick
        self._stopping = False
        self._fault: EngineFault | None = None
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> Future[int]:
        """Starts the thread. The future gives the number of slots once the engine is built and warm, or the
        error that prevented it; it cannot be cancelled."""
        self._started.set_running_or_notify_cancel()
        self._thread.start()
        return self._started

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the thread after its current work; sessions still open get no further event."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def open(self, persona: Persona) -> int:
        """A new session's number; Opened or Refused follows. Raises EngineFault when the engine has ended."""
        return self._add(persona, None)

    def encode(self, pcm: Pcm) -> int:
        """Makes a voice of a recording, see `Stepper.encode_voice`; Encoded with this number follows.

        Raises EngineFault when the engine has ended, NoCapacity when RECORDINGS wait already.
        """
        with self._wake:
            self._raise_if_ended()
            if len(self._recordings) >= RECORDINGS:
                raise NoCapacity("too many recordings wait to become voices")
            number = next(self._numbers)
            self._recordings.append(_Recording(number, pcm))
            self._wake.notify()
        return number

    def rebuild(self, log: SessionLog) -> int:
        """`open` for a session that goes on from its log; Opened says at which frame.

        Frames pushed before that wait as in any session.
        """
        return self._add(None, log)

    def _add(self, persona: Persona | None, log: SessionLog | None) -> int:
        with self._wake:
            self._raise_if_ended()
            number = next(self._numbers)
            frame = None if log is None else log.frames
            queue = FrameQueue(number, self._inbox_limit)
            session = _Session(self._clock(), queue, persona, log, frame)
            self._sessions[number] = session
            self._opens.append(session)
            self._wake.notify()
        return number

    def push(self, session: int, frame: Pcm, timestamp: int = 0) -> None:
        """Hands over one user frame, float32 [1920], not written to again; its reply carries `timestamp`.
        Without effect after `close`."""
        with self._wake:
            known = self._sessions.get(session)
            if known is None:
                return
            queue = known.queue
            was_empty = not queue.frames
            self.counters.frames_dropped += queue.put(PendingFrame(frame, self._clock(), timestamp))
            if queue.live and was_empty:
                self._silent -= 1
                if self._silent == 0 or not self._gathering:
                    self._wake.notify()

    def close(self, session: int) -> None:
        """Ends a session; Closed follows once its slot is free. Idempotent."""
        with self._wake:
            known = self._sessions.pop(session, None)
            if known is None:
                return
            if known.queue.live and not known.queue.frames:
                self._silent -= 1
            self._closes.append(known)
            self._wake.notify()

    def check(self, stall_limit_s: float) -> None:
        """Raises EngineFault when the engine has ended or one tick or chunk takes longer than the limit."""
        with self._wake:
            self._raise_if_ended()
            busy = 0.0 if self._busy_since is None else self._clock() - self._busy_since
        if busy > stall_limit_s and self._started.done():
            raise EngineFault(f"the engine has not answered for {busy:.0f} s")

    def _raise_if_ended(self) -> None:
        if self._fault is not None:
            raise self._fault
        if self._stopping or (self._started.done() and not self._thread.is_alive()):
            raise EngineFault("the engine has stopped")

    def _run(self) -> None:
        try:
            engine = self._make()
        except Exception as error:  # a task root: the future of `start` carries the error
            logger.exception("the engine could not start")
            self._started.set_exception(error)
            return
        self._started.set_result(engine.slots)
        slots: dict[Slot, _Session] = {}
        try:
            while (work := self._next()) is not None:
                self._pass(engine, slots, work)
        except Exception as error:  # a task root: the device may be broken, so every session ends
            logger.exception("the engine failed")
            fault = error if isinstance(error, EngineFault) else EngineFault("the engine failed")
            with self._wake:
                self._fault = fault
            self._deliver(Batch("control", (Faulted(fault),)))

    def _next(self) -> _Work | None:
        """Sleeps until there is work; None at the end."""
        with self._wake:
            while True:
                if self._stopping:
                    return None
                now = self._clock()
                found = plan((session.queue for session in self._sessions.values()), now, self._gather_s)
                chunk = self._next_chunk(now)
                if self._opens or self._closes or chunk or found.step:
                    self._busy_since = now
                    return self._take(found, chunk, now)
                self._busy_since = None
                self._gathering = found.again_at is not None and self._silent > 0
                times = [self._rebuild_at] if self._waiting["rebuild"] or self._recordings else []
                times += [] if found.again_at is None else [found.again_at]
                self._wake.wait(max(0.0, min(times) - now) if times else None)
                self._gathering = False

    def _next_chunk(self, now: float) -> Chunk | None:
        """Which kind of chunk may run now; of several the one whose last turn was longest ago."""
        waiting: dict[Chunk, bool] = {
            "prefill": self._waiting["prefill"] > 0,
            "rebuild": self._waiting["rebuild"] > 0,
            "voice": bool(self._recordings),
        }
        if (waiting["rebuild"] or waiting["voice"]) and now < self._rebuild_at:
            beside = not any(one.queue.live for one in self._sessions.values())
            waiting["rebuild"], waiting["voice"] = (waiting[kind] and beside for kind in ("rebuild", "voice"))
        kinds = list(waiting)
        after = kinds.index(self._last_chunk) + 1
        return next((kind for kind in kinds[after:] + kinds[:after] if waiting[kind]), None)

    def _take(self, found: TickPlan, chunk: Chunk | None, now: float) -> _Work:
        work = _Work(self._opens, self._closes, chunk=chunk)
        self._last_chunk = chunk or self._last_chunk
        self._opens, self._closes = [], []
        for queue in found.step:
            work.step.append((self._sessions[queue.session], queue.take(now)))
            self._silent += not queue.frames
        if found.step:
            self.counters.frames_waiting = sum(len(one.queue.frames) for one in self._sessions.values())
        return work

    def _pass(self, engine: Stepper, slots: dict[Slot, _Session], work: _Work) -> None:
        if work.opens or work.closes:
            events = [self._open(engine, slots, session) for session in work.opens]
            events += [self._close(engine, slots, session) for session in work.closes]
            self._deliver(Batch("control", tuple(event for event in events if event is not None)))
        if work.step:
            self._tick(engine, slots, work)
        if work.chunk:
            self._run_chunk(engine, slots, work.chunk)
        if work.opens or work.closes or work.chunk or self.counters.ticks % USAGE_TICKS == 0:
            self.usage = engine.usage

    def _open(self, engine: Stepper, slots: dict[Slot, _Session], session: _Session) -> EngineEvent | None:
        try:
            if session.log is not None:
                session.slot = engine.admit_rebuild(session.log)
            else:
                assert session.persona is not None
                session.slot = engine.admit(session.persona)
        except EngineFault:
            raise
        except PersonaplexError as error:
            with self._wake:
                self._sessions.pop(session.queue.session, None)
            return Refused(session.queue.session, error)
        session.persona = session.log = None
        slots[session.slot] = session
        with self._wake:
            self._waiting[_chunk_of(session)] += 1
        return None

    def _close(self, engine: Stepper, slots: dict[Slot, _Session], session: _Session) -> EngineEvent:
        if session.slot is not None:
            engine.close(session.slot)
            del slots[session.slot]
            with self._wake:
                self._waiting[_chunk_of(session)] -= not session.queue.live
        return Closed(session.queue.session)

    def _tick(self, engine: Stepper, slots: dict[Slot, _Session], work: _Work) -> None:
        began = self._clock()
        fed: dict[int, PendingFrame] = {}
        for session, frame in work.step:
            assert session.slot is not None
            engine.feed(session.slot, frame.pcm)
            fed[session.queue.session] = frame
        outputs = engine.step()
        now = self._clock()
        events: list[EngineEvent] = []
        for output in outputs:
            number = slots[output.slot].queue.session
            self.counters.frames_late += now - fed[number].arrived > FRAME_SECONDS
            events.append(Stepped(number, output, fed[number].timestamp))
        self.counters.ticks += 1
        self.counters.ticks_late += now - began > FRAME_SECONDS
        self._deliver(Batch("tick", tuple(events), now - began, len(work.step)))

    def _encode_chunk(self, engine: Stepper) -> None:
        began, job = self._clock(), self._recordings[0]
        done: Encoded | None = None
        try:
            if job.encoding is None:
                job.encoding = engine.encode_voice(job.pcm)
            voice = job.encoding.run_chunk()
            done = None if voice is None else Encoded(job.number, voice)
        except EngineFault:
            raise
        except PersonaplexError as error:
            done = Encoded(job.number, error=error)
        now = self._clock()
        with self._wake:
            self._rebuild_at = began + (now - began) / self._rebuild_share
            if done is not None:
                self._recordings.popleft()
        self._deliver(Batch("voice", () if done is None else (done,), now - began, 1))

    def _run_chunk(self, engine: Stepper, slots: dict[Slot, _Session], kind: Chunk) -> None:
        if kind == "voice":
            self._encode_chunk(engine)
            return
        began = self._clock()
        slot = engine.prefill() if kind == "prefill" else engine.rebuild_chunk()
        now = self._clock()
        events: tuple[EngineEvent, ...] = ()
        with self._wake:
            if kind == "rebuild":
                self._rebuild_at = began + (now - began) / self._rebuild_share
            if slot is not None:
                session = slots[slot]
                self._waiting[kind] -= 1
                session.queue.live = True
                if session.queue.session in self._sessions:
                    self._silent += not session.queue.frames
        if slot is not None:
            number, frame = session.queue.session, session.frame or 0
            digest, window = engine.voice_digest(slot), engine.window(slot)
            events = (Opened(number, now - session.opened, frame, digest, window),)
        self._deliver(Batch(kind, events, now - began, 1))


def _chunk_of(session: _Session) -> Literal["prefill", "rebuild"]:
    return "prefill" if session.frame is None else "rebuild"
