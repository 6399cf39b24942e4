"""Files of the offline command: a job a recording, what each writes, and the final table."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from personaplex import cli
from personaplex.audio.wav import one_channel, read_wav, resample, write_wav
from personaplex.config import FRAME_SECONDS, FRAME_SIZE, SAMPLE_RATE
from personaplex.errors import BadAudio, ConfigError
from personaplex.files import replacing
from personaplex.outputs import check_room, is_folder, make_folder_of, try_output, wav_bytes
from personaplex.recordings import Failure, PathLike, find_recordings
from personaplex.text import Tokenizer
from personaplex.tokenlog import save_arrays
from personaplex.transcript import Transcript
from personaplex.transcription.recording import Transcriber


@dataclass(frozen=True)
class Job:
    """One conversation: the user's recording and the files the agent's side is written to."""

    input: Path
    wav: Path
    text: Path | None
    tokens: Path | None
    transcript: Path | None = None

    @property
    def outputs(self) -> list[tuple[str, Path]]:
        """Its output files, each with its option."""
        named = (
            ("--output-wav", self.wav),
            ("--output-text", self.text),
            ("--output-tokens", self.tokens),
            ("--transcribe", self.transcript),
        )
        return [(option, path) for option, path in named if path is not None]


def plan_jobs(
    inputs: Sequence[PathLike],
    wav: PathLike,
    text: PathLike | None,
    tokens: PathLike | None,
    transcript: PathLike | None = None,
) -> list[Job]:
    """One job a recording. Several recordings, a folder of them, or --output-wav that is a folder or ends in
    a slash, make all outputs folders.

    Raises ConfigError when nothing is found, when an input does not exist, when two outputs would have the
    same name, and when a file stands where a folder is meant or a folder where a file is.
    """
    recordings = find_recordings(inputs).recordings
    named = {
        "--output-wav": wav,
        "--output-text": text,
        "--output-tokens": tokens,
        "--transcribe": transcript,
    }
    given = {option: value for option, value in named.items() if value is not None}
    paths = {option: Path(value) for option, value in given.items()}
    single = len(recordings) == 1 and not Path(inputs[0]).is_dir() and not is_folder(wav)
    for option, value in given.items():
        if single and is_folder(value):
            raise ConfigError(
                f"{option} {value} is a folder, and --output-wav is a file: name a file here too"
            )
        if not single and paths[option].exists() and not paths[option].is_dir():
            raise ConfigError(f"{option} {value} is a file, but here the outputs need a folder")
    if single:
        rest = (paths.get(option) for option in ("--output-text", "--output-tokens", "--transcribe"))
        return [Job(recordings[0], Path(wav), *rest)]
    stems = [recording.stem for recording in recordings]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise ConfigError(f"two inputs would write the same outputs: {', '.join(twice)}")
    return [
        Job(
            input=recording,
            wav=paths["--output-wav"] / f"{recording.stem}.wav",
            text=paths["--output-text"] / f"{recording.stem}.json" if text is not None else None,
            tokens=paths["--output-tokens"] / f"{recording.stem}.npz" if tokens is not None else None,
            transcript=paths["--transcribe"] / f"{recording.stem}.json" if transcript is not None else None,
        )
        for recording in recordings
    ]


def prepare_outputs(jobs: Sequence[Job]) -> tuple[list[Job], list[Failure]]:
    """The jobs all of whose outputs can be written, and why the others' cannot; makes missing folders.

    Raises OSError when that is so for none of them.
    """
    ready: list[Job] = []
    failures: list[Failure] = []
    for job in jobs:
        try:
            for _, path in job.outputs:
                make_folder_of(path)
                try_output(path)
        except OSError as error:
            if len(jobs) == 1:
                raise
            failures.append((job.input.name, cli.reason(error)))
        else:
            ready.append(job)
    if not ready:
        raise OSError(None, f"no output can be written ({failures[0][1]})")
    return ready, failures


class JobRun:
    """One job while it runs: hands out the user's frames, takes the agent's, and writes the outputs."""

    def __init__(self, job: Job, started: float, channel: int = 1) -> None:
        """Reads the recording: one channel, at 24 kHz. Raises BadAudio, or OSError, also where the disk has
        no room for what will be written."""
        pcm, rate = read_wav(job.input)
        self.job = job
        self.started = started
        self.samples = resample(one_channel(pcm, job.input.name, channel, "--channel"), rate, SAMPLE_RATE)
        if not len(self.samples):
            raise BadAudio("the recording is shorter than one sample at 24 kHz")
        check_room(job.wav, wav_bytes(len(self.samples)))
        self.frames = -(-len(self.samples) // FRAME_SIZE)
        self._sent = 0
        self._transcript = Transcript()
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
        self,
        pcm: NDArray[np.float32],
        tokens: NDArray[np.int64],
        user_codes: NDArray[np.int64],
        text: str = "",
    ) -> None:
        """The agent's frame [1920], its tokens [17] and text, and the codes [8] of the frame it heard."""
        if text:
            self._transcript.add_agent(len(self._pcm), text)
        self._pcm.append(pcm.copy())
        self._tokens.append(tokens.copy())
        self._user_codes.append(user_codes.copy())

    def write(self, tokenizer: Tokenizer, transcriber: Transcriber | None = None) -> None:
        """All outputs; the sound is as long as the recording, the text one string a frame. A transcript needs
        `transcriber`.

        Raises the first OSError, after all that can be written is.
        """
        writers: list[tuple[Path | None, Callable[[Path], None]]] = [
            (self.job.wav, self._write_wav),
            (self.job.text, lambda path: self._write_text(path, tokenizer)),
            (self.job.tokens, self._write_tokens),
            (self.job.transcript, lambda path: self._write_transcript(path, transcriber)),
        ]
        errors = []
        for path, write in writers:
            try:
                if path is not None:
                    write(path)
            except OSError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _write_wav(self, path: Path) -> None:
        write_wav(path, np.concatenate(self._pcm)[: len(self.samples)], SAMPLE_RATE)

    def _write_text(self, path: Path, tokenizer: Tokenizer) -> None:
        labels = [tokenizer.label(tokens[0]) for tokens in np.stack(self._tokens).tolist()]
        with replacing(path) as part:
            part.write_text(json.dumps(labels, ensure_ascii=False), encoding="utf-8")

    def _write_transcript(self, path: Path, transcriber: Transcriber | None) -> None:
        assert transcriber is not None
        for segment in transcriber.read(self.samples):
            self._transcript.add_user(segment)
        with replacing(path) as part:
            part.write_text(self._transcript.json({"transcription": True}), encoding="utf-8")

    def _write_tokens(self, path: Path) -> None:
        save_arrays(path, tokens=np.stack(self._tokens), user_codes=np.stack(self._user_codes, axis=1))


