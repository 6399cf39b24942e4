"""Files read within bounds, and files written whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LFS_POINTER = b"version https://git-lfs"  # how a file begins that git-lfs has not fetched


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside `path` to write to; moved over `path` at the end of the block, removed if it fails.

    The move is atomic, so two writers leave one of the two files. Raises OSError of the folder or the move.
    """
    target = Path(path)
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


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
