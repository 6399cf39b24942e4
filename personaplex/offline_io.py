"""Files of the offline command: which recordings go in, where their conversations go, and the final table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from personaplex.audio.wav import read_wav, resample, write_wav
from personaplex.config import FRAME_SECONDS, FRAME_SIZE, SAMPLE_RATE
from personaplex.errors import BadAudio, ConfigError
from personaplex.files import replacing
from personaplex.text import Tokenizer
from personaplex.tokenlog import save_arrays

SOUND_FILES = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3"})  # what is taken from a folder


@dataclass(frozen=True)
class Job:
    """One conversation: the user's recording and the files the agent's side is written to."""

    input: Path
    wav: Path
    text: Path | None
    tokens: Path | None


def plan_jobs(inputs: Sequence[Path], wav: Path, text: Path | None, tokens: Path | None) -> list[Job]:
    """One job a recording. Several recordings, or a folder of them, make the outputs folders.

    A folder is read in order of its names. Raises ConfigError when nothing is found, when an input does not
    exist, and when two outputs would have the same name.
    """
    recordings = [recording for path in inputs for recording in _recordings(path)]
    if len(recordings) == 1 and not inputs[0].is_dir() and not wav.is_dir():
        return [Job(recordings[0], wav, text, tokens)]
    stems = [recording.stem for recording in recordings]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise ConfigError(f"two inputs would write the same outputs: {', '.join(twice)}")
    return [
        Job(
            input=recording,
            wav=wav / f"{recording.stem}.wav",
            text=text / f"{recording.stem}.json" if text else None,
            tokens=tokens / f"{recording.stem}.npz" if tokens else None,
        )
        for recording in recordings
    ]


def prepare_outputs(jobs: Sequence[Job]) -> None:
    """Makes the folders that the jobs write to, so that no conversation is lost to a missing one."""
    for job in jobs:
        for path in (job.wav, job.text, job.tokens):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)


def _recordings(path: Path) -> list[Path]:
    if not path.exists():
        raise ConfigError(f"no such input: {path}")
    if path.is_file():
        return [path]
    found = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in SOUND_FILES)
    if not found:
        raise ConfigError(f"no recording in {path}")
    return found


class Conversation:
    """One job while it runs: hands out the user's frames, takes the agent's, and writes the outputs."""

    def __init__(self, job: Job, started: float) -> None:
        """Reads the recording: its first channel, at 24 kHz. Raises BadAudio or OSError."""
        pcm, rate = read_wav(job.input)
        self.job = job
        self.started = started
        self.samples = resample(pcm[0], rate, SAMPLE_RATE)
        if not len(self.samples):
            raise BadAudio("the recording is shorter than one sample at 24 kHz")
        self.frames = -(-len(self.samples) // FRAME_SIZE)
        self._sent = 0
        self._pcm: list[NDArray[np.float32]] = []
        self._tokens: list[NDArray[np.int64]] = []
        self._user_codes: list[NDArray[np.int64]] = []

    @property
    def finished(self) -> bool:
        return len(self._pcm) == self.frames

    def next_frame(self) -> NDArray[np.float32]:
        """The user's next frame, float32 [1920]; the last one is filled up with zeros."""
        start = self._sent * FRAME_SIZE
        self._sent += 1
        frame = self.samples[start : start + FRAME_SIZE]
        return np.pad(frame, (0, FRAME_SIZE - len(frame)))

    def take(
        self, pcm: NDArray[np.float32], tokens: NDArray[np.int64], user_codes: NDArray[np.int64]
    ) -> None:
        """The agent's frame [1920], its tokens [17] and the codes [8] of the frame that was heard."""
        self._pcm.append(pcm.copy())
        self._tokens.append(tokens.copy())
        self._user_codes.append(user_codes.copy())

    def write(self, tokenizer: Tokenizer) -> None:
        """All outputs; the sound is as long as the recording, the text one string a frame."""
        tokens = np.stack(self._tokens)
        if self.job.text is not None:
            labels = [tokenizer.label(token) for token in tokens[:, 0].tolist()]
            with replacing(self.job.text) as part:
                part.write_text(json.dumps(labels, ensure_ascii=False), encoding="utf-8")
        if self.job.tokens is not None:
            save_arrays(self.job.tokens, tokens=tokens, user_codes=np.stack(self._user_codes, axis=1))
        write_wav(self.job.wav, np.concatenate(self._pcm)[: len(self.samples)], SAMPLE_RATE)


@dataclass
class Report:
    """What was done, for the table at the end; times in seconds."""

    rows: list[tuple[str, int, float]] = field(default_factory=list)  # name, frames, time it took
    failures: list[tuple[str, str]] = field(default_factory=list)  # name, reason

    def table(self, elapsed: float) -> str:
        """A row a conversation: its length, how long it took, and the ratio (below 1: faster than live)."""
        width = max([len("conversation"), *(len(name) for name, _, _ in self.rows)])
        lines = [f"{'conversation':<{width}}  {'audio s':>9}  {'took s':>9}  {'real-time factor':>16}"]
        for name, frames, took in self.rows:
            audio = frames * FRAME_SECONDS
            lines.append(f"{name:<{width}}  {audio:>9.2f}  {took:>9.2f}  {took / audio:>16.3f}")
        audio = sum(frames for _, frames, _ in self.rows) * FRAME_SECONDS
        if len(self.rows) > 1:
            lines.append(f"{'all':<{width}}  {audio:>9.2f}  {elapsed:>9.2f}  {elapsed / audio:>16.3f}")
        lines += [f"failed: {name}: {reason}" for name, reason in self.failures]
        return "\n".join(lines)
