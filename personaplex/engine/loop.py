"""The one thread that owns an engine, and the only access to it from other threads.

Contract: `open`, `rebuild`, `encode`, `push` and `close` may be called from any thread and never wait for the
engine. The thread sleeps until something arrives or a time it chose itself, plans a tick (`backlog.py`,
`schedule.py`), runs it, then runs at most one chunk of a waiting prompt, of a rebuild or of a recording that
becomes a voice, in turns, so that a joining session never delays the others by more than that. While others
are live, rebuilds and recordings get at most `rebuild_share` of the time.
All events go through the one `deliver` callable, once per tick or prompt chunk, on the engine's thread; a
session's slot is closed only between ticks. The first error of the engine that is not a typed refusal ends
the thread: a broken device is never used again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from personaplex.config import FRAME_SECONDS, Pcm
from personaplex.engine.backlog import Backlog, LoopSession, VoiceJob, Work
from personaplex.engine.events import (
    Batch,
    Chunk,
    Closed,
    Counters,
    Encoded,
    EngineEvent,
    Faulted,
    Opened,
    Refused,
    Stepped,
)
from personaplex.engine.interface import Slot, Stepper, Usage
from personaplex.engine.schedule import PendingFrame
from personaplex.errors import EngineFault, PersonaplexError
from personaplex.persona import Persona
from personaplex.sessionlog import SessionLog

logger = logging.getLogger(__name__)

USAGE_TICKS = 25  # between two readings of the engine's usage, while no session opens or closes


class EngineLoop:
    """Runs the engine that `make` builds, in the thread that owns it, until `stop` or its first fault."""

    def __init__(
        self,
        make: Callable[[], Stepper],
        deliver: Callable[[Batch], None],
        *,
        gather_s: float,
        inbox_limit: int,
        rebuild_share: float = 0.9,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`gather_s`: see `schedule.plan`. `inbox_limit`: frames a session may send at once; of more
        that wait the oldest is dropped and counted. `rebuild_share`, above 0 and at most 1: see the module.
        `deliver` must not block and must not raise."""
        assert 0 < rebuild_share <= 1, "a share of the time"
        self.counters = Counters()
        self.usage = Usage()  # of the engine; written by the loop, read from any thread
        self._make, self._deliver, self._clock = make, deliver, clock
        self._rebuild_share = rebuild_share
        self._backlog = Backlog(self.counters, gather_s=gather_s, inbox_limit=inbox_limit, clock=clock)
        self._started: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> Future[int]:
        """Starts the thread. The future gives the number of slots once the engine is built and warm, or the
        error that prevented it; it cannot be cancelled."""
        self._started.set_running_or_notify_cancel()
        self._thread.start()
        return self._started

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the thread after its current work; sessions still open get no further event."""
        self._backlog.end()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout_s)

    def open(self, persona: Persona) -> int:
        """A new session's number; Opened or Refused follows. Raises EngineFault when the engine has ended."""
        return self._backlog.add(persona, None)

    def encode(self, pcm: Pcm) -> int:
        """Makes a voice of a recording, see `Stepper.encode_voice`; Encoded with this number follows.

        Raises EngineFault when the engine has ended, NoCapacity when RECORDINGS of the backlog wait already.
        """
        return self._backlog.add_recording(pcm)

    def rebuild(self, log: SessionLog) -> int:
        """`open` for a session that goes on from its log; Opened says at which frame.

        Frames pushed before that wait as in any session.
        """
        return self._backlog.add(None, log)

    def push(self, session: int, frame: Pcm, timestamp: int = 0) -> None:
        """Hands over one user frame, float32 [1920], not written to again; its reply carries `timestamp`.
        Without effect after `close`."""
        self._backlog.push(session, frame, timestamp)

    def close(self, session: int) -> None:
        """Ends a session; Closed follows once its slot is free. Idempotent."""
        self._backlog.close(session)

    def check(self, stall_limit_s: float) -> None:
        """Raises EngineFault when the engine has ended or one tick or chunk takes longer than the limit."""
        busy = self._backlog.busy_s()
        if busy > stall_limit_s and self._started.done():
            raise EngineFault(f"the engine has not answered for {busy:.0f} s")

    def _run(self) -> None:
        try:
            engine = self._make()
        except Exception as error:  # a task root: the future of `start` carries the error
            logger.exception("the engine could not start")
            self._backlog.end()
            self._started.set_exception(error)
            return
        self._started.set_result(engine.slots)
        slots: dict[Slot, LoopSession] = {}
        try:
            while (work := self._backlog.next()) is not None:
                self._pass(engine, slots, work)
        except Exception as error:  # a task root: the device may be broken, so every session ends
            logger.exception("the engine failed")
            fault = error if isinstance(error, EngineFault) else EngineFault("the engine failed")
            self._backlog.end(fault)
            self._deliver(Batch("control", (Faulted(fault),)))
        finally:
            self._backlog.end()

    def _pass(self, engine: Stepper, slots: dict[Slot, LoopSession], work: Work) -> None:
        if work.opens or work.closes:
            events = [self._open(engine, slots, session) for session in work.opens]
            events += [self._close(engine, slots, session) for session in work.closes]
            self._deliver(Batch("control", tuple(event for event in events if event is not None)))
        if work.step:
            self._tick(engine, slots, work)
        if work.voice is not None:
            self._encode_chunk(engine, work.voice)
        elif work.chunk:
            self._run_chunk(engine, slots, work.chunk)
        if work.opens or work.closes or work.chunk or self.counters.ticks % USAGE_TICKS == 0:
            self.usage = engine.usage

    def _open(
        self, engine: Stepper, slots: dict[Slot, LoopSession], session: LoopSession
    ) -> EngineEvent | None:
        try:
            if session.log is not None:
                session.slot = engine.admit_rebuild(session.log)
            else:
                assert session.persona is not None
                session.slot = engine.admit(session.persona)
        except EngineFault:
            raise
        except PersonaplexError as error:
            self._backlog.refused(session)
            return Refused(session.queue.session, error)
        session.persona = session.log = None
        slots[session.slot] = session
        self._backlog.admitted(session)
        return None

    def _close(self, engine: Stepper, slots: dict[Slot, LoopSession], session: LoopSession) -> EngineEvent:
        if session.slot is not None:
            engine.close(session.slot)
            del slots[session.slot]
            self._backlog.freed(session)
        return Closed(session.queue.session)

    def _tick(self, engine: Stepper, slots: dict[Slot, LoopSession], work: Work) -> None:
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

    def _encode_chunk(self, engine: Stepper, job: VoiceJob) -> None:
        began = self._clock()
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
        self._backlog.hold_rebuilds(began + (now - began) / self._rebuild_share)
        if done is not None:
            self._backlog.encoded()
        self._deliver(Batch("voice", () if done is None else (done,), now - began, 1))

    def _run_chunk(self, engine: Stepper, slots: dict[Slot, LoopSession], kind: Chunk) -> None:
        began = self._clock()
        slot = engine.prefill() if kind == "prefill" else engine.rebuild_chunk()
        now = self._clock()
        if kind == "rebuild":
            self._backlog.hold_rebuilds(began + (now - began) / self._rebuild_share)
        events: tuple[EngineEvent, ...] = ()
        if slot is not None:
            session = slots[slot]
            self._backlog.went_live(session)
            number, frame = session.queue.session, session.frame or 0
            digest, window = engine.voice_digest(slot), engine.window(slot)
            events = (Opened(number, now - session.opened, frame, digest, window),)
        self._deliver(Batch(kind, events, now - began, 1))
