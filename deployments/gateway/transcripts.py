"""What users say, on its way to a transcriber and back: for all sessions of one gateway, on its event loop.

Laws:

1. No session waits for anything here, and none ends because of it.
2. Speech goes out in the order in which it ended, a few pieces at a time: as many as keep every transcriber
   busy, which Serve's autoscaling sees. The rest waits here.
3. Of what waits beyond `backlog_s`, in seconds of speech or of time, the oldest pieces are dropped whole,
   counted, and their sessions told.
4. A transcriber that is not ready or not there is asked again. Trouble is a line of the log, and so is its
   end. No line, no metric and no error holds a word.
5. A session hears of its pieces in order, whatever the order of the answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from deployments import metrics
from deployments.gateway.listening import Ear, Listening
from deployments.metrics import Metrics
from deployments.wire.speech import Answer, Reading, Unreadable, Unready
from personaplex.config import Pcm
from personaplex.session.events import UserText, UserTextLost
from personaplex.transcription.listener import Speech

logger = logging.getLogger(__name__)

RETRY_S = 1.0
PER_TRANSCRIBER = 2  # pieces under way: one is worked on, one is next
Heard = UserText | UserTextLost
Reason = Literal["behind", "unavailable"]


@dataclass(eq=False)
class _Piece:
    speech: Speech = field(repr=False)
    owner: Transcript
    since: float
    done: bool = False
    heard: Heard | None = None


class Transcripts:
    """The queue. `transcribe` is the call to the transcribers."""

    def __init__(
        self,
        transcribe: Callable[[Speech], Awaitable[Answer]],
        published: Metrics,
        listening: Listening,
        *,
        backlog_s: float,
        transcribers: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`transcribers`: at most."""
        self._transcribe, self._metrics, self._listening = transcribe, published, listening
        self._backlog_s, self._at_once, self._clock = backlog_s, PER_TRANSCRIBER * transcribers, clock
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Piece] = deque()
        self._asking: dict[asyncio.Future[None], _Piece] = {}
        self._trouble = ""
        self._retry: asyncio.TimerHandle | None = None
        self._publish()

    def open(self, tell: Callable[[Heard], None]) -> Transcript:
        """A session begins; `tell` hears what its user said."""
        return Transcript(self, self._listening, tell)

    @property
    def seconds(self) -> float:
        """Speech that waits or is under way."""
        return sum(piece.speech.seconds for piece in (*self._waiting, *self._asking.values()))

    def close(self) -> None:
        """Nothing is asked any more."""
        self._listening.close()
        self._waiting.clear()
        for task in self._asking:
            task.cancel()
        if self._retry is not None:
            self._retry.cancel()

    def now(self) -> float:
        return self._clock()

    def add(self, piece: _Piece) -> None:
        self._waiting.append(piece)
        self._ask_next()
        self._drop_oldest()
        self._publish()

    def count_dropped(self, seconds: float, reason: str) -> None:
        self._metrics.add(metrics.TRANSCRIPTION_DROPPED, seconds, reason=reason)

    def forget(self, owner: Transcript) -> None:
        """Nobody waits for this session's words any more."""
        self._waiting = deque(piece for piece in self._waiting if piece.owner is not owner)
        self._publish()

    # The queue

    def _drop_oldest(self) -> None:
        waiting = sum(piece.speech.seconds for piece in self._waiting)
        now = self._clock()
        while self._waiting:
            oldest = self._waiting[0]
            too_much = waiting > self._backlog_s and len(self._waiting) > 1  # one alone may be longer
            if not too_much and now - oldest.since <= self._backlog_s:
                break
            self._waiting.popleft()
            waiting -= oldest.speech.seconds
            self._lose(oldest, self._reason)

    @property
    def _reason(self) -> Reason:
        return "unavailable" if self._trouble else "behind"

    def _lose(self, piece: _Piece, reason: Reason) -> None:
        self.count_dropped(piece.speech.seconds, reason)
        self._settle(piece, UserTextLost(piece.speech.start, piece.speech.end, reason))

    def _settle(self, piece: _Piece, heard: Heard | None) -> None:
        piece.done, piece.heard = True, heard
        piece.owner.tell()

    def _ask_next(self) -> None:
        while self._waiting and len(self._asking) < self._at_once and self._retry is None:
            piece = self._waiting.popleft()
            task = asyncio.ensure_future(self._ask(piece))
            self._asking[task] = piece
            task.add_done_callback(self._asked)
        self._publish()

    def _asked(self, task: asyncio.Future[None]) -> None:
        del self._asking[task]
        self._drop_oldest()
        self._ask_next()

    async def _ask(self, piece: _Piece) -> None:
        left_s = max(0.0, self._backlog_s - (self._clock() - piece.since))
        try:
            answer = await asyncio.wait_for(self._transcribe(piece.speech), left_s)
        except asyncio.TimeoutError:  # not asked again: whoever is so slow still works on it
            self._lose(piece, self._reason)
            return
        except (RayError, RayServeException, OSError) as error:
            self._try_again(piece, f"no transcriber could be asked ({type(error).__name__})")
            return
        except Exception as error:  # noqa: BLE001  a task's root; what it says may hold a word of the user
            logger.error("speech could not be sent to a transcriber: %s", type(error).__name__)
            self._lose(piece, "unavailable")
            return
        match answer:
            case Reading(segment):
                self._recovered()
                self._metrics.observe(
                    metrics.TRANSCRIPTION_LAG, piece.speech.waited + self._clock() - piece.since
                )
                self._settle(piece, None if segment is None else UserText(segment))
            case Unready(reason):
                self._try_again(piece, reason)
            case Unreadable():
                self._lose(piece, "unavailable")

    # Trouble

    def _try_again(self, piece: _Piece, reason: str) -> None:
        if not self._trouble:
            logger.warning("no words of users for now: %s; sessions go on", reason)
        self._trouble = reason
        if piece.owner.closed:
            return
        place = next((i for i, other in enumerate(self._waiting) if other.since > piece.since), None)
        self._waiting.insert(len(self._waiting) if place is None else place, piece)
        if self._retry is None:
            self._retry = self._loop.call_later(RETRY_S, self._end_pause)

    def _end_pause(self) -> None:
        self._retry = None
        self._drop_oldest()
        self._ask_next()

    def _recovered(self) -> None:
        if self._trouble:
            self._trouble = ""
            logger.info("users' words are transcribed again")

    def _publish(self) -> None:
        self._metrics.set(metrics.TRANSCRIPTION_BACKLOG, self.seconds)


