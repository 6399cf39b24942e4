"""Recorded calls for the tests of fine-tuning: tones for speech, at times that the transcripts say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from personaplex.audio.wav import write_wav
from personaplex.config import SAMPLE_RATE

WORDS = (("Hello", 1.0, 1.3), ("you", 1.4, 1.6), ("there.", 1.7, 2.1))


def sound(seconds: float = 3.0, rate: int = SAMPLE_RATE, pitch: float = 200.0) -> NDArray[np.float32]:
    """[2, samples]: the agent hums from 1.0 to 2.1 s, the user from 0.1 to 0.8 s."""
    time = np.arange(int(seconds * rate)) / rate
    both = np.zeros((2, len(time)), np.float32)
    for channel, start, stop in ((0, 1.0, 2.1), (1, 0.1, 0.8)):
        tone = 0.2 * np.sin(2 * np.pi * pitch * (1 + channel) * time)
        both[channel] = np.where((time >= start) & (time < stop), tone, 0)
    return both


def transcript(path: Path, words: object = None, **more: object) -> None:
    rows = [[text, [start, end], "SPEAKER_MAIN"] for text, start, end in WORDS] if words is None else words
    path.write_text(json.dumps({"alignments": rows, **more}))


def write_call(folder: Path, name: str, pitch: float = 200.0, **more: object) -> Path:
    """NAME.wav and NAME.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_wav(folder / f"{name}.wav", sound(pitch=pitch), SAMPLE_RATE)
    transcript(folder / f"{name}.json", **more)
    return folder / f"{name}.wav"
