"""Recordings as people have them, made fit for libsndfile: pipes, headers with other sizes than the file's.

A recorder that was cut off, or wrote to a pipe, leaves 0 or -1 where the length belongs. libsndfile then
finds nothing, or refuses, although the samples follow; they are read to the end of the file here. One that
brings its header up to date now and then, and was cut off in between, leaves a length that is too short: what
follows it is read too, unless it is metadata, and a warning says so.
"""

from __future__ import annotations

import logging
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from personaplex.errors import BadAudio
from personaplex.files import LFS_ADVICE

log = logging.getLogger(__name__)

# fmt: off
# What libsndfile reads by its header, by the names such files have. Headerless formats are not among them.
SOUND_SUFFIXES = frozenset((
    ".wav", ".wave", ".bwf", ".rf64", ".w64", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".mp2", ".mpga",
    ".aif", ".aiff", ".aifc", ".au", ".snd", ".caf", ".avr", ".htk", ".iff", ".svx", ".8svx", ".16sv",
    ".mat", ".paf", ".pvf", ".sds", ".sf", ".ircam", ".voc", ".nist", ".sph", ".wve", ".xi", ".mpc2k",
))
# Sound, or films with sound, that libsndfile does not read.
OTHER_SUFFIXES = frozenset((
    ".m4a", ".m4b", ".m4r", ".mp4", ".m4v", ".mov", ".aac", ".alac", ".3gp", ".3g2", ".amr", ".awb", ".wma",
    ".wmv", ".asf", ".webm", ".weba", ".mka", ".mkv", ".ape", ".wv", ".ac3", ".eac3", ".dts", ".dsf",
    ".dff", ".tta", ".ra", ".rm", ".avi", ".mid", ".midi", ".spx", ".gsm", ".vox", ".raw", ".pcm", ".sd2",
    ".qcp", ".tak",
))
# fmt: on
PIPE_LIMIT = 2**31  # bytes taken from a pipe
COPY_LIMIT = 2**32 + 2**20  # bytes of a file that is mended in a copy: the longest read, in 64-bit samples
CHUNK_LIMIT = 1_000  # chunks looked at in search of the samples; real files have some dozens

_FOREIGN: Mapping[bytes, str] = {
    b"\x1aE\xdf\xa3": "WebM or Matroska",
    b"0&\xb2u": "Windows Media",
    b"#!AM": "AMR",
    b"MAC ": "Monkey's Audio",
    b"wvpk": "WavPack",
    b"\x00\x05\x16\x07": "the metadata that macOS keeps beside a file",
}
_TO_THE_END = 0xFFFFFFFF
# What stands behind the samples of a file whose length is right, whole or cut off.
_TAGS = (
    b"LIST",
    b"ID3",
    b"id3 ",
    b"TAG",
    b"APETAGEX",
    b"LYRICS",
    b"bext",
    b"iXML",
    b"_PMX",
    b"cue ",
    b"fact",
)
_STRAY = 8  # bytes behind the samples that are of no account

Patches = dict[int, bytes]  # offset in the file -> what belongs there


@dataclass(frozen=True)
class _Chunks:
    """How a container lays out its chunks: a name of four bytes, a size, and a byte of padding or none."""

    size: str  # its struct
    padded: bool = True

    @property
    def head(self) -> int:
        """Bytes of name and size."""
        return 4 + struct.calcsize(self.size)

    def read(self, file: BinaryIO, at: int) -> tuple[bytes, int] | None:
        """Name and size of the chunk at `at`; None where the file is too short for one."""
        chunk = _at(file, at, self.head)
        if len(chunk) < self.head:
            return None
        return chunk[:4], struct.unpack(self.size, chunk[4:])[0]

    def after(self, at: int, size: int) -> int:
        """Where the chunk after the one at `at` begins."""
        return at + self.head + size + (size % 2 if self.padded else 0)

    def find(self, file: BinaryIO, at: int, end: int, name: bytes) -> int | None:
        """Where the chunk called `name` begins, from `at` on."""
        for _ in range(CHUNK_LIMIT):
            chunk = self.read(file, at) if at < end else None
            if chunk is None:
                break
            if chunk[0] == name:
                return at
            if chunk[1] < 0:
                break
            at = self.after(at, chunk[1])
        return None

    def fill(self, file: BinaryIO, at: int, end: int) -> bool:
        """Whether nothing but whole chunks is left."""
        for _ in range(CHUNK_LIMIT):
            if at >= end:
                break
            chunk = self.read(file, at)
            if chunk is None or chunk[1] < 0 or not (chunk[0].isascii() and chunk[0].decode().isprintable()):
                return False
            at = self.after(at, chunk[1])
        return at - end in (0, 1)


