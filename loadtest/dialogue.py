"""Scripted dialogues: the benchmark's recordings spoken to a live service, the answers kept to be scored.

Sessions take the samples in turn. What a client heard is laid where it heard it, network and codecs included,
in the layout of `python -m personaplex.evaluate score`, so that the same code scores answers made offline and
under load. Nothing is decoded before the test is over: that would make pages late.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadtest.arrivals import Arrival
from loadtest.speech import Speech
from personaplex.audio.recorder import Recorder
from personaplex.audio.transcoder import Transcoder
from personaplex.audio.wav import write_wav
from personaplex.config import FRAME_SECONDS, SAMPLE_RATE
from personaplex.errors import ConfigError, PersonaplexError, SessionLost
from personaplex.evaluation import transcript
from personaplex.evaluation.dataset import TASKS, Sample, load
from personaplex.evaluation.scoring import RECORD_VERSION, SAMPLE_FILE, write_json
from personaplex.evaluation.speech import Word
from personaplex.persona import PROMPTS

RUN_FILE = "run.json"


@dataclass
class Heard:
    """What one session heard, as it came; times in seconds of the session's clock."""

    pages: list[tuple[float, bytes]] = field(default_factory=list)
    texts: list[tuple[float, str]] = field(default_factory=list)
    live_at: float | None = None  # never, for a session that was refused


@dataclass(frozen=True)
class Dialogue:
    """One sample as one session speaks it."""

    sample: Sample
    repeat: int
    speech: Speech
    prompt: str
    heard: Heard = field(default_factory=Heard)

    @property
    def seconds(self) -> float:
        return len(self.speech) * FRAME_SECONDS

    def write(self, out: Path) -> None:
        """output.wav and output.json of what was heard, as long as what was said.

        Of a session that never was live there is a record without sound, which `score` lists. Raises
        PersonaplexError for that and for a stream that cannot be decoded, OSError.
        """
        folder = out / self.sample.task / self.sample.id / str(self.repeat)
        folder.mkdir(parents=True, exist_ok=True)
        start = self.heard.live_at
        if start is None:
            write_json(folder / SAMPLE_FILE, {"version": RECORD_VERSION, "error": "never live"})
            raise SessionLost("the session never was live")
        recorder, transcoder = Recorder(start), Transcoder()
        for moment, page in self.heard.pages:
            for frame in transcoder.receive(page):
                recorder.add(frame, moment)
        samples = round(self.seconds * SAMPLE_RATE)
        write_wav(folder / "output.wav", recorder.pcm(samples)[:samples], SAMPLE_RATE)
        texts = [(max(0.0, moment - start), text) for moment, text in self.heard.texts if text]
        pieces = [(math.floor(moment / FRAME_SECONDS), text) for moment, text in texts]
        words = [Word(text.strip(), frame * FRAME_SECONDS) for frame, text in pieces if text.strip()]
        write_json(folder / "output.json", {**transcript.chunks(words), "pieces": pieces})


class Dialogues:
    """The samples of a benchmark folder, encoded once."""

    def __init__(self, data: Path, tasks: Sequence[str] = (), limit: int | None = None) -> None:
        """Raises ConfigError or BadAudio. v1.5's undisturbed recordings are not spoken."""
        self._samples = load(data, tasks, limit).samples
        if not self._samples:
            raise ConfigError(f"there is nothing below {data.name} that a session could say")
        self._speech = [Speech.load([one.recording()]) for one in self._samples]
        self._data = data

    def __len__(self) -> int:
        return len(self._samples)

    def take(self, arrival: Arrival) -> tuple[Arrival, Dialogue]:
        """The dialogue of a session by its number, and the arrival with its length."""
        number = arrival.number % len(self._samples)
        sample = self._samples[number]
        prompt = PROMPTS[TASKS[sample.task].prompt].text if sample.prompt is None else sample.prompt
        dialogue = Dialogue(sample, arrival.number // len(self._samples), self._speech[number], prompt)
        return dataclasses.replace(arrival, length_s=dialogue.seconds), dialogue

    def describe(self, out: Path, asked: Mapping[str, Any]) -> None:
        """Says beside the answers what they answer, for `score`."""
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / RUN_FILE, {"model": "live service", "data": str(self._data.resolve()), **asked})


def check_places(dialogues: str, answers: str) -> None:
    """Raises ConfigError unless both are given or neither is, and answers have a folder to themselves."""
    if bool(dialogues) != bool(answers):
        raise ConfigError("--dialogues and --answers belong together")
    if answers and Path(answers).exists() and any(Path(answers).iterdir()):
        raise ConfigError(f"--answers: {Path(answers).name} holds something already")


def write_all(dialogues: Sequence[Dialogue], out: Path) -> list[str]:
    """Writes what was heard; gives what could not be, and why."""
    faults = []
    for one in dialogues:
        try:
            one.write(out)
        except (PersonaplexError, OSError) as error:
            faults.append(f"{one.sample.task}/{one.sample.id}: {error}")
    return faults
