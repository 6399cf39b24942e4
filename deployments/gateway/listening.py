"""The gateway's ear: users' frames to pieces of speech, on one thread for all sessions.

A session hands over its frames after they were sent to the replica, and waits for nothing: they are put into
a bounded queue, and when the thread has no time the oldest are dropped and counted. The thread has a low
priority, so that it never keeps the event loop from a core.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable

from personaplex.config import FRAME_SECONDS, Pcm
from personaplex.errors import ConfigError
from personaplex.transcription.listener import Listener, Speech
from personaplex.transcription.silero import FASTER_WHISPER, SILERO_VAD, Silero, find

logger = logging.getLogger(__name__)

GATHER_S = 0.05  # between two rounds over all sessions
SPARE_S = 5.0  # of sound that may wait for the thread, beyond a burst
NICE = 10


class Ear:
    """One session's queue of frames; `Listening.open` makes it."""

    def __init__(
        self, limit: int, on_speech: Callable[[Speech], None], on_dropped: Callable[[float], None]
    ) -> None:
        self.frames: deque[tuple[int, Pcm]] = deque()
        self.ended = False
        self.on_speech, self._on_dropped, self._limit = on_speech, on_dropped, limit

    def hear(self, number: int, frame: Pcm) -> None:
        """Takes frame `number` of the conversation, float32 [1920] at 24 kHz, which nobody changes any
        more."""
        if len(self.frames) >= self._limit:
            with contextlib.suppress(IndexError):  # the thread was quicker
                self.frames.popleft()
                self._on_dropped(FRAME_SECONDS)
        self.frames.append((number, frame))


class Listening:
    """All ears of one gateway; made on its event loop, on which everything is called back."""

    def __init__(self, burst_frames: int, detector: Callable[[], Silero | None] | None = None) -> None:
        self._limit = burst_frames + round(SPARE_S / FRAME_SECONDS)
        self._make_detector = detector or load_detector
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._ears: dict[Ear, Callable[[], None]] = {}  # and what to call when one has ended
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="listening", daemon=True)
        self._thread.start()

    def open(self, on_speech: Callable[[Speech], None], on_dropped: Callable[[float], None]) -> Ear:
        """A session begins. `on_speech` takes each piece of its speech, `on_dropped` seconds of sound that
        the thread had no time for."""
        ear = Ear(self._limit, on_speech, on_dropped)
        with self._lock:
            self._ears[ear] = lambda: None
        return ear

    def end(self, ear: Ear, then: Callable[[], None]) -> None:
        """The session is over: its last speech is told, then `then` called."""
        with self._lock:
            self._ears[ear] = then
        ear.ended = True
        self._wake.set()

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._wake.set()

    def wake(self) -> None:
        """There are frames."""
        self._wake.set()

    # On the thread

    def _run(self) -> None:
        with contextlib.suppress(OSError, AttributeError):  # of Linux: a thread's own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        silero = self._make_detector()
        listeners: dict[Ear, Listener] = {}
        while not self._stop.is_set():
            self._wake.wait()
            self._wake.clear()
            with self._lock:
                ears = list(self._ears)
            for ear in ears:
                if ear not in listeners:
                    listeners[ear] = Listener(silero)
                self._work(ear, listeners[ear])
                if ear.ended and not ear.frames:
                    del listeners[ear]
                    self._finish(ear)
            self._stop.wait(GATHER_S)

    def _work(self, ear: Ear, listener: Listener) -> None:
        ended = ear.ended  # before the frames: none comes after it
        try:
            while ear.frames:
                number, frame = ear.frames.popleft()
                for speech in listener.hear(number, frame):
                    self._call(ear.on_speech, speech)
            if ended:
                for speech in listener.end():
                    self._call(ear.on_speech, speech)
        except Exception:  # of this session only, whose next frames are tried again
            logger.exception("a user's sound could not be listened to")

    def _finish(self, ear: Ear) -> None:
        with self._lock:
            then = self._ears.pop(ear)
        self._call(then)

    def _call(self, callback: Callable[..., None], *arguments: Speech) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(callback, *arguments)


def load_detector() -> Silero | None:
    """Silero's, or None where none is installed: then speech is told by its loudness."""
    path = find(FASTER_WHISPER, SILERO_VAD)
    try:
        if path is not None:
            return Silero(path, "onnxruntime is not installed")
        reason = "no model of a speech detector is installed"
    except ConfigError as error:
        reason = str(error)
    logger.warning("speech is told by its loudness, which noise has too: %s", reason)
    return None