_RIFF, _RIFX, _AIFF, _CAF = _Chunks("<I"), _Chunks(">I"), _Chunks(">I"), _Chunks(">q", padded=False)


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """The file at `path` with a descriptor that can seek and sizes that are right: itself, or a copy.

    Raises OSError, and BadAudio for a pipe that does not end, a git-lfs pointer and a file too large to copy.
    """
    with ExitStack() as stack:
        file: BinaryIO = stack.enter_context(open(path, "rb"))
        if not file.seekable():
            file = _spooled(file, stack.enter_context(tempfile.TemporaryFile()))
        if file.read(23) == b"version https://git-lfs":
            raise BadAudio(f"the file {LFS_ADVICE}")
        if patches := _patches(file, os.path.basename(path)):
            if file.seek(0, os.SEEK_END) > COPY_LIMIT:
                size = f"more than {COPY_LIMIT >> 30} GiB"
                raise BadAudio(f"its header does not say how long it is, and it has {size}: cut it up")
            copy = stack.enter_context(tempfile.TemporaryFile())
            file.seek(0)
            shutil.copyfileobj(file, copy)
            for offset, content in patches.items():
                copy.seek(offset)
                copy.write(content)
            copy.flush()
            file = copy
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        yield file


def foreign(path: str | os.PathLike[str]) -> str | None:
    """The name of a known format that libsndfile does not read; None for every other file, and for pipes."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp":
        return "MPEG-4 (as .m4a and .mp4 are)"
    return _FOREIGN.get(head[:4])


def _spooled(pipe: BinaryIO, copy: BinaryIO) -> BinaryIO:
    total = 0
    while block := pipe.read(2**20):
        total += len(block)
        if total > PIPE_LIMIT:
            raise BadAudio(f"more than {PIPE_LIMIT >> 30} GiB came through the pipe: give it as a file")
        copy.write(block)
    copy.flush()
    copy.seek(0)
    return copy


def _patches(file: BinaryIO, name: str) -> Patches:
    """What must be changed for the samples to be read to the end of the file; mostly nothing."""
    end = file.seek(0, os.SEEK_END)
    head = _at(file, 0, 12)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:] == b"WAVE":
        return _wave_patches(file, end, head[:4], name)
    if head[:4] == b"FORM" and head[8:] in (b"AIFF", b"AIFC"):
        return _aiff_patches(file, end, name)
    if head[:4] == b"caff":
        return _caf_patches(file, end, name)
    if head[:4] == b".snd":
        start, size = struct.unpack(">II", head[4:])
        known = size not in (0, _TO_THE_END)
        if known and end - start - size >= _STRAY:
            _say(name, size, end - start - size)
        elif known or end <= start:
            return {}
        return {8: b"\xff\xff\xff\xff"}
    return {}


def _wave_patches(file: BinaryIO, end: int, kind: bytes, name: str) -> Patches:
    chunks = _RIFX if kind == b"RIFX" else _RIFF
    at = chunks.find(file, 12, end, b"data")
    if at is None:
        return {}
    _, size = chunks.read(file, at) or (b"", 0)
    start, large = at + 8, None
    if kind == b"RF64":
        large = chunks.find(file, 12, end, b"ds64")  # where the sizes of such a file are
        if large is not None and size in (0, _TO_THE_END):
            (size,) = struct.unpack("<Q", _at(file, large + 16, 8).ljust(8, b"\0"))
    if start == end:
        return {}
    if 0 < size <= end - start:
        if not _goes_on(file, start, size, end, chunks, name):
            return {}
    elif large is None and (size or chunks.fill(file, start, end)):
        return {}
    patches = {at + 4: struct.pack(chunks.size, _TO_THE_END)}
    return patches if large is None else {0: b"RIFF", large: b"JUNK", **patches}


def _aiff_patches(file: BinaryIO, end: int, name: str) -> Patches:
    at = _AIFF.find(file, 12, end, b"SSND")
    if at is None:
        return {}
    _, size = _AIFF.read(file, at) or (b"", 0)
    if size <= 8 or not _goes_on(file, at + 8, size, end, _AIFF, name):
        return {}
    return {at + 4: struct.pack(">I", min(end - at - 8, _TO_THE_END))}


def _caf_patches(file: BinaryIO, end: int, name: str) -> Patches:
    at = _CAF.find(file, 8, end, b"data")
    if at is None:
        return {}
    _, size = _CAF.read(file, at) or (b"", 0)
    left = end - at - 12
    if left <= 4 or (0 < size <= left and not _goes_on(file, at + 12, size, end, _CAF, name)):
        return {}
    return {at + 4: struct.pack(">q", left)}


def _goes_on(file: BinaryIO, start: int, size: int, end: int, chunks: _Chunks, name: str) -> bool:
    """Whether samples follow the `size` bytes from `start` that the header counts; then it is said."""
    rest = start + size
    if end - rest < _STRAY:
        return False
    for at in {rest, rest + size % 2}:  # not everybody writes the byte of padding
        if _at(file, at, 8).startswith(_TAGS) or chunks.fill(file, at, end):
            return False
    _say(name, size, end - rest)
    return True


def _say(name: str, size: int, more: int) -> None:
    text = "%s: its header counts %d bytes of samples, and %d more follow: all of them are read"
    log.warning(text, name, size, more)


def _at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)
