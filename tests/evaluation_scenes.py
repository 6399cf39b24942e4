"""Scenes for the evaluation's tests: committed utterances laid at known moments, as files.

`KeptDetector` gives the probabilities that Silero's model gave for these very scenes, so that scoring on
sound is tested without it; `python tests/evaluation_scenes.py` makes them anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import random
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from personaplex.evaluation.dataset import Sample, load
from personaplex.evaluation.speech import Span, Track, Word, merge
from personaplex.evaluation.synth import EXPECTED_FILE, synthesise
from personaplex.evaluation.vad import segments
from personaplex.transcription.silero import RATE

DATA = Path(__file__).parent / "data" / "evaluation"
KEPT = DATA / "probabilities.npz"
TEXTS: dict[str, str] = json.loads((DATA / "texts.json").read_text())


class Said(NamedTuple):
    """An utterance and when it starts, perhaps cut short."""

    name: str
    start: float
    until: float = math.inf

    @property
    def end(self) -> float:
        return min(self.start + lasts(self.name), self.until)


@cache
def utterance(name: str) -> np.ndarray:
    """int16 [samples] at 16 kHz."""
    pcm, rate = soundfile.read(DATA / f"{name}.flac", dtype="int16")
    assert rate == RATE
    return pcm


def lasts(name: str) -> float:
    return len(utterance(name)) / RATE


def sound(said: Sequence[Said], seconds: float) -> np.ndarray:
    """int16 [samples]."""
    pcm = np.zeros(round(seconds * RATE), np.int16)
    for one in said:
        start, end = round(one.start * RATE), round(one.end * RATE)
        piece = utterance(one.name)[: max(0, min(end, len(pcm)) - start)]
        pcm[start : start + len(piece)] += piece
    return pcm


def track(said: Sequence[Said], seconds: float) -> Track:
    """The truth about `sound`: words lie evenly in their utterances."""
    words = []
    for one in said:
        texts = TEXTS[one.name].split()
        size = lasts(one.name) / len(texts)
        starts = [one.start + number * size for number in range(len(texts))]
        placed = zip(texts, starts, strict=True)
        words += [Word(text, at, min(at + size, one.end)) for text, at in placed if at < one.end]
    return Track(seconds, tuple(Span(one.start, one.end) for one in said), tuple(words))


def write_answer(folder: Path, said: Sequence[Said], seconds: float) -> None:
    """output.wav of at least `seconds` and output.json, with the true words."""
    folder.mkdir(parents=True, exist_ok=True)
    seconds = max([seconds, *(one.end + 0.2 for one in said)])
    soundfile.write(folder / "output.wav", sound(said, seconds), RATE, subtype="PCM_16")
    words = track(said, seconds).words
    chunks = [{"text": word.text, "timestamp": [word.start, word.end]} for word in words]
    (folder / "output.json").write_text(json.dumps({"text": "", "chunks": chunks}))


def digest(pcm: np.ndarray) -> str:
    return hashlib.sha256(np.round(pcm * 32_768).astype("<i2").tobytes()).hexdigest()[:16]


class KeptDetector:
    """A detector that knows the scenes of these tests."""

    def __init__(self) -> None:
        self._kept = np.load(KEPT)

    def segments(self, pcm: np.ndarray, rate: int) -> list[Span]:
        assert rate == RATE
        if not pcm.any():
            return []
        name = digest(pcm)
        assert name in self._kept, "a scene changed: run python tests/evaluation_scenes.py"
        return segments(self._kept[name], len(pcm))


@dataclass
class KeepingDetector:
    """Silero's model, which remembers what it was asked."""

    kept: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from personaplex.evaluation.vad import Detector

        self._detector = Detector()

    def segments(self, pcm: np.ndarray, rate: int) -> list[Span]:
        found = self._detector.probabilities(pcm).astype(np.float16)
        if pcm.any():
            self.kept[digest(pcm)] = found
        return segments(found, len(pcm))


