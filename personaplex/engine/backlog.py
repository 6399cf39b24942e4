"""What waits for an engine: sessions to open and to close, frames, prompts, rebuilds, recordings.

Any thread adds to it and never waits for the engine. The thread that owns the engine takes the next piece of
work, and sleeps until something arrives or a time that it chose itself. One lock guards all of it.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from personaplex.config import Pcm
from personaplex.engine.events import Chunk, Counters
from personaplex.engine.interface import Slot, VoiceEncoding
from personaplex.engine.schedule import FrameQueue, PendingFrame, TickPlan, plan
from personaplex.errors import EngineFault, NoCapacity
from personaplex.persona import Persona
from personaplex.sessionlog import SessionLog

RECORDINGS = 4  # that may wait to become voices


@dataclass
class LoopSession:
    """One session of the loop; `slot` is None until the engine has admitted it."""

    opened: float
    queue: FrameQueue
    persona: Persona | None = None  # of a new session, until it is admitted
    log: SessionLog | None = None  # of one that goes on, until it is admitted
    frame: int | None = None  # where a session goes on that is rebuilt
    slot: Slot | None = None

    @property
    def chunk(self) -> Literal["prefill", "rebuild"]:
        """What makes it live."""
        return "prefill" if self.frame is None else "rebuild"


@dataclass
class VoiceJob:
    """A recording that waits to become a voice, or becomes one."""

    number: int
    pcm: Pcm
    encoding: VoiceEncoding | None = None


@dataclass
class Work:
    """What the engine's thread does next."""

    opens: list[LoopSession]
    closes: list[LoopSession]
    step: list[tuple[LoopSession, PendingFrame]] = field(default_factory=list)
    chunk: Chunk | None = None
    voice: VoiceJob | None = None  # where the chunk is one of a voice


class Backlog:
    """One loop's. Methods without a note may be called from any thread."""

    def __init__(
        self, counters: Counters, *, gather_s: float, inbox_limit: int, clock: Callable[[], float]
    ) -> None:
        """See `EngineLoop`; of `counters` it keeps those of frames that are dropped or wait."""
        self._counters, self._clock = counters, clock
        self._gather_s, self._inbox_limit = gather_s, inbox_limit
        self._numbers = itertools.count()
        self._wake = threading.Condition()
        # Everything below is guarded by _wake.
        self._sessions: dict[int, LoopSession] = {}
        self._opens: list[LoopSession] = []
        self._closes: list[LoopSession] = []
        self._recordings: deque[VoiceJob] = deque()
        self._waiting = {"prefill": 0, "rebuild": 0}  # sessions with a slot that is not live yet
        self._rebuild_at = 0.0  # when a rebuild, or a voice, may run again beside live sessions
        self._last_chunk: Chunk = "voice"
        self._silent = 0  # live sessions without a frame
        self._gathering = False  # asleep only to let more frames join the tick
        self._ended = False
        self._fault: EngineFault | None = None
        self._busy_since: float | None = None

    def add(self, persona: Persona | None, log: SessionLog | None) -> int:
        """A new session's number, or that of one which goes on from its log. Raises EngineFault."""
        with self._wake:
            self._raise_if_ended()
            number = next(self._numbers)
            frame = None if log is None else log.frames
            queue = FrameQueue(number, self._inbox_limit)
            session = LoopSession(self._clock(), queue, persona, log, frame)
            self._sessions[number] = session
            self._opens.append(session)
            self._wake.notify()
        return number

    def add_recording(self, pcm: Pcm) -> int:
        """A new voice's number. Raises EngineFault, NoCapacity."""
        with self._wake:
            self._raise_if_ended()
            if len(self._recordings) >= RECORDINGS:
                raise NoCapacity("too many recordings wait to become voices")
            number = next(self._numbers)
            self._recordings.append(VoiceJob(number, pcm))
            self._wake.notify()
        return number

    def push(self, session: int, frame: Pcm, timestamp: int) -> None:
        """One frame of a session. Without effect after `close`."""
        with self._wake:
            known = self._sessions.get(session)
            if known is None:
                return
            queue = known.queue
            was_empty = not queue.frames
            self._counters.frames_dropped += queue.put(PendingFrame(frame, self._clock(), timestamp))
            if queue.live and was_empty:
                self._silent -= 1
                if self._silent == 0 or not self._gathering:
                    self._wake.notify()

    def close(self, session: int) -> None:
        """Ends a session. Idempotent."""
        with self._wake:
            known = self._sessions.pop(session, None)
            if known is None:
                return
            if known.queue.live and not known.queue.frames:
                self._silent -= 1
            self._closes.append(known)
            self._wake.notify()

    def end(self, fault: EngineFault | None = None) -> None:
        """Nothing is added or worked on any more; `fault` is why, if the engine failed."""
        with self._wake:
            self._fault = self._fault or fault
            self._ended = True
            self._wake.notify()

    def busy_s(self) -> float:
        """How long the current piece of work takes already. Raises EngineFault once the engine has ended."""
        with self._wake:
            self._raise_if_ended()
            return 0.0 if self._busy_since is None else self._clock() - self._busy_since

    def _raise_if_ended(self) -> None:
        if self._fault is not None:
            raise self._fault
        if self._ended:
            raise EngineFault("the engine has stopped")

    # On the engine's thread

    def next(self) -> Work | None:
        """Sleeps until there is work; None at the end."""
        with self._wake:
            while True:
                if self._ended:
                    return None
                now = self._clock()
                queues = (session.queue for session in self._sessions.values())
                found = plan(queues, now, self._gather_s, self._waiting["rebuild"] > 0)
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

    def _take(self, found: TickPlan, chunk: Chunk | None, now: float) -> Work:
        work = Work(self._opens, self._closes, chunk=chunk)
        if chunk == "voice":
            work.voice = self._recordings[0]
        self._last_chunk = chunk or self._last_chunk
        self._opens, self._closes = [], []
        for queue in found.step:
            work.step.append((self._sessions[queue.session], queue.take(now)))
            self._silent += not queue.frames
        if found.step:
            self._counters.frames_waiting = sum(len(one.queue.frames) for one in self._sessions.values())
        return work

    def admitted(self, session: LoopSession) -> None:
        """It has a slot, and waits for its prefill or its rebuild."""
        with self._wake:
            self._waiting[session.chunk] += 1

    def refused(self, session: LoopSession) -> None:
        """It has no slot and gets none."""
        with self._wake:
            self._sessions.pop(session.queue.session, None)

    def freed(self, session: LoopSession) -> None:
        """Its slot is free again."""
        with self._wake:
            self._waiting[session.chunk] -= not session.queue.live

    def went_live(self, session: LoopSession) -> None:
        """Its prefill or rebuild is done."""
        with self._wake:
            self._waiting[session.chunk] -= 1
            session.queue.live = True
            if session.queue.session in self._sessions:
                self._silent += not session.queue.frames

    def hold_rebuilds(self, until: float) -> None:
        """Neither rebuilds nor voices are worked on before `until` while a session is live."""
        with self._wake:
            self._rebuild_at = until

    def encoded(self) -> None:
        """The first recording is a voice, or never will be."""
        with self._wake:
            self._recordings.popleft()
