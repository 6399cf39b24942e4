"""A recording of a voice: as the model hears it, and what is wrong with it. No torch.

The model heard voices at -24 LUFS in training, so a recording is brought there (loudness after ITU-R
BS.1770-4). `check` says in words what a person could do better; a voice can be made of it all the same.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from personaplex.audio.wav import SAMPLE_LIMIT, one_channel, read_wav, resample
from personaplex.config import SAMPLE_RATE, Pcm
from personaplex.errors import BadAudio

LOUDNESS = -24.0  # LUFS of a voice recording, as in training
SHORTEST_SECONDS = 0.4  # one loudness block
LONGEST_SECONDS = 240.0  # what the 7B model remembers

ADVISED_SECONDS = 5.0
CLIPPED_SHARE = 1e-3  # of the samples
FULL_SCALE = 0.99
QUIET_LUFS = -45.0
NOISE_DB = 15.0  # of the background below the speech
SILENCE_DB = 40.0  # of a pause below the speech, at least
DIGITAL_SILENCE_DB = -80.0
_BLOCK = SAMPLE_RATE // 50  # 20 ms

Kind = Literal["short", "clipped", "silent", "noisy", "quiet"]


@dataclass(frozen=True)
class Problem:
    """What is wrong with a recording, and what to do about it."""

    kind: Kind
    text: str


@dataclass(frozen=True, eq=False)
class VoiceRecording:
    """`pcm` float32 [samples] at 24 kHz, normalised; `loudness` in LUFS before that."""

    pcm: Pcm
    loudness: float
    problems: tuple[Problem, ...]

    @property
    def seconds(self) -> float:
        return len(self.pcm) / SAMPLE_RATE


def load_voice_wav(path: str | os.PathLike[str]) -> Pcm:
    """A recording as the model hears voices: float32 [samples] at 24 kHz, first channel, -24 LUFS.

    Raises BadAudio when it is unreadable, shorter than 0.4 s, longer than 240 s or silent.
    """
    return read_voice(path).pcm


def read_voice(
    path: str | os.PathLike[str], longest_s: float = LONGEST_SECONDS, sample_limit: int = SAMPLE_LIMIT
) -> VoiceRecording:
    """As `load_voice_wav`, with what there is to say of the recording. `sample_limit` is of all channels
    together."""
    import pyloudnorm  # here, so that who reads no voices needs no loudness

    pcm, rate = read_wav(path, sample_limit)
    if pcm.shape[1] > longest_s * rate:
        raise BadAudio(f"a voice recording must last at most {longest_s:g} s")
    heard = one_channel(pcm, os.path.basename(path))
    mono = resample(heard, rate, SAMPLE_RATE)
    if len(mono) < SHORTEST_SECONDS * SAMPLE_RATE:
        raise BadAudio(f"a voice recording must last at least {SHORTEST_SECONDS} s")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # silence: means of nothing, logarithms of zero
        loudness = float(pyloudnorm.Meter(SAMPLE_RATE).integrated_loudness(mono))
    if not np.isfinite(loudness):
        raise BadAudio("the voice recording is silent")
    normalised: Pcm = mono * np.float32(10.0 ** ((LOUDNESS - loudness) / 20.0))
    return VoiceRecording(normalised, loudness, check(heard, mono, loudness))


def check(heard: Pcm, mono: Pcm, loudness: float) -> tuple[Problem, ...]:
    """What is wrong with a recording: `heard` float32 [n] as it was read, `mono` [samples] at 24 kHz."""
    found, seconds = [], len(mono) / SAMPLE_RATE
    if seconds < ADVISED_SECONDS:
        words = f"it lasts only {seconds:.1f} s: ten seconds of speech or more make a better voice"
        found.append(Problem("short", words))
    if (share := clipped_share(heard)) > CLIPPED_SHARE:
        words = f"{100 * share:.1f} % of it is clipped: record at a lower level, farther from the microphone"
        found.append(Problem("clipped", words))
    levels = _levels(mono)
    speech = float(np.percentile(levels, 95))
    silent = float((levels < max(speech - SILENCE_DB, DIGITAL_SILENCE_DB)).mean())
    if silent > 0.5:
        words = f"{100 * silent:.0f} % of it is silence: cut the pauses, or speak for longer"
        found.append(Problem("silent", words))
    background = float(np.percentile(levels, 10))
    if speech - background < NOISE_DB:
        words = f"the background is only {speech - background:.0f} dB below the speech: use a quieter room"
        found.append(Problem("noisy", words))
    if loudness < QUIET_LUFS:
        words = f"it is very quiet ({loudness:.0f} LUFS): record at a higher level, closer to the microphone"
        found.append(Problem("quiet", words))
    return tuple(found)


def clipped_share(heard: Pcm) -> float:
    """Share of the samples at full scale, or in a run of equal ones at the recording's own ceiling: what
    clips stays flat, also when it was turned down later."""
    level = np.abs(heard)
    equal = (heard[1:] == heard[:-1]) & (level[1:] >= FULL_SCALE * level.max())
    flat = np.zeros(len(heard), bool)
    runs = equal[1:] & equal[:-1]  # three in a row
    for shift in range(3):
        flat[shift : shift + len(runs)] |= runs
    return float((flat | (level >= FULL_SCALE)).mean())


def _levels(mono: Pcm) -> NDArray[np.float64]:
    """Level of each 20 ms, dB of full scale."""
    blocks = mono[: len(mono) // _BLOCK * _BLOCK].reshape(-1, _BLOCK).astype(np.float64)
    levels: NDArray[np.float64] = 10.0 * np.log10(np.maximum((blocks**2).mean(axis=1), 1e-12))
    return levels