class Transcript:
    """One session's part: its ear, and the pieces it waits for."""

    def __init__(self, queue: Transcripts, listening: Listening, tell: Callable[[Heard], None]) -> None:
        self.closed = False
        self._queue, self._listening, self._tell = queue, listening, tell
        self._pieces: deque[_Piece] = deque()
        self._heard_all = False  # no more speech will come
        self._settled = asyncio.Event()
        self._ear: Ear = listening.open(self._on_speech, lambda s: queue.count_dropped(s, "detector"))

    def hear(self, number: int, frame: Pcm) -> None:
        """Takes the user's frame that the model heard as `number`; see `Ear.hear`."""
        self._ear.hear(number, frame)
        self._listening.wake()

    def end(self) -> None:
        """No frame comes any more. What was said last is told once it is read, unless `close` comes first."""
        self._listening.end(self._ear, self._on_end)

    async def settled(self, timeout_s: float) -> None:
        """After `end`: until everything was told, or `timeout_s` passed; then closes."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._settled.wait(), timeout_s)
        self.close()

    def close(self) -> None:
        """Nothing is told any more, and nothing is asked for this session. Idempotent."""
        self.closed = True
        self._queue.forget(self)

    def tell(self) -> None:
        """Tells what is known, up to the first piece that is not."""
        while self._pieces and self._pieces[0].done:
            heard = self._pieces.popleft().heard
            if heard is not None and not self.closed:
                self._tell(heard)
        if self._heard_all and not self._pieces:
            self._settled.set()

    def _on_speech(self, speech: Speech) -> None:
        if self.closed:
            return
        piece = _Piece(speech, self, self._queue.now())
        self._pieces.append(piece)
        self._queue.add(piece)

    def _on_end(self) -> None:
        self._heard_all = True
        self.tell()