@dataclass
class RunReport:
    """What was done, for the table at the end; times in seconds."""

    rows: list[tuple[str, int, float]] = field(default_factory=list)  # name, frames, time it took
    failures: list[Failure] = field(default_factory=list)

    def fail(self, name: str, why: str) -> None:
        """Notes and says why a recording has no conversation, or not all of its files."""
        self.failures.append((name, why))
        cli.complain(f"{name}: {why}")

    def table(self, elapsed: float) -> str:
        """A row a conversation: its length, how long it took, and the ratio (below 1: faster than live)."""
        rows = [(cli.one_line(name), frames, took) for name, frames, took in self.rows]
        width = max([len("conversation"), *(len(name) for name, _, _ in rows)])
        lines = [f"{'conversation':<{width}}  {'audio s':>9}  {'took s':>9}  {'real-time factor':>16}"]
        for name, frames, took in rows:
            audio = frames * FRAME_SECONDS
            lines.append(f"{name:<{width}}  {audio:>9.2f}  {took:>9.2f}  {took / audio:>16.3f}")
        audio = sum(frames for _, frames, _ in self.rows) * FRAME_SECONDS
        if len(self.rows) > 1:
            lines.append(f"{'all':<{width}}  {audio:>9.2f}  {elapsed:>9.2f}  {elapsed / audio:>16.3f}")
        lines += [cli.one_line(f"failed: {name}: {reason}") for name, reason in self.failures]
        return "\n".join(lines)
