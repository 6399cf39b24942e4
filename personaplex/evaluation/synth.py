"""A benchmark set made here, in Full-Duplex-Bench's layout: speech whose times are known by construction.

Utterances are synthesised, trimmed and laid at chosen samples, so that every mark is exact; no licence is
needed and any number of samples can be had. It shows what a model does in these situations and checks the
scorer; its figures do not compare with published ones, which come from other recordings.
"""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from personaplex.audio.wav import resample, write_wav
from personaplex.config import Pcm
from personaplex.errors import ConfigError
from personaplex.evaluation.dataset import TASKS, TRUTH_FILE
from personaplex.evaluation.speech import Span

Speak = Callable[[str, str], Pcm]  # text and voice to float32 [samples] at RATE, without silence around it

RATE = 16_000
VOICES = ("en-us+f3", "en-us+m3", "en-gb+f2", "en-gb-scotland+m1")
EXPECTED_FILE = "icc_gt_distribution.json"
TRIM = 0.01  # of the peak: what is softer at the ends is silence
OVERLAP_DB = (-8.0, -15.0)  # of speech that is not meant for the agent
_TIMEOUT_S = 60.0

_HALVES = (
    ("I have been thinking about going to", "the mountains with my family this summer."),
    ("The recipe that my grandmother gave me needs", "three eggs and a little bit of butter."),
    ("Yesterday I finally decided to call", "the garage about the noise in my car."),
    ("What I would really like to know is", "how long the train to the coast takes."),
    ("My sister moved into a new flat near", "the river, and she likes it very much."),
)
_QUESTIONS = (
    "Could you tell me what the capital of France is?",
    "How many days are there in a leap year?",
    "What should I cook for dinner tonight?",
    "Do you know how far the moon is from the earth?",
    "Which book would you take on a long journey?",
)
_INTERRUPTIONS = (
    "Wait, actually, tell me about the weather in Oslo instead.",
    "Sorry, one moment, how do I get to the station?",
    "Hold on, I meant the other one, the small red house.",
    "Stop, please, what time does the museum close today?",
    "Excuse me, can you say how much that would cost?",
)
_STORIES = (
    "So we drove all the way up to the lake and put the tent next to the water.",
    "In the morning there was fog everywhere and we could hardly see the other side.",
    "Then my brother made coffee on a small fire and burned half of the bread.",
    "After that it rained for two days, and we played cards until late at night.",
)
_ASIDES = (
    "Anna, can you close the window, please?",
    "Yes, the parcel is on the table in the kitchen.",
    "Tom, dinner is ready in five minutes.",
    "No, not now, I am talking on the phone.",
)
_BACKCHANNELS = ("Uh huh.", "Right, I see.", "Okay, yes.", "Mm, yeah.")


@dataclass
class Track:
    """A track that is being put together; `spans` are where each utterance lies."""

    sound: Pcm
    spans: list[Span]

    @classmethod
    def silent(cls, seconds: float) -> Track:
        return cls(np.zeros(round(seconds * RATE), np.float32), [])

    def lay(self, pcm: Pcm, at: float) -> Span:
        """Adds `pcm` from second `at` on; the recording grows where it must."""
        start = round(at * RATE)
        if start + len(pcm) > len(self.sound):
            self.sound = np.pad(self.sound, (0, start + len(pcm) - len(self.sound)))
        self.sound[start : start + len(pcm)] += pcm
        self.spans.append(Span(start / RATE, (start + len(pcm)) / RATE))
        return self.spans[-1]

    def extend(self, seconds: float) -> None:
        self.sound = np.pad(self.sound, (0, round(seconds * RATE)))


