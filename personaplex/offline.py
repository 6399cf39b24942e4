"""The agent's side of recorded conversations: `python -m personaplex.offline --help`.

Takes recordings of a user, runs each through the engine frame by frame as a live session would, and writes
what the agent said. The options of NVIDIA's `moshi.offline` mean the same here, with the same defaults.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from personaplex.config import EngineConfig, Sampling
from personaplex.engine.engine import Engine
from personaplex.engine.interface import Slot
from personaplex.engine.script import embed_voice, encode_voice
from personaplex.errors import ConfigError, PersonaplexError
from personaplex.loading import DTYPES, ModelSpec, load_parts, resolve
from personaplex.model import Model
from personaplex.model.hub import DEFAULT_REPO, Checkpoint
from personaplex.offline_io import Conversation, Job, Report, plan_jobs, prepare_outputs
from personaplex.persona import DEFAULT_VOICE, Persona
from personaplex.text import Tokenizer
from personaplex.voices import Voice, VoiceLibrary, load_voice, load_voice_wav, save_voice

INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it
_ANY_LENGTH = 2**31  # tokens of a role text: whoever runs this may wait as long as they like
AUTO = "auto"  # batch size: as many conversations as fit in memory


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 when every conversation was written, 1 when some failed, 2 for a wrong set-up."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        report = _run(options)
    except (PersonaplexError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the conversations that had ended are written", file=sys.stderr)
        return INTERRUPTED
    return 1 if report.failures else 0


def _run(options: argparse.Namespace) -> Report:
    jobs = plan_jobs(options.input_wav, options.output_wav, options.output_text, options.output_tokens)
    if options.batch_size != AUTO and options.batch_size < 1:
        raise ConfigError("--batch-size must be at least 1")
    found = resolve(_spec(options))
    config = EngineConfig(kv=options.kv, prompt_tokens=_ANY_LENGTH, voice_cache=1)
    most = found.slots(config, live=False) if options.batch_size == AUTO else options.batch_size
    config = dataclasses.replace(config, slots=min(most, len(jobs)))
    parts = load_parts(found, config)
    voice = find_voice(options.voice_prompt, found.checkpoint, parts.library, parts.model, options.save_voice)
    sampling = _sampling(options)
    persona = Persona(text_prompt=options.text_prompt, sampling=sampling)
    prepare_outputs(jobs)
    started = time.perf_counter()
    report = converse(parts.engine(config), parts.tokenizer, persona, voice, jobs)
    print(report.table(time.perf_counter() - started))
    if not options.greedy:
        print(f"seed {sampling.audio_seed}: give it with --seed to hear the same again")
    return report


def _spec(options: argparse.Namespace) -> ModelSpec:
    return ModelSpec(
        name=options.model,
        repo=options.hf_repo,
        revision=options.revision,
        moshi_weight=options.moshi_weight,
        mimi_weight=options.mimi_weight,
        tokenizer=options.tokenizer,
        voice_prompt_dir=options.voice_prompt_dir,
        device=options.device,
        dtype=options.dtype,
        weights=options.weights,
        kv=options.kv,
        offload=options.cpu_offload,
    )


def converse(
    engine: Engine, tokenizer: Tokenizer, persona: Persona, voice: Voice, jobs: Sequence[Job]
) -> Report:
    """Runs all jobs through the engine's slots, each written as soon as it ends.

    A recording that cannot be read is reported and does not stop the others.
    """
    report = Report()
    waiting = list(reversed(jobs))
    live: dict[Slot, Conversation] = {}
    with tqdm(unit="frame", disable=None) as progress:
        while waiting or live:
            while waiting and engine.free:
                job = waiting.pop()
                try:
                    conversation = Conversation(job, time.perf_counter())
                except (PersonaplexError, OSError) as error:
                    report.failures.append((job.input.name, str(error)))
                    continue
                progress.total = (progress.total or 0) + conversation.frames
                live[engine.open(persona, voice)] = conversation
            _tick(engine, live)
            progress.update(len(live))
            for slot in [slot for slot, conversation in live.items() if conversation.finished]:
                engine.close(slot)
                conversation = live.pop(slot)
                conversation.write(tokenizer)
                took = time.perf_counter() - conversation.started
                report.rows.append((conversation.job.input.name, conversation.frames, took))
    return report


def _tick(engine: Engine, live: dict[Slot, Conversation]) -> None:
    for slot, conversation in live.items():
        engine.feed(slot, conversation.next_frame())
    for output in engine.step():
        live[output.slot].take(output.pcm, output.tokens, output.user_codes)


def find_voice(
    prompt: str, checkpoint: Checkpoint, library: VoiceLibrary, model: Model, save: Path | None = None
) -> Voice:
    """The voice behind `--voice-prompt`: a name, else a .pt or sound file in the voice folder or anywhere.

    A recording is encoded, and written to `save` as a voice file. Raises ConfigError, CheckpointError or
    BadAudio.
    """
    if prompt.removesuffix(".pt") in library.names():
        return library.get(prompt)
    path = Path(prompt)
    if checkpoint.voices is not None and (checkpoint.voices / path).is_file():
        path = checkpoint.voices / path
    if not path.is_file():
        known = ", ".join(library.names()) or "none in this checkpoint"
        raise ConfigError(f"no voice {prompt!r}: give a file or one of the names ({known})")
    lm = checkpoint.config.lm
    if path.suffix == ".pt":
        return load_voice(path, lm)
    codes = encode_voice(model, torch.from_numpy(load_voice_wav(path)))
    if save is not None:
        save_voice(save, *embed_voice(model.lm, codes))
    return Voice.from_codes(codes)


def _sampling(options: argparse.Namespace) -> Sampling:
    seed = options.seed if options.seed >= 0 else secrets.randbits(62)
    sampling = Sampling(
        text_temperature=options.temp_text,
        text_topk=options.topk_text,
        audio_temperature=options.temp_audio,
        audio_topk=options.topk_audio,
        text_seed=seed,
        audio_seed=seed,
    )
    return sampling.greedy() if options.greedy else sampling


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m personaplex.offline",
        description="Runs recorded users through PersonaPlex and writes what the agent said.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_files(parser.add_argument_group("files"))
    _add_checkpoint(parser.add_argument_group("checkpoint"))
    _add_engine(parser.add_argument_group("engine"))
    _add_persona(parser.add_argument_group("persona"))
    _add_sampling(parser.add_argument_group("sampling"))
    return parser


def _add_files(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--input-wav",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="recordings, or folders of them",
    )
    group.add_argument(
        "--output-wav",
        type=Path,
        required=True,
        metavar="PATH",
        help="the agent's sound, as long as the input; a folder when there are several inputs",
    )
    group.add_argument("--output-text", type=Path, metavar="PATH", help="JSON list of one text piece a frame")
    group.add_argument(
        "--output-tokens", type=Path, metavar="PATH", help=".npz with tokens [n, 17] and user_codes [8, n]"
    )


def _add_checkpoint(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model", default="7b", help="7b (from Hugging Face), tiny (built in, untrained) or a directory"
    )
    group.add_argument("--hf-repo", default=DEFAULT_REPO, help="Hugging Face repository of 7b")
    group.add_argument("--revision", help="branch, tag or commit in that repository")
    group.add_argument(
        "--moshi-weight", type=Path, metavar="FILE", help="language model, in place of the checkpoint's"
    )
    group.add_argument("--mimi-weight", type=Path, metavar="FILE", help="codec, in place of the checkpoint's")
    group.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer, in place of the checkpoint's"
    )


def _add_engine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="of the language model; auto is bfloat16 on CUDA, float32 on a CPU",
    )
    group.add_argument(
        "--weights", default="auto", choices=("auto", "int8"), help="int8: smaller, at some cost in quality"
    )
    group.add_argument(
        "--kv",
        default="auto",
        choices=("auto", "int8"),
        help="int8: half a conversation's memory, a little noise",
    )
    group.add_argument(
        "--cpu-offload", action="store_true", help="keep what does not fit the GPU in host memory; slower"
    )
    group.add_argument(
        "--batch-size",
        type=_batch_size,
        default=1,
        metavar="N",
        help="conversations run at once, or auto: as many as fit in memory; changes no result",
    )


def _batch_size(value: str) -> int | str:
    return value if value == AUTO else int(value)


def _add_persona(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--voice-prompt",
        default=f"{DEFAULT_VOICE}.pt",
        metavar="VOICE",
        help="a voice's name, a .pt voice file or a recording",
    )
    group.add_argument(
        "--voice-prompt-dir", type=Path, metavar="DIR", help="voices, in place of the checkpoint's"
    )
    group.add_argument(
        "--save-voice", type=Path, metavar="FILE", help="write the voice of a recording as a .pt voice file"
    )
    group.add_argument(
        "--text-prompt", default=Persona().text_prompt, metavar="TEXT", help="the agent's role; may be empty"
    )


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    defaults = Sampling()
    group.add_argument("--seed", type=int, default=-1, help="-1 draws one")
    group.add_argument("--greedy", action="store_true", help="always the likeliest token")
    group.add_argument("--temp-audio", type=float, default=defaults.audio_temperature, metavar="T")
    group.add_argument("--temp-text", type=float, default=defaults.text_temperature, metavar="T")
    group.add_argument("--topk-audio", type=int, default=defaults.audio_topk, metavar="K", help="0: all")
    group.add_argument("--topk-text", type=int, default=defaults.text_topk, metavar="K", help="0: all")


if __name__ == "__main__":
    sys.exit(main())
