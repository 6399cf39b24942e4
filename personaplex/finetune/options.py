"""The options of `python -m personaplex.finetune`. No torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from personaplex import cli
from personaplex.config import FRAME_SECONDS
from personaplex.finetune.batches import Weights
from personaplex.finetune.settings import Settings
from personaplex.finetune.train import Intervals
from personaplex.loading import DTYPES
from personaplex.model.hub import DEFAULT_REPO
from personaplex.model.lora import DEFAULT_KINDS, KINDS
from personaplex.persona import DEFAULT_VOICE, Persona

_RUN = "python -m personaplex.finetune"
EXAMPLES = (
    f"{_RUN} prepare calls/ --output dataset/",
    f"{_RUN} train dataset/ --output run/ --weights int8 --gradient-checkpointing",
    "torchrun --nproc-per-node 4 -m personaplex.finetune train dataset/ --output run/",
    f"{_RUN} show run/adapter.safetensors",
    f"{_RUN} merge --lora run/adapter.safetensors --output merged/",
)


def parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog=_RUN,
        description="Teaches a checkpoint a role from recorded calls, by low-rank adapters (LoRA).",
        examples=EXAMPLES,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare | train | merge | show")
    _prepare(_command(commands, "prepare", "recorded calls into a dataset: checked, encoded once"))
    _train(_command(commands, "train", "an adapter from prepared datasets; goes on where it was broken off"))
    _merge(_command(commands, "merge", "a checkpoint of a base and an adapter"))
    show = _command(commands, "show", "what an adapter is, and what of")
    show.add_argument("adapter", type=Path, metavar="FILE")
    return parser


def _command(
    commands: argparse._SubParsersAction[cli.Parser], name: str, about: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=about,
        description=about.capitalize() + ".",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )


def _prepare(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "sources", nargs="+", type=Path, metavar="PATH", help="folders, data.jsonl, recordings"
    )
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the dataset")
    calls = command.add_argument_group("calls")
    calls.add_argument(
        "--voice",
        default=DEFAULT_VOICE,
        metavar="VOICE",
        help="of calls that bring none: a name or a recording",
    )
    calls.add_argument(
        "--role",
        type=cli.text,
        default=Persona().text_prompt,
        metavar="TEXT",
        help="of calls that bring none",
    )
    calls.add_argument("--shortest", type=cli.positive, default=2.0, metavar="S", help="seconds of a call")
    calls.add_argument(
        "--text-lead", type=cli.whole(0, 12), default=0, metavar="N", help="frames by which text leads sound"
    )
    calls.add_argument(
        "--no-end-of-padding", action="store_true", help="for a model whose text has PAD only, never EPAD"
    )
    _model(command)


def _train(command: argparse.ArgumentParser) -> None:
    defaults, intervals = Settings(), Intervals()
    command.add_argument("data", type=Path, metavar="DATASET", help="made by prepare")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the run")
    what = command.add_argument_group("what is adapted")
    what.add_argument("--rank", type=cli.whole(1, 4096), default=defaults.rank)
    what.add_argument(
        "--scale", type=cli.positive, default=defaults.scale, help="factor of an adapter's change"
    )
    what.add_argument("--targets", nargs="+", choices=KINDS, default=list(DEFAULT_KINDS), metavar="KIND",
                      help=", ".join(KINDS))  # fmt: skip
    what.add_argument("--layers", type=_layers, metavar="A-B,C", help="of the temporal transformer; all")
    what.add_argument("--from", dest="begin", type=Path, metavar="FILE", help="begin from this adapter")
    loss = command.add_argument_group("loss")
    weights = Weights()
    loss.add_argument("--padding-weight", type=cli.not_negative, default=weights.padding, metavar="W",
                      help="of text padding, beside 1 of a word's piece")  # fmt: skip
    loss.add_argument("--semantic-weight", type=cli.not_negative, default=weights.semantic, metavar="W",
                      help="of the semantic codebook, beside 1 of each acoustic one")  # fmt: skip
    loss.add_argument("--quiet-share", type=cli.number(0, 1), default=weights.quiet, metavar="SHARE",
                      help="of the agent's silent frames, that count in the audio loss")  # fmt: skip
    _learning(command.add_argument_group("learning"), defaults)
    memory = command.add_argument_group("memory")
    memory.add_argument(
        "--gradient-checkpointing", action="store_true", help="compute layers twice instead of keeping them"
    )
    memory.add_argument("--pieces", type=cli.whole(1), default=defaults.pieces, metavar="N",
                        help="run a batch in so many pieces, one after the other")  # fmt: skip
    said = command.add_argument_group("on the way")
    said.add_argument("--save-every", type=cli.whole(1), default=intervals.save, metavar="STEPS")
    said.add_argument("--evaluate-every", type=cli.whole(1), default=intervals.evaluate, metavar="STEPS")
    said.add_argument("--samples", type=cli.whole(0, 64), default=2, metavar="N", help="generated each time")
    said.add_argument("--sample-seconds", type=cli.positive, default=20.0, metavar="S")
    said.add_argument("--greedy-samples", action="store_true", help="always the likeliest token")
    _model(command, weights=True)


def _learning(group: argparse._ArgumentGroup, defaults: Settings) -> None:
    group.add_argument("--steps", type=cli.whole(1), default=defaults.steps)
    group.add_argument("--batch-size", type=cli.whole(1), default=defaults.batch, metavar="N")
    group.add_argument("--length", type=cli.positive, default=defaults.length * FRAME_SECONDS, metavar="S",
                       help="seconds of a call in one sequence, at most")  # fmt: skip
    group.add_argument("--rate", type=cli.positive, default=defaults.rate, help="learning rate")
    group.add_argument("--warmup", type=cli.whole(0), default=defaults.warmup, metavar="STEPS")
    group.add_argument("--weight-decay", type=cli.not_negative, default=defaults.decay, metavar="W")
    group.add_argument("--clip", type=cli.positive, default=defaults.clip, metavar="NORM")
    group.add_argument("--validation", type=cli.number(0, 0.9), default=defaults.validation, metavar="SHARE",
                       help="of the calls, held back")  # fmt: skip
    group.add_argument("--validation-data", type=Path, metavar="DATASET", help="in place of held-back calls")
    group.add_argument("--rehearse", type=Path, metavar="DATASET", help="of what must not be forgotten")
    group.add_argument("--rehearsal", type=cli.number(0, 0.9), default=defaults.rehearsal, metavar="SHARE",
                       help="of a batch that is rehearsed")  # fmt: skip
    group.add_argument("--seed", type=cli.whole(0, 2**31), default=defaults.seed)


def _merge(command: argparse.ArgumentParser) -> None:
    command.add_argument("--lora", type=Path, required=True, metavar="FILE", help="the adapter")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the checkpoint")
    _model(command)


def _model(command: argparse.ArgumentParser, weights: bool = False) -> None:
    group = command.add_argument_group("model")
    group.add_argument("--model", default="7b", help="7b (from Hugging Face), tiny or a directory")
    group.add_argument("--hf-repo", dest="repo", default=DEFAULT_REPO, help="Hugging Face repository of 7b")
    group.add_argument("--revision", help="branch, tag or commit in that repository")
    cli.add_checkpoint_files(group)
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    if weights:
        group.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="of the frozen weights")
        group.add_argument("--weights", default="auto", choices=("auto", "int8"),
                           help="int8: frozen temporal layers at half the memory of bfloat16")  # fmt: skip


def _layers(text: str) -> tuple[int, ...]:
    """The type of --layers."""
    found: set[int] = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of layers: as 0-15 or 8,10-12") from error
    if not found or max(found) > 10_000:
        raise argparse.ArgumentTypeError(f"{text!r} names no layers: as 0-15 or 8,10-12")
    return tuple(sorted(found))
