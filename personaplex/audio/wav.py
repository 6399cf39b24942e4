"""Sound files in and out, and resampling.

libsndfile gets file descriptors, not Python files: it would call back into those, and a Ctrl-C that falls
into such a call is swallowed, with half the file read or written.
"""

from __future__ import annotations

import errno
import logging
import os

import numpy as np
import soundfile
import soxr

from personaplex.audio.readable import foreign, opened
from personaplex.config import Pcm
from personaplex.errors import BadAudio
from personaplex.files import replacing

log = logging.getLogger(__name__)


LOWEST_RATE, HIGHEST_RATE = 4_000, 768_000  # Hz; below, a file would grow more than 6-fold at 24 kHz
CHANNEL_LIMIT = 64
SAMPLE_LIMIT = 2**29  # of all channels together, 2 GiB in memory: three hours at 48 kHz, mono

_BLOCK = 2**18  # samples read at once
_UNKNOWN = 2**63 - 1  # libsndfile's number of frames for a FLAC stream that does not say

LOUDEST = 8.0  # 18 dB over full scale; float samples beyond that are integers in another type
INTEGER_SCALES = (2.0**15, 2.0**23, 2.0**31)
SILENT, AUDIBLE = 1e-3, 1e-2  # peaks: a channel that holds at most noise, and one that surely holds more


def read_wav(path: str | os.PathLike[str], sample_limit: int = SAMPLE_LIMIT) -> tuple[Pcm, int]:
    """Samples float32 [channels, samples] and the rate in Hz, of any format libsndfile reads, from files and
    pipes. Full scale is 1, which only float formats exceed. `sample_limit` is of all channels together.

    Nothing is allocated for what a header claims, only for samples that were there. Raises BadAudio when the
    file cannot be read as sound, holds none, or is outside the bounds above; FileNotFoundError and
    PermissionError are left to the caller, who alone may show a path.
    """
    try:
        with (
            opened(path) as file,
            soundfile.SoundFile(file.fileno(), "r", closefd=False) as sound,
        ):
            _check_header(sound.samplerate, sound.channels, sound.frames, sample_limit)
            pcm, rate = _join(_blocks(sound, sample_limit), sound.channels), int(sound.samplerate)
    except IsADirectoryError as error:
        raise BadAudio("a folder cannot be read as audio") from error
    except (soundfile.LibsndfileError, RuntimeError, TypeError, ValueError) as error:
        raise _unreadable(path) from error
    return _full_scale(pcm, os.path.basename(path)), rate


def _check_header(rate: int, channels: int, frames: int, limit: int) -> None:
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise BadAudio(f"a sampling rate of {rate} Hz: from {LOWEST_RATE} to {HIGHEST_RATE} Hz can be read")
    if channels > CHANNEL_LIMIT:
        raise BadAudio(f"{channels} channels: at most {CHANNEL_LIMIT} can be read")
    if frames == _UNKNOWN:
        raise BadAudio("the file does not say how many samples it holds")
    if frames * channels > limit:
        raise _too_long(limit)


def _blocks(sound: soundfile.SoundFile, limit: int) -> list[Pcm]:
    """All samples, in pieces of float32 [samples, channels]."""
    blocks, left = [], limit
    while len(block := sound.read(_BLOCK // sound.channels, dtype="float32", always_2d=True)):
        left -= block.size
        if left < 0:
            raise _too_long(limit)
        if not np.isfinite(block).all():
            raise BadAudio("the file holds samples that are not numbers")
        blocks.append(block)
    return blocks


def _join(blocks: list[Pcm], channels: int) -> Pcm:
    """float32 [channels, samples] of blocks [samples, channels], each let go of as soon as it is copied."""
    total = sum(len(block) for block in blocks)
    if not total:
        raise BadAudio("the file holds no audio")
    pcm: Pcm = np.empty((channels, total), np.float32)
    while blocks:
        block = blocks.pop()
        pcm[:, total - len(block) : total] = block.T
        total -= len(block)
    return pcm


def _too_long(limit: int) -> BadAudio:
    return BadAudio(f"the file holds more than {limit} samples, all channels together: cut it up")


def _unreadable(path: str | os.PathLike[str]) -> BadAudio:
    kind = foreign(path)
    known = f": it is {kind}, which libsndfile does not read; convert it to WAV or FLAC" if kind else ""
    return BadAudio(f"the file cannot be read as audio{known}")


def _full_scale(pcm: Pcm, name: str) -> Pcm:
    """Brings float samples that are really integers to a full scale of 1, and says so."""
    peak = max(float(pcm.max()), -float(pcm.min()))
    if peak <= LOUDEST:
        return pcm
    scale = next((scale for scale in INTEGER_SCALES if peak <= scale), None)
    if scale is None:
        raise BadAudio(f"the file holds samples up to {peak:.3g}, where full scale is 1")
    log.warning("%s: float samples up to %.0f are taken as integers and divided by %.0f", name, peak, scale)
    scaled: Pcm = pcm / np.float32(scale)
    return scaled


def one_channel(pcm: Pcm, name: str, channel: int = 1, option: str = "") -> Pcm:
    """Samples [samples] of one channel, counted from 1, of [channels, samples].

    Warns, naming the file, when that one is silent and another is not; `option` is how to choose that one.
    Raises BadAudio when it is not there.
    """
    if channel > len(pcm):
        raise BadAudio(f"there is no channel {channel}: the recording has {len(pcm)}")
    peaks = np.abs(pcm).max(axis=1)
    loudest = int(peaks.argmax())
    if peaks[channel - 1] < SILENT and peaks[loudest] >= AUDIBLE:
        advice = f" ({option} {loudest + 1})" if option else ""
        log.warning(
            "%s: channel %d, which is taken, is silent; channel %d is not%s",
            *(name, channel, loudest + 1, advice),
        )
    chosen: Pcm = pcm[channel - 1]
    return chosen


def write_wav(path: str | os.PathLike[str], pcm: Pcm, rate: int) -> None:
    """Writes [samples] or [channels, samples] as 16-bit PCM, clipped to [-1, 1], all of it or nothing.

    Raises OSError when it cannot be written, for example on a full disk.
    """
    with replacing(path) as part, part.open("xb") as file:
        clipped = np.clip(pcm.T, -1.0, 1.0)
        try:
            soundfile.write(file.fileno(), clipped, rate, format="WAV", subtype="PCM_16", closefd=False)
        except (soundfile.LibsndfileError, AssertionError) as error:  # the latter: fewer samples were taken
            os.write(file.fileno(), bytes(2 * pcm.size))  # libsndfile does not say why; the system does
            raise OSError(errno.EIO, os.strerror(errno.EIO)) from error
        if os.fstat(file.fileno()).st_size < 2 * pcm.size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def resample(pcm: Pcm, rate: int, target: int) -> Pcm:
    """float32 [..., samples] at `rate` Hz to `target` Hz (soxr, high quality); the same array when equal."""
    if rate == target:
        return pcm
    # soxr wants [samples] or [samples, channels].
    return np.ascontiguousarray(soxr.resample(pcm.T, rate, target, quality="HQ").T, dtype=np.float32)
