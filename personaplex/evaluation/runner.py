"""The benchmark's recordings through the engine's slots: batched, and resumed where it was stopped.

With `conversation` the one part of the evaluation that knows the engine. An answer is complete when its
sample.json carries the fingerprint of what made it; whatever else lies in its folder is written anew. Neither
the batch nor the order changes an answer: its seed follows from the task, the sample and the repeat.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from personaplex.audio.voicewav import load_voice_wav
from personaplex.audio.wav import read_wav
from personaplex.config import FRAME_SECONDS, EngineConfig, Sampling
from personaplex.engine.engine import Engine, check_sampling
from personaplex.engine.interface import Slot
from personaplex.engine.script import encode_voice
from personaplex.errors import BadAudio, ClientError, ConfigError
from personaplex.evaluation.conversation import AnswerRun
from personaplex.evaluation.dataset import TASKS, Sample
from personaplex.evaluation.scoring import RECORD_VERSION, SAMPLE_FILE, Record, read_record, write_json
from personaplex.loading import ModelSpec, Parts, Resolved, load_parts, resolve
from personaplex.model.hub import Checkpoint
from personaplex.persona import PROMPTS, Persona
from personaplex.voices import Voice, load_voice

_ANY_LENGTH = 2**31  # tokens of a role text
_PROBE = 1 << 16  # bytes of a weight file's two ends that tell it from others


@dataclass(frozen=True)
class RunSettings:
    """What answers depend on. The seeds of `sampling` are drawn for each answer from `seed`."""

    spec: ModelSpec
    voice: str
    sampling: Sampling
    seed: int = 0
    repeats: int = 1


@dataclass(frozen=True)
class Job:
    """One answer to be made, in `folder`."""

    sample: Sample
    repeat: int
    folder: Path
    prompt: str
    sampling: Sampling
    fingerprint: str
    seconds: float  # of all its recordings

    @property
    def noted(self) -> Record:
        """What its sample.json says besides the scores."""
        return {"repeat": self.repeat, "fingerprint": self.fingerprint, "seed": self.sampling.text_seed}


class Runner:
    """One loaded model that answers samples."""

    def __init__(self, settings: RunSettings, slots: int) -> None:
        """Raises ConfigError, CheckpointError, BadParameter or BadAudio; nothing is answered then."""
        self.found = resolve(settings.spec)
        check_sampling(settings.sampling, self.found.checkpoint.config.lm)
        self.settings = settings
        self._config = EngineConfig(
            slots=slots, kv=settings.spec.kv, prompt_tokens=_ANY_LENGTH, voice_cache=1
        )
        self._parts: Parts = load_parts(self.found, self._config)
        self._voice = _voice(settings.voice, self._parts)
        self._made_with = _made_with(self.found, settings, self._voice)

    @property
    def described(self) -> dict[str, Any]:
        """The settings, for results.json."""
        sampling = dataclasses.asdict(self.settings.sampling)
        del sampling["text_seed"], sampling["audio_seed"]
        return {
            "model": self.found.checkpoint.name,
            "made_with": self._made_with,
            "voice": Path(self.settings.voice).name,
            "sampling": sampling,
            "seed": self.settings.seed,
            "repeats": self.settings.repeats,
        }

    def plan(self, samples: Sequence[Sample], out: Path) -> tuple[list[Job], list[Record]]:
        """All answers, the longest first, and records of the samples whose recordings cannot be read."""
        jobs, broken = [], []
        for sample in samples:
            try:
                recordings = {sample.recording(stem) for stem in TASKS[sample.task].inputs.values()}
                total = hashlib.sha256()
                seconds = 0.0
                for path in sorted(recordings):
                    total.update(path.read_bytes())
                    seconds += _seconds(path)
            except (OSError, BadAudio) as error:
                reason = str(error) if isinstance(error, BadAudio) else f"input.wav: {error.strerror}"
                broken += [_unreadable(sample, n, out, reason) for n in range(self.settings.repeats)]
                continue
            jobs += [
                self._job(sample, n, out, total.hexdigest(), seconds) for n in range(self.settings.repeats)
            ]
        return sorted(jobs, key=lambda job: -job.seconds), broken

    def _job(self, sample: Sample, repeat: int, out: Path, heard: str, seconds: float) -> Job:
        prompt = PROMPTS[TASKS[sample.task].prompt].text if sample.prompt is None else sample.prompt
        key = f"{self.settings.seed} {sample.task} {sample.id} {repeat}"
        seed = int.from_bytes(hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:7], "big")
        sampling = dataclasses.replace(self.settings.sampling, text_seed=seed, audio_seed=seed)
        made = {**self._made_with, **dataclasses.asdict(sampling), "prompt": prompt, "heard": heard}
        fingerprint = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:32]
        folder = out / sample.task / sample.id / str(repeat)
        return Job(sample, repeat, folder, prompt, sampling, fingerprint, seconds)

    def run(self, jobs: Sequence[Job], finished: Callable[[Job, str | None], None]) -> None:
        """Answers all jobs; `finished` is told each one that is written, or why it cannot be.

        Raises EngineFault when the device fails; what had finished stays.
        """
        if not jobs:
            return
        engine, waiting = self._parts.engine(self._config), deque(_conversations(jobs))
        live: dict[Slot, AnswerRun] = {}
        answering = {job.folder: job for job in jobs}
        left = {job.folder: len(TASKS[job.sample.task].inputs) for job in jobs}
        total = sum(round(job.seconds / FRAME_SECONDS) for job in jobs)
        with tqdm(total=total, unit="frame", disable=None) as progress:
            while waiting or live:
                while waiting and engine.free:
                    job, upcoming = waiting.popleft()
                    if job.folder not in answering:
                        continue  # its other recording failed
                    try:
                        live[self._open(engine, job, upcoming)] = upcoming
                    except (BadAudio, ClientError, OSError) as error:
                        finished(answering.pop(job.folder), str(error))
                _tick(engine, live)
                progress.update(len(live))
                for slot in [slot for slot, one in live.items() if one.finished]:
                    engine.close(slot)
                    one = live.pop(slot)
                    left[one.folder] -= 1
                    if one.folder in answering:
                        one.write()
                        if not left[one.folder]:
                            finished(answering.pop(one.folder), None)

    def _open(self, engine: Engine, job: Job, conversation: AnswerRun) -> Slot:
        conversation.read()
        return engine.open(Persona(text_prompt=job.prompt, sampling=job.sampling), self._voice)


def pending(jobs: Sequence[Job], force: bool) -> list[Job]:
    """The jobs without a complete answer. Raises ConfigError when there are answers of other settings, which
    only `force` replaces."""
    missing, others = [], 0
    for job in jobs:
        record = read_record(job.folder)
        if record is None or record.get("error"):
            missing.append(job)
        elif record.get("fingerprint") != job.fingerprint:
            others += 1
            missing.append(job)
    if others and not force:
        raise ConfigError(
            f"{others} answers there were made with other settings or weights: "
            "give another --output, or --force to replace them"
        )
    return missing


def note_failure(job: Job, reason: str) -> Record:
    """Writes and gives the record of an answer that could not be made."""
    record = {**_failed(job.sample, job.repeat, reason), **job.noted}
    job.folder.mkdir(parents=True, exist_ok=True)
    write_json(job.folder / SAMPLE_FILE, record)
    return record


def _unreadable(sample: Sample, repeat: int, out: Path, reason: str) -> Record:
    record = _failed(sample, repeat, reason)
    folder = out / sample.task / sample.id / str(repeat)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SAMPLE_FILE, record)
    return record


def _failed(sample: Sample, repeat: int, reason: str) -> Record:
    return {
        "version": RECORD_VERSION,
        "task": sample.task,
        "id": sample.id,
        "repeat": repeat,
        "error": reason,
    }


def _conversations(jobs: Sequence[Job]) -> Iterator[tuple[Job, AnswerRun]]:
    for job in jobs:
        for output, stem in TASKS[job.sample.task].inputs.items():
            yield job, AnswerRun(job.sample.recording(stem), job.folder, output)


def _tick(engine: Engine, live: dict[Slot, AnswerRun]) -> None:
    for slot, conversation in live.items():
        engine.feed(slot, conversation.next_frame())
    for output in engine.step():
        live[output.slot].take(output)


def _seconds(path: Path) -> float:
    pcm, rate = read_wav(path)
    seconds: float = pcm.shape[1] / rate
    return seconds


def _voice(name: str, parts: Parts) -> Voice:
    """A voice of the checkpoint, a .pt voice file or a recording."""
    if name.removesuffix(".pt") in parts.library.names():
        return parts.library.get(name)
    path = Path(name)
    if not path.is_file():
        known = ", ".join(parts.library.names()) or "none in this checkpoint"
        raise ConfigError(f"no voice {name!r}: give a file or one of the names ({known})")
    if path.suffix == ".pt":
        return load_voice(path, parts.model.lm.config)
    return Voice.from_codes(encode_voice(parts.model, torch.from_numpy(load_voice_wav(path))))


def _made_with(found: Resolved, settings: RunSettings, voice: Voice) -> dict[str, Any]:
    """What identifies the model of an answer: its files by size and ends, its numbers, its voice."""
    spec, checkpoint = settings.spec, found.checkpoint
    return {
        "weights": _identity(checkpoint),
        "dtype": str(found.dtype).removeprefix("torch."),
        "weights_as": spec.weights,
        "kv": spec.kv,
        "device": found.device.type,
        "voice": voice.digest,
    }


def _identity(checkpoint: Checkpoint) -> str:
    total = hashlib.sha256(checkpoint.name.encode() if checkpoint.built_in else b"")
    total.update(repr(checkpoint.config).encode())
    for path in (checkpoint.lm, checkpoint.mimi, checkpoint.tokenizer):
        if path is None:
            continue
        with path.open("rb") as file:
            size = path.stat().st_size
            total.update(f"{size} ".encode() + file.read(_PROBE))
            file.seek(max(0, size - _PROBE))
            total.update(file.read(_PROBE))
    return total.hexdigest()[:32]
