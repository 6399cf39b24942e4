"""Records of a gateway's sessions while they go on. No session ever waits for a disk.

What happens in a session is put into a bounded list; one thread writes all lists to their files every
FLUSH_S, so a process that is killed loses less than a second. A disk that is full, gone or too slow ends the
record, says so once, and leaves the session alone.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from personaplex.errors import BadRecord, RecordingFailed
from personaplex.record.format import Event, Head, Row
from personaplex.record.transcript import TEXT, USER_TEXT
from personaplex.record.writer import RecordWriter
from personaplex.words import Segment, as_json

logger = logging.getLogger(__name__)

FLUSH_S = 0.5
WAITING_LIMIT = 3_000  # entries of one session: some minutes, about a megabyte
KEPT, FAILED = "kept", "failed"  # how a record ended


class Recording:
    """One session's record. Its file is made with the first frame, so a session that never began has none."""

    def __init__(self, folder: Path, head: Head) -> None:
        self.failure: RecordingFailed | None = None
        self.on_failure: Callable[[RecordingFailed], None] | None = None  # once, on the writer's thread
        self._folder, self._head = folder, head
        self._waiting: list[Row | Event] = []
        self._lock = threading.Lock()
        self._began: float | None = None  # monotonic
        self._over_at: float | None = None  # since then
        self._ended = False
        self._done = threading.Event()  # all of it is written, or lost
        self._writer: RecordWriter | None = None

    # On the session's thread

    def frame(self, row: Row, text: str) -> None:
        """A reply of the replica; its `time_s` is that of the monotonic clock here."""
        if self._began is None:
            # The other thread makes the file once it sees that the session began: the head comes first.
            self._head = dataclasses.replace(self._head, began=time.time())
            self._began = row.time_s
        at = row.time_s - self._began
        self._add(dataclasses.replace(row, time_s=at))
        if text:
            self._add(Event(TEXT, at, {"frame": row.frame, "text": text}))

    def user_text(self, segment: Segment) -> None:
        """What the user said, as it was read."""
        self._add(Event(USER_TEXT, self._at(), as_json(segment)))

    def over(self) -> None:
        """The session is over; words of it may still come, until `end`."""
        self._over_at = self._at()

    def end(self, cause: str) -> None:
        """All is said. Idempotent."""
        at = self._at() if self._over_at is None else self._over_at
        self._add(Event("end", at, {"cause": cause}))
        with self._lock:
            self._ended = True

    def _at(self) -> float:
        return 0.0 if self._began is None else time.monotonic() - self._began

    def wait(self, timeout_s: float) -> bool:
        """After `end`: whether all of it is written, or lost, within `timeout_s`."""
        return self._done.wait(timeout_s)

    def _add(self, entry: Row | Event) -> None:
        with self._lock:
            if self.failure is not None or self._ended:
                return
            self._waiting.append(entry)
            if len(self._waiting) > WAITING_LIMIT:
                self._waiting.clear()
                self.failure = RecordingFailed("the record cannot be written: the disk is too slow")

    # On the writer's thread

    def write(self) -> str | None:
        """Writes what waits. How the record ended, once it has; None before, and for one without frames."""
        with self._lock:
            entries, self._waiting = self._waiting, []
            ended, failure = self._ended, self.failure
        try:
            if failure is None and self._began is not None:
                self._store(entries)
            if self._writer is not None and (ended or failure is not None):
                self._writer.close()
        except (RecordingFailed, BadRecord) as error:
            failure = self._fail(failure or RecordingFailed(str(error)))
        except Exception:  # of this record only, which ends with it
            logger.exception("a record could not be written")
            failure = self._fail(RecordingFailed("the record cannot be written: the server failed"))
        if failure is not None:
            logger.warning("session %s goes on unrecorded: %s", self._head.session, failure)
            if self.on_failure is not None and not ended:
                self.on_failure(failure)
        elif not ended:
            return None
        self._done.set()
        if failure is not None:
            return FAILED
        return None if self._writer is None else KEPT

    def _fail(self, failure: RecordingFailed) -> RecordingFailed:
        with self._lock:
            self.failure = failure
            self._waiting.clear()
        if self._writer is not None:
            self._writer.abandon()
        return failure

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def _store(self, entries: list[Row | Event]) -> None:
        if self._writer is None:
            self._writer = RecordWriter(self._folder, self._head)
        for entry in entries:
            if isinstance(entry, Row):
                self._writer.row(entry)
            else:
                self._writer.event(entry)
        self._writer.flush()


class Recorder:
    """The records of one gateway, in `folder`. `tell` hears how each ended, on the writer's thread."""

    def __init__(self, folder: Path, tell: Callable[[str], None], flush_s: float = FLUSH_S) -> None:
        self._folder, self._tell, self._flush_s = folder, tell, flush_s
        self._lock = threading.Lock()
        self._open: list[Recording] = []
        self._wake, self._closing = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name="records", daemon=True)
        self._thread.start()

    def begin(self, head: Head) -> Recording:
        """The record of a session that begins. Its time, `head.began`, is that of its first frame."""
        recording = Recording(self._folder, head)
        with self._lock:
            self._open.append(recording)
        return recording

    def finish(self, recording: Recording, cause: str) -> None:
        """The session is over; its record is written soon."""
        recording.end(cause)
        self._wake.set()

    def close(self, timeout_s: float) -> bool:
        """Ends every record and the thread; whether all was written within `timeout_s`."""
        with self._lock:
            left = list(self._open)
        for recording in left:
            recording.end("the gateway ended")
        self._closing = True
        self._wake.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(self._flush_s)
            self._wake.clear()
            self._write_all()
        self._write_all()

    def _write_all(self) -> None:
        with self._lock:
            recordings = list(self._open)
        for recording in recordings:
            try:
                outcome = recording.write()
                if outcome is not None:
                    self._tell(outcome)
            except Exception:  # a thread's root: the other sessions' records go on
                logger.exception("a record could not be written")
        with self._lock:
            self._open = [recording for recording in self._open if not recording.done]
