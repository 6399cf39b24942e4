"""The offline command's options. Those of NVIDIA's `moshi.offline` have its names and its defaults."""

from __future__ import annotations

import argparse
from pathlib import Path

from personaplex import cli
from personaplex.config import Sampling
from personaplex.loading import DTYPES
from personaplex.model.hub import DEFAULT_REPO
from personaplex.outputs import is_folder, some_name
from personaplex.persona import DEFAULT_VOICE, Persona

AUTO = "auto"  # batch size: as many conversations as fit in memory
_RUN = "python -m personaplex.offline --model tiny"
EXAMPLES = (
    f"{_RUN} --input-wav user.wav --output-wav agent.wav",
    f"{_RUN} --input-wav calls/ --output-wav answers/ --output-text answers/ --batch-size 4",
    f"{_RUN} --input-wav user.wav --output-wav agent.wav --voice-prompt me.wav --save-voice me.pt",
    f"cat user.wav | {_RUN} --input-wav /dev/stdin --output-wav agent.wav",
)


def parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m personaplex.offline",
        description="Runs recorded users through PersonaPlex and writes what the agent said.",
        formatter_class=cli.HelpWithDefaults,
        examples=EXAMPLES,
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
        nargs="+",
        required=True,
        type=some_name,
        metavar="PATH",
        help="recordings, pipes, or folders of recordings",
    )
    group.add_argument(
        "--output-wav",
        required=True,
        type=some_name,
        metavar="PATH",
        help="the agent's sound, as long as the input; a folder when there are several inputs or with a / at "
        "the end",
    )
    group.add_argument(
        "--output-text", type=some_name, metavar="PATH", help="JSON list of one text piece a frame"
    )
    group.add_argument(
        "--output-tokens",
        type=some_name,
        metavar="PATH",
        help=".npz with tokens [n, 17] and user_codes [8, n]",
    )
    group.add_argument(
        "--transcribe",
        type=some_name,
        metavar="PATH",
        help="JSON: what both sides said, with the times of words; the user as Whisper hears it",
    )
    group.add_argument(
        "--transcribe-model",
        default="",
        metavar="NAME",
        help="Whisper model by name or folder; empty is the embedded tiny.en",
    )
    group.add_argument(
        "--transcribe-language", default="en", metavar="CODE", help="of the user; empty to recognise it"
    )
    group.add_argument(
        "--channel", type=cli.whole(1), default=1, metavar="N", help="of recordings that have several"
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
    group.add_argument(
        "--lora",
        type=Path,
        metavar="FILE",
        help="an adapter of python -m personaplex.finetune, for this model",
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
        "--save-voice", type=_voice_file, metavar="FILE", help="write the voice as a .pt voice file"
    )
    group.add_argument(
        "--text-prompt",
        type=cli.text,
        default=Persona().text_prompt,
        metavar="TEXT",
        help="the agent's role; may be empty",
    )


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    defaults = Sampling()
    group.add_argument("--seed", type=cli.whole(-1), default=-1, help="-1 draws one")
    group.add_argument("--greedy", action="store_true", help="always the likeliest token")
    group.add_argument("--temp-audio", type=float, default=defaults.audio_temperature, metavar="T")
    group.add_argument("--temp-text", type=float, default=defaults.text_temperature, metavar="T")
    group.add_argument("--topk-audio", type=int, default=defaults.audio_topk, metavar="K", help="0: all")
    group.add_argument("--topk-text", type=int, default=defaults.text_topk, metavar="K", help="0: all")


def _batch_size(text: str) -> int | str:
    """The type of --batch-size."""
    return text if text == AUTO else cli.whole(1)(text)


def _voice_file(text: str) -> Path:
    """The type of --save-voice."""
    if is_folder(text) or not text.endswith(".pt"):
        raise argparse.ArgumentTypeError(f"{text} is no name of a voice file: it must end in .pt")
    return Path(text)
