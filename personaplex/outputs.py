"""Outputs of a command: checked and tried before the work, so that hours of it are not lost at the end.

An input is never overwritten, whatever name it goes by: links, hard links, `..` and file systems that ignore
case are looked through. Existing outputs are replaced.
"""

from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Iterable
from pathlib import Path

from personaplex.errors import ConfigError
from personaplex.files import is_stream, part_beside

Named = tuple[str, Path]  # the option it came from, and the file

WAV_HEADER_BYTES = 44


def refuse_overwriting(outputs: Iterable[Named], inputs: Iterable[Named]) -> None:
    """Raises ConfigError when an output is one of the inputs, or two outputs are one file."""
    taken: dict[object, Named] = {_identity(path): (option, path) for option, path in inputs}
    taken.pop(None, None)  # those that are not there
    written: dict[object, Named] = {}
    for option, path in outputs:
        identity: object = _identity(path) or os.path.realpath(path)
        if is_stream(path):
            continue
        if identity in taken:
            theirs, source = taken[identity]
            raise ConfigError(f"{option} {path} would overwrite the input {source} ({theirs})")
        if identity in written:
            raise ConfigError(f"{option} and {written[identity][0]} would both write {path}")
        written[identity] = option, path


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells an existing file or folder from every other; None for what is not there."""
    try:
        state = os.stat(path)
    except (OSError, ValueError):
        return None
    return state.st_dev, state.st_ino


def try_output(path: Path, size: int = 1) -> None:
    """Raises OSError unless a file of `size` bytes can be written at `path` now. Leaves nothing behind."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder is in the way of this file", str(path))
    if is_stream(path):
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return
    part = part_beside(path)
    try:
        with part.open("xb", buffering=0) as file:
            file.write(b"\0")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        part.unlink(missing_ok=True)
    check_room(path, size)


def make_folder_of(path: Path) -> None:
    """Makes the folder that `path` is to be in. Raises OSError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(
            errno.ENOTDIR, "a file is in the way of this folder", str(path.parent)
        ) from error
    except RecursionError as error:  # pathlib goes up one level a call
        raise OSError(errno.ENAMETOOLONG, "too many folders in one another", str(path.parent)) from error


def check_room(path: Path, size: int) -> None:
    """Raises OSError when the disk has not `size` bytes left for `path`."""
    if is_stream(path):
        return
    disk = os.statvfs(path.parent)
    if disk.f_blocks and disk.f_bavail * disk.f_frsize < size:  # some network disks say 0 for everything
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def wav_bytes(samples: int) -> int:
    """Size of a mono 16-bit WAV file."""
    return WAV_HEADER_BYTES + 2 * samples


def is_folder(name: str | os.PathLike[str]) -> bool:
    """Whether a name means a folder: one that is there, or one to be made, with a slash at its end."""
    text = os.fspath(name)
    return os.path.basename(text) in ("", ".", "..") or os.path.isdir(text)


def some_name(text: str) -> str:
    """An option's type: a file or folder. Refuses what a shell makes of a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def file_name(text: str) -> Path:
    """An option's type: a file to be written."""
    some_name(text)
    if is_folder(text):
        raise argparse.ArgumentTypeError(f"{text} is a folder: name a file")
    return Path(text)
