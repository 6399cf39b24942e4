"""The agent's side of recorded conversations: `python -m personaplex.offline --help`.

Takes recordings of a user, runs each through the engine frame by frame as a live session would, and writes
what the agent said. The options of NVIDIA's `moshi.offline` mean the same here, with the same defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from personaplex import cli

if __name__ == "__main__":
    cli.guard_imports("model")

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from personaplex.audio.voicewav import load_voice_wav
from personaplex.config import FRAME_SECONDS, FRAME_SIZE, EngineConfig, LMConfig, Sampling
from personaplex.engine.engine import Engine, check_sampling
from personaplex.engine.interface import Slot
from personaplex.engine.script import embed_voice, encode_voice
from personaplex.errors import BadAudio, BadParameter, ConfigError, EngineFault, PersonaplexError
from personaplex.loading import ModelSpec, load_parts, resolve
from personaplex.model import Model
from personaplex.model.hub import Checkpoint
from personaplex.model.lm import LM
from personaplex.offline_io import Job, JobRun, RunReport, plan_jobs, prepare_outputs
from personaplex.offline_options import AUTO, parser
from personaplex.outputs import make_folder_of, refuse_overwriting, try_output
from personaplex.persona import Persona
from personaplex.recordings import find_recordings
from personaplex.text import Tokenizer
from personaplex.transcription.recording import Transcriber
from personaplex.transcription.whisper import Options
from personaplex.voices import Voice, VoiceLibrary, load_voice, save_voice

_ANY_LENGTH = 2**31  # tokens of a role text: whoever runs this may wait as long as they like


_INPUT_FILES = ("voice_prompt", "moshi_weight", "mimi_weight", "tokenizer", "lora")
_SAMPLING = {  # option -> field of Sampling
    "temp_text": "text_temperature",
    "topk_text": "text_topk",
    "temp_audio": "audio_temperature",
    "topk_audio": "audio_topk",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit codes are those of `cli`: 1 when some recordings failed or were skipped."""
    handler = logging.StreamHandler()
    handler.setFormatter(cli.OneLine("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return cli.run(
        lambda: _run(parser().parse_args(argv)),
        "model",
        "interrupted; the conversations that had ended are written",
    )


def _run(options: argparse.Namespace) -> int:
    report = RunReport()
    jobs = _prepared_jobs(options, report)
    found = resolve(_spec(options))
    checkpoint, lm = found.checkpoint, found.checkpoint.config.lm
    sampling = _sampling(options, lm)
    refuse_overwriting(_outputs(jobs, options), [("the model", path) for path in _files(checkpoint, options)])
    transcriber = None if options.transcribe is None else Transcriber(_whisper(options))
    spoken = find_voice(options.voice_prompt, checkpoint, VoiceLibrary(lm, checkpoint.voices))
    config = EngineConfig(kv=options.kv, prompt_tokens=_ANY_LENGTH, voice_cache=1)
    most = found.slots(config, live=False) if options.batch_size == AUTO else options.batch_size
    config = dataclasses.replace(config, slots=min(most, len(jobs)))
    try:
        parts = load_parts(found, config)
        voice = spoken if isinstance(spoken, Voice) else _encoded(parts.model, spoken)
        if options.save_voice is not None:
            keep_voice(voice, parts.model.lm, options.save_voice)
        engine = parts.engine(config)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            "the GPU has too little free memory: try --cpu-offload, --kv int8 or a smaller --batch-size"
        ) from error
    persona = Persona(text_prompt=options.text_prompt, sampling=sampling)
    started = time.perf_counter()
    try:
        converse(engine, parts.tokenizer, persona, voice, jobs, report, options.channel, transcriber)
    except EngineFault as error:
        cli.complain(f"{error}; the conversations that had ended are written")
        return cli.FAILED
    print(report.table(time.perf_counter() - started))
    if not options.greedy:
        print(f"seed {sampling.audio_seed}: give it with --seed to hear the same again")
    return cli.FAILED if report.failures else 0


def _spec(options: argparse.Namespace) -> ModelSpec:
    return ModelSpec(
        name=options.model,
        repo=options.hf_repo,
        revision=options.revision,
        moshi_weight=options.moshi_weight,
        mimi_weight=options.mimi_weight,
        tokenizer=options.tokenizer,
        voice_prompt_dir=options.voice_prompt_dir,
        lora=options.lora,
        device=options.device,
        dtype=options.dtype,
        weights=options.weights,
        kv=options.kv,
        offload=options.cpu_offload,
    )


def _whisper(options: argparse.Namespace) -> Options:
    return Options(options.transcribe_model, options.transcribe_language, threads=os.cpu_count() or 1)


def _encoded(model: Model, pcm: NDArray[np.float32]) -> Voice:
    return Voice.from_codes(encode_voice(model, torch.from_numpy(pcm)))


def _prepared_jobs(options: argparse.Namespace, report: RunReport) -> list[Job]:
    """The jobs whose outputs can be written; what cannot be run is said, and noted in `report`."""
    found = find_recordings(options.input_wav)
    jobs = plan_jobs(
        options.input_wav,
        options.output_wav,
        options.output_text,
        options.output_tokens,
        options.transcribe,
    )
    named = [(f"--{name.replace('_', '-')}", getattr(options, name)) for name in _INPUT_FILES]
    inputs = [("--input-wav", path) for path in found.recordings]
    inputs += [(option, Path(value)) for option, value in named if value is not None]
    refuse_overwriting(_outputs(jobs, options), inputs)
    jobs, failures = prepare_outputs(jobs)
    if options.save_voice is not None:
        make_folder_of(options.save_voice)
        try_output(options.save_voice)
    for note in found.notes:
        cli.complain(note, "")
    for name, why in (*found.unreadable, *failures):
        report.fail(name, why)
    return jobs


