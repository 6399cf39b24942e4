"""Writes one record, piece by piece, readable by nobody but its owner.

The head is in the file before the file has its name, so a reader never meets one without. Entries are
buffered and written by `flush`, whole entries at once; who calls it every second loses a second
when the process dies. While it is open the file is locked, so that nobody deletes or moves it half-written
(`claimed`); the lock ends with the process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from personaplex.errors import RecordingFailed
from personaplex.record.format import SUFFIX, Event, Head, Row, pack_event, pack_head, pack_row

_STALE_S = 60.0  # where there are no locks, a record written to more recently is taken to be in use


class RecordWriter:
    """An open record. Every method raises RecordingFailed when the disk does not take it; the file then ends
    with the last whole entry, and nothing more can be written."""

    def __init__(self, folder: Path, head: Head) -> None:
        """Makes the folder (0700) and the file (0600). Raises BadRecord for a head that cannot be told."""
        self.path = folder / record_name(head)
        self._buffer: list[bytes] = []
        first = pack_head(head)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file: int | None = _create(self.path, first)
        except OSError as error:
            raise _failure(error) from error
        self._written = len(first)

    def row(self, row: Row) -> None:
        """Buffers a frame."""
        self._buffer.append(pack_row(row))

    def event(self, event: Event) -> None:
        """Buffers an event."""
        self._buffer.append(pack_event(event))

    def flush(self) -> None:
        """Hands all that is buffered to the system."""
        if self._file is None:
            raise RecordingFailed("the record has ended")
        data = b"".join(self._buffer)
        self._buffer.clear()
        try:
            _write(self._file, data)
        except OSError as error:
            self._abandon()
            raise _failure(error) from error
        self._written += len(data)

    def close(self) -> None:
        """Flushes, makes the file safe against a loss of power, and closes it. Idempotent."""
        if self._file is None:
            return
        self.flush()
        try:
            os.fsync(self._file)
        except OSError as error:
            self._abandon()
            raise _failure(error) from error
        self._let_go()

    def abandon(self) -> None:
        """Ends the record with what has been written. Idempotent, and never raises."""
        if self._file is not None:
            self._abandon()

    def _abandon(self) -> None:
        """Cuts off an entry that was written in part."""
        assert self._file is not None
        with contextlib.suppress(OSError):  # the reader leaves out what is not whole
            os.ftruncate(self._file, self._written)
        self._let_go()

    def _let_go(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            with contextlib.suppress(OSError):  # told late by network file systems; the descriptor is gone
                os.close(file)


def _create(path: Path, head: bytes) -> int:
    """A new file, locked and with its head before it has the name that others look for. Raises OSError, and
    leaves no file then."""
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    part = path.with_name(f".{path.name}.part")
    file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with contextlib.suppress(OSError):  # a file system without locks: the file's age protects it
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        _write(file, head)
        os.rename(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.close(file)
        raise
    return file


def _write(file: int, data: bytes) -> None:
    """All of `data`. Raises OSError, with a part of it written perhaps."""
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def record_name(head: Head) -> str:
    """The time it began, in UTC, and the session: names sort by time."""
    return f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(head.began))}-{head.session}{SUFFIX}"


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this record is finished and ours within the block: nobody writes, uploads or deletes it.

    Raises OSError, also for one that is gone.
    """
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        yield _lock(file) and os.fstat(file).st_nlink > 0
    finally:
        os.close(file)


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return time.time() - os.fstat(file).st_mtime >= _STALE_S
    return True


def _failure(error: OSError) -> RecordingFailed:
    return RecordingFailed(f"the record cannot be written: {error.strerror or type(error).__name__}")