class LoudnessDetector:
    """Speech is what is loud: enough for scenes without noise, where no model is installed."""

    def segments(self, pcm: np.ndarray, rate: int) -> list[Span]:
        window = rate // 100
        energy = np.abs(pcm[: len(pcm) // window * window]).reshape(-1, window).max(1, initial=0.0)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], energy > 0.02, [0]])))
        spans = [Span(start / 100, end / 100) for start, end in edges.reshape(-1, 2)]
        return [one for one in merge(spans, 0.15) if one.length > 0.2]


class StallingDetector(LoudnessDetector):
    """Says so in a file at its n-th recording, and then never comes back."""

    def __init__(self, calls: int, ready: Path) -> None:
        self._left, self._ready = calls, ready

    def segments(self, pcm: np.ndarray, rate: int) -> list[Span]:
        self._left -= 1
        if self._left == 0:
            self._ready.touch()
            threading.Event().wait()
        return super().segments(pcm, rate)


# A user's samples, as the design's vectors have them


def write_sample(
    root: Path, task: str, name: str, said: Sequence[Said], seconds: float, mark: object
) -> Sample:
    """One sample on disk, read back as the command reads it."""
    files = {
        "synthetic_pause_handling": "pause.json",
        "candor_turn_taking": "turn_taking.json",
        "synthetic_user_interruption": "interrupt.json",
    }
    folder = root / task / name
    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / "input.wav", sound(said, seconds), RATE, subtype="PCM_16")
    if task in files:
        (folder / files[task]).write_text(json.dumps([mark]))
    return next(one for one in load(root, [task]).samples if one.id == name)


def pause_sample(root: Path) -> Sample:
    """Speaks to 1.74, pauses to 2.74, then goes on."""
    first = 1.74 - lasts("half_a")
    said = [Said("half_a", first), Said("half_b", 2.74)]
    mark = {"text": "[PAUSE]", "timestamp": [1.74, 2.74]}
    return write_sample(root, "synthetic_pause_handling", "0", said, 8.0, mark)


TURN_END = 2.176


def turn_sample(root: Path, name: str = "0") -> Sample:
    said = [Said("question", TURN_END - lasts("question"))]
    mark = {"text": "[TURN]", "timestamp": [TURN_END, TURN_END]}
    return write_sample(root, "candor_turn_taking", name, said, TURN_END + 5.0, mark)


INTERRUPTED = Span(6.0, 8.8385)


def interruption_sample(root: Path) -> Sample:
    assert abs(6.0 + lasts("interruption") - INTERRUPTED.end) < 1e-9
    said = [Said("question", 0.5), Said("interruption", 6.0)]
    mark = {"context": "", "interrupt": "", "timestamp": [INTERRUPTED.start, INTERRUPTED.end]}
    return write_sample(root, "synthetic_user_interruption", "0", said, 20.0, mark)


def backchannel_sample(root: Path) -> Sample:
    said = [Said("story", 0.4 + 4.5 * number) for number in range(4)]
    return write_sample(root, "icc_backchannel", "0", said, 20.0, None)


# Scripted agents, on a set that is made of the same utterances

AGENTS = ("silent", "oracle", "eager", "backchanneller", "stubborn", "one-word")
USERS = ("half_a", "half_b", "question", "interruption", "story")
EACH = 2


def speak(text: str, voice: str) -> np.ndarray:
    """One of the committed utterances, whatever the text."""
    name = USERS[random.Random(text).randrange(len(USERS))]
    return utterance(name).astype(np.float32) / 32_768


def make_set(root: Path) -> tuple[list[Sample], dict[str, list[float]]]:
    """Four tasks of the synthetic set, EACH samples of them, and where backchannels are expected."""
    synthesise(root, EACH, speak=speak)
    names = [
        "synthetic_pause_handling",
        "candor_turn_taking",
        "icc_backchannel",
        "synthetic_user_interruption",
    ]
    return list(load(root, names).samples), json.loads((root / EXPECTED_FILE).read_text())


def scripted(agent: str, sample: Sample) -> list[Said]:
    """What `agent` says to a sample, of which it knows the truth."""
    spans = [Span(*one) for one in json.loads((sample.folder / "truth.json").read_text())["user"]["input"]]
    length = soundfile.info(sample.recording()).duration
    return _SCRIPTS[agent](sample, spans, length)


def _oracle(sample: Sample, user: list[Span], length: float) -> list[Said]:
    if sample.kind == "backchannel":
        return [Said("uh_huh", one.end - 0.05) for one in user]
    if sample.kind != "interruption":
        return [Said("six", user[-1].end + 0.4)]
    return [
        Said("fourteen", user[1].start - 3.0, user[1].start + 0.4),
        Said("seven", user[1].end + 0.5),
    ]


def _eager(sample: Sample, user: list[Span], length: float) -> list[Said]:
    if sample.kind == "pause":
        return [Said("fourteen", user[0].end + 0.2)]
    if sample.kind == "backchannel":
        return [Said("fourteen", 5.0)]
    return [Said("six", user[-1].end - 0.5)]


def _backchanneller(sample: Sample, user: list[Span], length: float) -> list[Said]:
    return [Said("uh_huh", one.start + 0.6) for one in user]


def _stubborn(sample: Sample, user: list[Span], length: float) -> list[Said]:
    size = lasts("fourteen") + 0.05
    return [Said("fourteen", 0.1 + size * number) for number in range(int((length - 0.1) / size))]


def _one_word(sample: Sample, user: list[Span], length: float) -> list[Said]:
    return [Said("paris", user[-1].end + 1.0)]


_SCRIPTS: dict[str, Callable[[Sample, list[Span], float], list[Said]]] = {
    "silent": lambda sample, user, length: [],
    "oracle": _oracle,
    "eager": _eager,
    "backchanneller": _backchanneller,
    "stubborn": _stubborn,
    "one-word": _one_word,
}


def _make() -> None:
    import tempfile

    sys.path.insert(0, str(Path(__file__).parent / "unit"))
    import test_evaluation_sound as tests

    detector = KeepingDetector()
    with tempfile.TemporaryDirectory() as folder:
        for number, check in enumerate(tests.ON_SOUND):
            with contextlib.suppress(AssertionError):  # the tests will tell
                check(Path(folder) / str(number), detector)
    np.savez_compressed(KEPT, **detector.kept)


if __name__ == "__main__":
    _make()