def _files(checkpoint: Checkpoint, options: argparse.Namespace) -> list[Path]:
    """What is read of the model, the voice asked for included."""
    parts = [checkpoint.lm, checkpoint.mimi, checkpoint.tokenizer, checkpoint.voices]
    if checkpoint.voices is not None:
        parts += [checkpoint.voices / options.voice_prompt, checkpoint.voices / f"{options.voice_prompt}.pt"]
    return [path for path in parts if path is not None]


def _outputs(jobs: Sequence[Job], options: argparse.Namespace) -> list[tuple[str, Path]]:
    saved = [] if options.save_voice is None else [("--save-voice", options.save_voice)]
    return [output for job in jobs for output in job.outputs] + saved


def converse(
    engine: Engine,
    tokenizer: Tokenizer,
    persona: Persona,
    voice: Voice,
    jobs: Sequence[Job],
    report: RunReport,
    channel: int = 1,
    transcriber: Transcriber | None = None,
) -> None:
    """Runs all jobs through the engine's slots, each written as soon as it ends.

    A recording that cannot be read, or an output that cannot be written, is reported and does not stop the
    others.
    """
    waiting = list(reversed(jobs))
    live: dict[Slot, JobRun] = {}
    with tqdm(unit="frame", disable=None) as progress:
        while waiting or live:
            while waiting and engine.free:
                job = waiting.pop()
                try:
                    conversation = JobRun(job, time.perf_counter(), channel)
                except (PersonaplexError, OSError) as error:
                    report.fail(job.input.name, cli.reason(error))
                    continue
                progress.total = (progress.total or 0) + conversation.frames
                live[engine.open(persona, voice)] = conversation
            _tick(engine, live)
            progress.update(len(live))
            for slot in [slot for slot, conversation in live.items() if conversation.finished]:
                engine.close(slot)
                _finish(live.pop(slot), tokenizer, report, transcriber)


def _finish(
    conversation: JobRun, tokenizer: Tokenizer, report: RunReport, transcriber: Transcriber | None
) -> None:
    name = conversation.job.input.name
    try:
        conversation.write(tokenizer, transcriber)
    except OSError as error:
        report.fail(name, cli.reason(error))
        return
    report.rows.append((name, conversation.frames, time.perf_counter() - conversation.started))


def _tick(engine: Engine, live: dict[Slot, JobRun]) -> None:
    for slot, conversation in live.items():
        engine.feed(slot, conversation.next_frame())
    for output in engine.step():
        live[output.slot].take(output.pcm, output.tokens, output.user_codes, output.text)


def find_voice(prompt: str, checkpoint: Checkpoint, library: VoiceLibrary) -> Voice | NDArray[np.float32]:
    """The voice behind `--voice-prompt`: a name, else a .pt or sound file in the voice folder or anywhere.

    Of a sound file it is the recording as the model hears it, float32 [samples]. Needs no model, so that what
    is wrong is found before one is loaded. Raises ConfigError, CheckpointError, BadAudio or OSError.
    """
    lm = checkpoint.config.lm
    if prompt.removesuffix(".pt") in library.names():
        voice = library.get(prompt)
        _check_voice(prompt, voice.frames, lm)
        return voice
    path = Path(prompt)
    if checkpoint.voices is not None and (checkpoint.voices / path).is_file():
        path = checkpoint.voices / path
    if not path.exists() or path.is_dir():
        known = ", ".join(library.names()) or "none in this checkpoint"
        raise ConfigError(f"no voice {prompt!r}: give a file or one of the names ({known})")
    if path.suffix == ".pt":
        voice = load_voice(path, lm)
        _check_voice(prompt, voice.frames, lm)
        return voice
    try:
        pcm = load_voice_wav(path)
    except BadAudio as error:
        raise BadAudio(f"--voice-prompt {prompt}: {error}") from error
    _check_voice(prompt, math.ceil(len(pcm) / FRAME_SIZE), lm)
    return pcm


def keep_voice(voice: Voice, lm: LM, path: Path) -> None:
    """Writes any voice as a voice file. Raises OSError."""
    if voice.codes is not None:
        save_voice(path, *embed_voice(lm, voice.codes))
        return
    assert voice.embeddings is not None
    assert voice.cache is not None
    save_voice(path, voice.embeddings, voice.cache)


def _check_voice(prompt: str, frames: int, lm: LMConfig) -> None:
    """Raises ConfigError for a voice that would push itself out of the model's memory."""
    if frames >= lm.temporal.context:
        limit = lm.temporal.context * FRAME_SECONDS
        raise ConfigError(
            f"--voice-prompt {prompt} lasts {frames * FRAME_SECONDS:.1f} s, and the model remembers "
            f"{limit:.1f} s in all: give some 10 s of it"
        )


def _sampling(options: argparse.Namespace, lm: LMConfig) -> Sampling:
    """Raises ConfigError, naming the option, for a value the model cannot draw with."""
    given = {}
    for option, name in _SAMPLING.items():
        given[name] = getattr(options, option)
        try:
            check_sampling(dataclasses.replace(Sampling(), **{name: given[name]}), lm)
        except BadParameter as error:
            raise ConfigError(f"--{option.replace('_', '-')}: {error}") from error
    seed = options.seed if options.seed >= 0 else secrets.randbits(62)
    sampling = Sampling(**given, text_seed=seed, audio_seed=seed)
    return sampling.greedy() if options.greedy else sampling


if __name__ == "__main__":
    sys.exit(main())
