"""Sound files in and out, and resampling.

libsndfile gets file descriptors, not Python files: it would call back into those, and a Ctrl-C that falls
into such a call is swallowed, with half the file read or written.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from personaplex.errors import BadAudio
from personaplex.files import replacing

Pcm = npt.NDArray[np.float32]


def read_wav(path: str | os.PathLike[str]) -> tuple[Pcm, int]:
    """Samples float32 [channels, samples] within [-1, 1] and the rate in Hz, of any format libsndfile reads.

    Raises BadAudio when the file cannot be read as sound or holds none; FileNotFoundError and PermissionError
    are left to the caller, who alone may show a path.
    """
    try:
        with open(path, "rb") as file:
            pcm, rate = soundfile.read(file.fileno(), dtype="float32", always_2d=True, closefd=False)
    except (soundfile.LibsndfileError, RuntimeError) as error:
        raise BadAudio("the file cannot be read as audio") from error
    if not pcm.size:
        raise BadAudio("the file holds no audio")
    if not np.isfinite(pcm).all():
        raise BadAudio("the file holds samples that are not numbers")
    return np.ascontiguousarray(pcm.T), int(rate)


def write_wav(path: str | os.PathLike[str], pcm: Pcm, rate: int) -> None:
    """Writes [samples] or [channels, samples] as 16-bit PCM, clipped to [-1, 1], all of it or nothing."""
    with replacing(path) as part, part.open("xb") as file:
        clipped = np.clip(pcm.T, -1.0, 1.0)
        soundfile.write(file.fileno(), clipped, rate, format="WAV", subtype="PCM_16", closefd=False)


def resample(pcm: Pcm, rate: int, target: int) -> Pcm:
    """float32 [..., samples] at `rate` Hz to `target` Hz (soxr, high quality); the same array when equal."""
    if rate == target:
        return pcm
    # soxr wants [samples] or [samples, channels].
    return np.ascontiguousarray(soxr.resample(pcm.T, rate, target, quality="HQ").T, dtype=np.float32)