def espeak(text: str, voice: str) -> Pcm:
    """Speech of espeak-ng. Raises ConfigError when the program is missing or fails."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise ConfigError("the synthetic set needs espeak-ng (Debian: apt-get install espeak-ng)")
    command = [program, "--stdout", "-v", voice, "-s", "165", "--", text]
    done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S)
    if done.returncode or not done.stdout:
        raise ConfigError(f"espeak-ng failed: {done.stderr.decode(errors='replace').strip()[:200]}")
    return trimmed(*_decoded(done.stdout))


def trimmed(pcm: Pcm, rate: int) -> Pcm:
    """The first channel at RATE without silence at its ends, at a peak of 0.5. Raises ConfigError: silent."""
    mono = resample(pcm[0], rate, RATE)
    loud = np.flatnonzero(np.abs(mono) > TRIM * np.abs(mono).max(initial=0.0))
    if not len(loud):
        raise ConfigError("an utterance is silent")
    speech = mono[loud[0] : loud[-1] + 1]
    found: Pcm = (0.5 / np.abs(speech).max() * speech).astype(np.float32)
    return found


def _decoded(wav: bytes) -> tuple[Pcm, int]:
    """espeak-ng writes to a pipe and so cannot know the length that it puts into the header."""
    import soundfile

    with soundfile.SoundFile(io.BytesIO(_with_length(wav))) as sound:
        return sound.read(dtype="float32", always_2d=True).T, sound.samplerate


def _with_length(wav: bytes) -> bytes:
    return (
        wav[:4]
        + (len(wav) - 8).to_bytes(4, "little")
        + wav[8:40]
        + (len(wav) - 44).to_bytes(4, "little")
        + wav[44:]
    )


def synthesise(
    out: Path, each: int, seed: int = 0, speak: Speak = espeak, voices: Sequence[str] = VOICES
) -> int:
    """Writes `each` samples of every task below `out`, and EXPECTED_FILE; gives their number.

    The same seed gives the same samples. Raises ConfigError or OSError.
    """
    kept: dict[tuple[str, str], Pcm] = {}

    def said(text: str, voice: str) -> Pcm:
        if (text, voice) not in kept:
            kept[text, voice] = speak(text, voice)
        return kept[text, voice]

    expected = {}
    for task, make in _MAKERS.items():
        for number in range(each):
            chance = random.Random(f"{seed} {task} {number}")
            voice = voices[number % len(voices)]
            made = make(said, voice, chance, number)
            made.write(out / task / str(number), truth_of=task)
            if made.expected:
                expected[str(number)] = made.expected
    path = out / EXPECTED_FILE
    path.write_text(json.dumps(expected) + "\n", "utf-8")
    return each * len(_MAKERS)


@dataclass
class Made:
    """One sample: its recordings by stem and its JSON files by name."""

    recordings: Mapping[str, Track]
    files: Mapping[str, Any]
    expected: list[float] | None = None

    def write(self, folder: Path, truth_of: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for stem, recording in self.recordings.items():
            write_wav(folder / f"{stem}.wav", recording.sound, RATE)
        spans = {
            stem: [[one.start, one.end] for one in recording.spans]
            for stem, recording in self.recordings.items()
        }
        for name, content in {**self.files, TRUTH_FILE: {"task": truth_of, "user": spans}}.items():
            (folder / name).write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def _pause(said: Speak, voice: str, chance: random.Random, number: int) -> Made:
    first, second = _HALVES[number % len(_HALVES)]
    user = Track.silent(0.0)
    one = user.lay(said(first, voice), 0.5)
    two = user.lay(said(second, voice), one.end + chance.uniform(0.4, 1.0))
    user.extend(2.0)
    mark = {"text": "[PAUSE]", "timestamp": [one.end, two.start]}
    return Made({"input": user}, {"pause.json": [mark]})


def _turn(said: Speak, voice: str, chance: random.Random, number: int) -> Made:
    user = Track.silent(0.0)
    one = user.lay(said(_QUESTIONS[number % len(_QUESTIONS)], voice), chance.uniform(0.3, 0.8))
    user.extend(5.0)
    mark = {"text": "[TURN]", "timestamp": [one.end, one.end]}
    return Made({"input": user}, {"turn_taking.json": [mark]})


def _backchannel(said: Speak, voice: str, chance: random.Random, number: int) -> Made:
    """Four sentences with short gaps; listeners are taken to respond in the 0.6 s around each gap."""
    user, at, spots = Track.silent(0.0), 0.4, []
    for offset in range(len(_STORIES)):
        span = user.lay(said(_STORIES[(number + offset) % len(_STORIES)], voice), at)
        at = span.end + chance.uniform(0.2, 0.35)
        spots.append(span.end)
    windows = len(user.sound) * 5 // RATE + 1
    weights = [float(any(-0.1 <= 0.2 * one - spot < 0.5 for spot in spots)) for one in range(windows)]
    return Made({"input": user}, {}, [weight / sum(weights) for weight in weights])


def _interruption(said: Speak, voice: str, chance: random.Random, number: int) -> Made:
    question, other = _QUESTIONS[number % len(_QUESTIONS)], _INTERRUPTIONS[number % len(_INTERRUPTIONS)]
    user = Track.silent(0.0)
    one = user.lay(said(question, voice), 0.3)
    two = user.lay(said(other, voice), one.end + 7.0)
    user.extend(15.0)
    mark = {"context": question, "interrupt": other, "timestamp": [two.start, two.end]}
    return Made({"input": user}, {"interrupt.json": [mark]})


def _overlap(texts: Sequence[str], another: bool, softer: bool) -> Callable[..., Made]:
    """v1.5: one turn, then speech over the agent's answer: by the user or `another`, `softer` or not."""

    def make(said: Speak, voice: str, chance: random.Random, number: int) -> Made:
        question, other = _QUESTIONS[number % len(_QUESTIONS)], texts[number % len(texts)]
        clean = Track.silent(0.0)
        one = clean.lay(said(question, voice), 0.3)
        user = Track(clean.sound, list(clean.spans))
        speech = said(other, VOICES[(VOICES.index(voice) + 1) % len(VOICES)] if another else voice)
        gain = 10 ** (OVERLAP_DB[number % len(OVERLAP_DB)] / 20) if softer else 1.0
        two = user.lay((gain * speech).astype(np.float32), one.end + chance.uniform(3.0, 4.0))
        user.extend(8.0)
        clean.sound = np.pad(clean.sound, (0, len(user.sound) - len(clean.sound)))
        data = {"context_text": question, "current_turn_text": other, "timestamps": [two.start, two.end]}
        return Made({"input": user, "clean_input": clean}, {"metadata.json": data})

    return make


_MAKERS: Mapping[str, Callable[[Speak, str, random.Random, int], Made]] = {
    "synthetic_pause_handling": _pause,
    "candor_turn_taking": _turn,
    "icc_backchannel": _backchannel,
    "synthetic_user_interruption": _interruption,
    "user_interruption": _overlap(_INTERRUPTIONS, False, False),
    "user_backchannel": _overlap(_BACKCHANNELS, False, False),
    "talking_to_other": _overlap(_ASIDES, False, True),
    "background_speech": _overlap(_ASIDES, True, True),
}
assert set(_MAKERS) <= set(TASKS)
