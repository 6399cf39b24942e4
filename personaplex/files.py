"""Files read within bounds, and files written whole or not at all."""

from __future__ import annotations

import codecs
import errno
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from personaplex.errors import ConfigError

LFS_POINTER = b"version https://git-lfs"  # how a file begins that git-lfs has not fetched
LFS_ADVICE = "is a git-lfs pointer, not the file itself: run `git lfs pull`"
_ENCODINGS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside `path` to write to; moved over `path` at the end of the block, removed if it fails.

    The move is atomic, so two writers leave one of the two files. A pipe or a device is not replaced: it gets
    the content once that is complete. Raises OSError, which names `path`, of the block, the folder or the
    move.
    """
    target = Path(path)
    if is_stream(target):
        with tempfile.TemporaryDirectory() as folder:
            part = Path(folder, "part")
            yield part
            with _naming(target), part.open("rb") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        return
    part = part_beside(target)
    try:
        with _naming(target):
            yield part
            os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def part_beside(target: Path) -> Path:
    """A new hidden name in the folder of `target`, never too long for a file system that takes `target`'s."""
    head = os.fsdecode(os.fsencode(target.name)[:200])
    return target.parent / f".{head}.{secrets.token_hex(4)}.part"


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a pipe, a device or a process's own descriptor: never to be replaced by a file."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    own = os.path.abspath(path).startswith(("/dev/", "/proc/")) and os.path.islink(path)
    return own or not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """OSErrors of writing to a part speak of `target`."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(target)) from error


def is_lfs_pointer(path: str | os.PathLike[str]) -> bool:
    """Whether git-lfs left its pointer here instead of the file. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def key_lines(path: Path) -> list[str]:
    """The keys in a file: one a line, `#` starts a comment. Any line ends and byte order mark will do.

    Raises ConfigError, naming the file, when it cannot be read or holds no key.
    """
    try:
        data = path.read_bytes()
        encoding = next((name for mark, name in _ENCODINGS.items() if data.startswith(mark)), "utf-8")
        lines = [line.strip() for line in data.decode(encoding).splitlines()]
    except OSError as error:
        raise ConfigError(f"the keys in {path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:  # also for a name with a NUL
        raise ConfigError(f"the keys in {path.name} cannot be read: the file is not UTF-8") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"{path.name} holds no key")
    return keys


def read_bounded(path: str | os.PathLike[str], limit: int) -> bytes:
    """The whole content of a regular file of at most `limit` bytes; links are followed.

    Raises OSError for a folder, a pipe or a device (never waits for one), for a larger file and for a name
    no file can have.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not block us
    except ValueError as error:  # a NUL or a lone surrogate in the name
        raise OSError(errno.EINVAL, "not a file name") from error
    with open(descriptor, "rb") as file:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        content = b"" if state.st_size > limit else file.read(limit + 1)
        if state.st_size > limit or len(content) > limit:
            raise OSError(errno.EFBIG, f"larger than {limit} bytes")
        return content
