"""Callers that no training hears: other synthesisers' voices, held-back wordings, the line's codec and
noise.

The voices are flite's (`slt` a woman, `rms` and `awb` men), which the operating system's package provides.
A caller is a wave with the moment the speech ends; `through_line` is Opus at 32 kb/s with noise at a given
ratio.
"""

from __future__ import annotations

import random
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr

from personaplex.audio.opus import OpusDecoder, OpusEncoder
from personaplex.config import SAMPLE_RATE
from personaplex.training import grammar
from personaplex.training.synth import Array

VOICES = ("slt", "rms", "awb")
_LOUDNESS = 0.08
_PACKET = 480
_QUIET = 0.02  # of the loudest sample: below is no speech


@dataclass(frozen=True)
class Caller:
    wave: Array  # float32 at 24 kHz, speech only
    text: str
    intent: str
    voice: str
    held_back: bool  # the wording too is unseen


def flite(text: str, voice: str) -> Array:
    """Speech at 24 kHz, trimmed, of the loudness of all callers. Raises RuntimeError without flite."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        done = subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(path)], capture_output=True)
        if done.returncode or not path.exists():
            raise RuntimeError(f"flite failed: {done.stderr.decode(errors='replace').strip()}")
        wave, rate = soundfile.read(path, dtype="float32")
    wave = soxr.resample(wave, rate, SAMPLE_RATE).astype(np.float32)
    loud = np.nonzero(np.abs(wave) > _QUIET * np.abs(wave).max())[0]
    wave = wave[max(0, loud[0] - 480) : loud[-1] + 480]
    return np.asarray(wave * (_LOUDNESS / np.sqrt(np.mean(wave**2))), np.float32)


def callers(per_intent: int, seed: int = 0) -> list[Caller]:
    """For every intent and voice so many questions, every other of them in a held-back wording."""
    draw = random.Random(seed)
    made = []
    for intent in (*grammar.INTENTS, grammar.UNKNOWN):
        for voice in VOICES:
            for index in range(per_intent):
                held = index % 2 == 0
                text = grammar.question(draw, intent, unseen=held)
                made.append(Caller(flite(text, voice), text, intent, voice, held))
    return made


def through_line(wave: Array, ratio: float, rng: np.random.Generator, bitrate: int = 32_000) -> Array:
    """wave behind Opus, with white noise `ratio` dB below its loudness; the codec's delay is taken out."""
    level = np.sqrt(np.mean(np.square(wave)[np.abs(wave) > 1e-4]))
    noisy = wave + rng.standard_normal(len(wave)).astype(np.float32) * np.float32(level * 10 ** (-ratio / 20))
    encoder, decoder = OpusEncoder(bitrate, complexity=5), OpusDecoder()
    padded = np.pad(noisy, (0, -len(noisy) % _PACKET + _PACKET)).astype(np.float32)
    packets = [encoder.encode(padded[i : i + _PACKET]) for i in range(0, len(padded), _PACKET)]
    decoded = np.concatenate([decoder.decode(packet).copy() for packet in packets])
    return decoded[encoder.lookahead : encoder.lookahead + len(wave)]


def paused(speech: Array, seconds: float) -> Array:
    """The wave with a pause where it is softest in its middle half."""
    width = SAMPLE_RATE // 50
    quarter = len(speech) // 4
    energy = np.convolve(np.square(speech), np.ones(width), "same")[quarter : 3 * quarter]
    place = quarter + int(energy.argmin())
    pause = np.zeros(int(seconds * SAMPLE_RATE), np.float32)
    return np.concatenate([speech[:place], pause, speech[place:]])
