"""Finished records: brought to a store, deleted when they are too old or too many. In threads of their own.

A record that is being written is locked, and left alone by every gateway and command; one that a killed
gateway left behind is finished. Nothing here raises, and nothing waits for it.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from personaplex.errors import ConfigError
from personaplex.files import replacing
from personaplex.record.format import SUFFIX
from personaplex.record.writer import claimed

logger = logging.getLogger(__name__)

EVERY_S = 30.0  # between two looks at the folder
RETRY_S, LONGEST_RETRY_S = 2.0, 600.0  # after an upload that failed, doubled each time
# What is told. The last: a fault of ours, or a folder that cannot be read.
EXPIRED, UPLOADED, UPLOAD_FAILED, LOOK_FAILED = "expired", "uploaded", "upload_failed", "look_failed"

Store = Callable[[Path], None]  # brings one file to its place; raises what it likes


@dataclass(frozen=True)
class RetentionLimits:
    """How old, in seconds, and how many bytes in all; 0 is no limit."""

    age_s: float
    total_bytes: int


def store_at(target: str) -> Store:
    """Copies files into a directory, or to any URL that fsspec knows. Raises ConfigError where it cannot."""
    if "://" not in target:
        return lambda path: _copy(path, Path(target))
    try:
        import fsspec  # an optional part of this package

        fsspec.get_filesystem_class(target.partition("://")[0])
    except (ImportError, ValueError) as error:
        name = target.partition("://")[0]
        raise ConfigError(
            f"record_upload: {name}:// needs packages that are not here (pip install "
            f"'personaplex-serve[records]' and the one for {name}): {error}"
        ) from error

    def put(path: Path) -> None:
        filesystem, folder = fsspec.core.url_to_fs(target)
        filesystem.makedirs(folder, exist_ok=True)
        filesystem.put_file(os.fspath(path), f"{folder.rstrip('/')}/{path.name}")

    return put


def _copy(path: Path, folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with replacing(folder / path.name) as part:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        shutil.copyfile(path, part)


class Retention:
    """Looks after one folder. `tell` hears of each record that went, on a thread of its own."""

    def __init__(
        self, folder: Path, limits: RetentionLimits, tell: Callable[[str], None], store: Store | None = None
    ) -> None:
        self._folder, self._limits, self._tell, self._store = folder, limits, tell, store
        self._retry_s = RETRY_S
        self._refused: set[Path] = set()  # records whose last upload failed
        self._stopping = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, args=(self._expire_all,), name="expiry", daemon=True).start()
        if self._store is not None:
            threading.Thread(target=self._run, args=(self.upload,), name="upload", daemon=True).start()

    def stop(self) -> None:
        """What is not uploaded yet stays for the next gateway that starts here."""
        self._stopping.set()

    def expire(self, now: float) -> int:
        """Deletes finished records older than the limit, then the oldest until the rest fits; how many."""
        found = list(_records(self._folder))
        total, gone = sum(state.st_size for _, state in found), 0
        for path, state in sorted(found, key=lambda one: one[1].st_mtime):
            old = self._limits.age_s and now - state.st_mtime > self._limits.age_s
            many = self._limits.total_bytes and total > self._limits.total_bytes
            if (old or many) and _delete(path):
                total -= state.st_size
                gone += 1
                self._tell(EXPIRED)
        return gone

    def upload(self) -> float:
        """Brings every finished record to the store and deletes it here; seconds until the next try.

        A record that failed before comes last, so that one the store will not take holds no other back. Two
        failures in a row are a store out of reach.
        """
        paths = [path for path, _ in _records(self._folder)]
        self._refused.intersection_update(paths)
        uploaded, in_a_row, causes = 0, 0, list[str]()
        for path in sorted(paths, key=lambda path: (path in self._refused, path)):
            try:
                uploaded += self._upload(path)
                in_a_row = 0
            except Exception as error:  # noqa: BLE001  stores raise all sorts
                self._refused.add(path)
                self._tell(UPLOAD_FAILED)
                causes.append(type(error).__name__)
                in_a_row += 1
                if in_a_row == 2:
                    break
        if not causes:
            self._retry_s = RETRY_S
            return EVERY_S
        wait = EVERY_S if uploaded else self._retry_s
        self._retry_s = RETRY_S if uploaded else min(2 * wait, LONGEST_RETRY_S)
        logger.warning("records cannot be uploaded (%s); next try in %.0f s", causes[-1], wait)
        return wait

    def _upload(self, path: Path) -> bool:
        """Whether it was brought there; False for one that is written still, or is gone."""
        assert self._store is not None
        try:
            with claimed(path) as ours:
                if not ours:
                    return False
                self._store(path)
                path.unlink(missing_ok=True)
        except FileNotFoundError:
            if path.exists():
                raise
            return False  # another gateway was faster, or it has expired
        self._refused.discard(path)
        self._tell(UPLOADED)
        return True

    def _expire_all(self) -> float:
        self.expire(time.time())
        return EVERY_S

    def _run(self, work: Callable[[], float]) -> None:
        while not self._stopping.is_set():
            try:
                pause = work()
            except Exception:  # a thread's root; the next look may find things mended
                logger.exception("records could not be looked after")
                self._tell(LOOK_FAILED)
                pause = EVERY_S
            self._stopping.wait(pause)


def _records(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    try:
        entries = list(os.scandir(folder))
    except OSError:  # not made yet, or out of reach
        return
    for entry in entries:
        if not entry.name.endswith(SUFFIX):
            continue
        try:
            state = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        if entry.is_file(follow_symlinks=False):
            yield Path(entry.path), state


def _delete(path: Path) -> bool:
    try:
        with claimed(path) as ours:
            if ours:
                path.unlink()
            return ours
    except OSError:
        return False
