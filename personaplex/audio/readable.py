"""Recordings as people have them, made fit for libsndfile: pipes, headers whose sizes were never filled in.

A recorder that was cut off, or wrote to a pipe, leaves 0 or -1 where the length belongs. libsndfile then
finds nothing, or refuses, although the samples follow; they are read to the end of the file here.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import BinaryIO

from personaplex.errors import BadAudio
from personaplex.files import LFS_ADVICE

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

Patches = dict[int, bytes]  # offset in the file -> what belongs there


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
        if patches := _patches(file):
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


def _patches(file: BinaryIO) -> Patches:
    """What must be changed for the samples to be read to the end of the file; mostly nothing."""
    end = file.seek(0, os.SEEK_END)
    head = _at(file, 0, 12)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64") and head[8:] == b"WAVE":
        return _wave_patches(file, end, head[:4])
    if head[:4] == b"caff":
        return _caf_patches(file, end)
    if head[:4] == b".snd" and head[8:] == bytes(4):
        (start,) = struct.unpack(">I", head[4:8])
        return {8: b"\xff\xff\xff\xff"} if end > start else {}
    return {}


def _wave_patches(file: BinaryIO, end: int, kind: bytes) -> Patches:
    order = ">" if kind == b"RIFX" else "<"
    at, large = 12, None  # `large`: where the sizes of an RF64 file are
    for _ in range(CHUNK_LIMIT):
        chunk = _at(file, at, 8)
        if len(chunk) < 8:
            return {}
        name, size = chunk[:4], struct.unpack(order + "I", chunk[4:])[0]
        if name == b"data":
            break
        if name == b"ds64":
            large = at
        at += 8 + size + size % 2
    else:
        return {}
    start = at + 8
    if kind == b"RF64" and large is not None:
        if size in (0, _TO_THE_END):
            (size,) = struct.unpack("<Q", _at(file, large + 16, 8).ljust(8, b"\0"))
        if 0 < size <= end - start or start == end:
            return {}
        return {0: b"RIFF", large: b"JUNK", at + 4: struct.pack("<I", _TO_THE_END)}
    if size or start == end or _only_chunks(file, start, end, order):
        return {}
    return {at + 4: struct.pack(order + "I", _TO_THE_END)}


def _only_chunks(file: BinaryIO, at: int, end: int, order: str) -> bool:
    """Whether nothing but whole chunks is left, as behind a recording that really is empty."""
    for _ in range(CHUNK_LIMIT):
        if at >= end:
            break
        chunk = _at(file, at, 8)
        if len(chunk) < 8 or not (chunk[:4].isascii() and chunk[:4].decode().isprintable()):
            return False
        (size,) = struct.unpack(order + "I", chunk[4:])
        at += 8 + size + size % 2
    return at - end in (0, 1)


def _caf_patches(file: BinaryIO, end: int) -> Patches:
    at = 8
    for _ in range(CHUNK_LIMIT):
        chunk = _at(file, at, 12) if at < end else b""
        if len(chunk) < 12:
            break
        name, size = chunk[:4], struct.unpack(">q", chunk[4:])[0]
        if name == b"data":
            left = end - at - 12
            return {at + 4: struct.pack(">q", left)} if left > 4 and not 0 < size <= left else {}
        if size < 0:
            return {}
        at += 12 + size
    return {}


def _at(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)
