"""One answered sample to its record: both profiles, with everything they were computed from.

Knows recordings, the detector and transcripts; no engine and no torch, so that the answers of any system can
be scored: of the offline runner, of live sessions under load, of somebody else's server.

    OUT/{task}/{ID}/{repeat}/output.wav, output.json -> sample.json
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from personaplex.audio.wav import read_wav, resample
from personaplex.config import Pcm
from personaplex.errors import ConfigError, PersonaplexError
from personaplex.evaluation import event, official, transcript
from personaplex.evaluation.dataset import TASKS, BadSample, Sample
from personaplex.evaluation.speech import Span, Track
from personaplex.evaluation.transcript import Source, Transcript, Whisper
from personaplex.evaluation.vad import Detector
from personaplex.files import read_bounded, replacing
from personaplex.transcription.silero import RATE

Record = dict[str, Any]

RECORD_VERSION = 1
SAMPLE_FILE = "sample.json"
_NOTED = {"task", "id", "repeat", "error"}
_SCORED = {"transcript", "facts", "seconds", "user", "agent", "words", "unheard", "official", "event"}
_RECORD_LIMIT = 2**26


@dataclass
class Scorer:
    """Scores answers; keeps the speech of the users it has heard, since repeats share them."""

    detector: Detector
    source: Source = "text"
    whisper: Whisper | None = None
    expected: Mapping[str, Sequence[float]] = field(default_factory=dict)  # of backchannels, by sample ID
    rate: Callable[[Sample, Record, Path], Record | None] | None = None  # the judge's, where there is one
    _users: dict[Path, tuple[Pcm, Track]] = field(default_factory=dict)

    def record(self, sample: Sample, folder: Path) -> Record:
        """The record of the answer in `folder`; its `error` says what kept it from being scored."""
        empty = {
            "version": RECORD_VERSION,
            "task": sample.task,
            "id": sample.id,
            "transcript": self.source,
            "error": None,
        }
        try:
            found = {**empty, **self._scored(sample, folder)}
            return found if self.rate is None else found | {"rating": self.rate(sample, found, folder)}
        except (PersonaplexError, BadSample) as error:
            return {**empty, "error": str(error)}
        except OSError as error:
            name = Path(str(error.filename)).name if error.filename else "a file"
            return {**empty, "error": f"{name}: {error.strerror or 'cannot be read'}"}

    def _scored(self, sample: Sample, folder: Path) -> Record:
        inputs = TASKS[sample.task].inputs
        found: Record = {"facts": facts(sample)}
        for output, stem in inputs.items():
            prefix = output.removesuffix("output").removesuffix("_")
            if prefix and not (folder / f"{output}.wav").exists():
                continue  # a live session, or another system: the figures do without
            user, agent, unheard = self._tracks(sample, stem, folder, output)
            part = {"seconds": agent.seconds, **_shown(user, agent), "unheard": unheard}
            if not prefix:
                found |= part | profiles(sample, user, agent, self.expected.get(sample.id))
            else:  # without the overlap: what the agent does when nothing disturbs it
                found[prefix] = part | {"event": {"spoke_s": sum(one.length for one in agent.segments)}}
        return found

    def _tracks(
        self, sample: Sample, stem: str, folder: Path, output: str
    ) -> tuple[Track, Track, float | None]:
        spoken, user = self._user(sample.recording(stem))
        pcm, rate = read_wav(folder / f"{output}.wav")
        sound = resample(agents_channel(pcm, rate, spoken), rate, RATE)
        if not len(sound):
            raise BadSample(f"{output}.wav holds no sound")
        segments = tuple(self.detector.segments(sound, RATE))
        seconds = pcm.shape[1] / rate
        words = self._words(folder / f"{output}.json", sound, segments, seconds)
        return user, Track(seconds, segments, words.words), words.unheard

    def _user(self, path: Path) -> tuple[Pcm, Track]:
        if path not in self._users:
            pcm, rate = read_wav(path)
            sound = resample(pcm[0], rate, RATE)
            track = Track(pcm.shape[1] / rate, tuple(self.detector.segments(sound, RATE)))
            while len(self._users) > 1:  # v1.5 has two recordings a sample
                self._users.pop(next(iter(self._users)))
            self._users[path] = sound, track
        return self._users[path]

    def _words(self, path: Path, sound: Pcm, segments: Sequence[Span], seconds: float) -> Transcript:
        if self.source == "whisper":
            assert self.whisper is not None
            return transcript.within_speech(self.whisper.words(sound), segments)
        data = transcript.load(path)
        if self.source == "file":
            return transcript.from_chunks(data, path.name)
        return transcript.from_pieces(transcript.pieces_of(data, path.name), segments, seconds)


def profiles(sample: Sample, user: Track, agent: Track, expected: Sequence[float] | None = None) -> Record:
    """`official` and `event` of one sample. Pure."""
    match sample.kind:
        case "pause":
            return {"official": official.pause(agent), "event": event.pause(agent, sample.pauses)}
        case "turn":
            assert sample.end is not None
            both = official.answer(agent, sample.end, whole=True), event.turn(agent, sample.end)
        case "backchannel":
            both = official.backchannel(agent, expected), event.backchannel(agent, expected)
        case "interruption":
            assert sample.marked is not None
            both = (
                official.answer(agent, sample.marked.end, whole=False),
                event.interruption(user, agent, sample.marked),
            )
        case "overlap":
            assert sample.marked is not None
            both = official.overlap(user, agent), event.overlap(user, agent, sample.marked)
        case "service":
            end = user.segments[-1].end if user.segments else user.seconds
            both = {}, event.turn(agent, end)
    return {"official": both[0], "event": both[1]}


def agents_channel(pcm: Pcm, rate: int, user: Pcm) -> Pcm:
    """The agent's channel of an answer float32 [channels, samples], given the user's sound at 16 kHz.

    Of several channels, the one that is least like the user's recording; the last of equals.
    """
    if len(pcm) == 1:
        only: Pcm = pcm[0]
        return only
    likeness = []
    for channel in pcm:
        sound = resample(channel, rate, RATE)
        length = min(len(sound), len(user))
        a, b = sound[:length].astype(np.float64), user[:length].astype(np.float64)
        norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
        likeness.append(round(abs(float((a * b).sum())) / norm, 6) if norm else 0.0)
    lowest = min(likeness)
    agent: Pcm = pcm[max(number for number, value in enumerate(likeness) if value == lowest)]
    return agent


def facts(sample: Sample) -> Record:
    """What the benchmark marks in a sample, for the report."""
    return {
        "pauses": [[one.start, one.end] for one in sample.pauses],
        "end": sample.end,
        "marked": None if sample.marked is None else [sample.marked.start, sample.marked.end],
    }


def answers(out: Path, sample: Sample) -> Iterator[tuple[int, Path]]:
    """Repeats of a sample below `out` that hold an answer or a record, by number."""
    folder = out / sample.task / sample.id
    numbered = sorted(int(one.name) for one in folder.glob("*") if one.name.isascii() and one.name.isdigit())
    for repeat in numbered:
        place = folder / str(repeat)
        if (place / "output.wav").exists() or (place / SAMPLE_FILE).exists():
            yield repeat, place


def read_record(folder: Path) -> Record | None:
    """A whole sample.json of this version, None where there is none."""
    try:
        data = json.loads(read_bounded(folder / SAMPLE_FILE, _RECORD_LIMIT))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(data, dict) or data.get("version") != RECORD_VERSION or not data.keys() >= _NOTED:
        return None
    return data if data["error"] or data.keys() >= _SCORED else None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", "ascii")


def score(out: Path, samples: Sequence[Sample], scorer: Scorer) -> list[Record]:
    """Scores every answer below `out` anew, writes its sample.json and gives the records in order.

    What `run` noted (fingerprint, seed) is kept. Raises ConfigError when there is no answer at all.
    """
    records = []
    for sample in samples:
        for repeat, folder in answers(out, sample):
            noted = read_record(folder) or {}
            record = scorer.record(sample, folder) | {"repeat": repeat}
            record |= {name: noted[name] for name in ("fingerprint", "seed") if name in noted}
            write_json(folder / SAMPLE_FILE, record)
            records.append(record)
    if not records:
        raise ConfigError(f"there are no answers below {out.name}: {{task}}/{{ID}}/0/output.wav")
    return records


def _shown(user: Track, agent: Track) -> Record:
    return {
        "user": [[round(one.start, 3), round(one.end, 3)] for one in user.segments],
        "agent": [[round(one.start, 3), round(one.end, 3)] for one in agent.segments],
        "words": [[word.text, word.start, word.end] for word in agent.words],
    }
