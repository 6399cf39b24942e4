"""Options of the commands that read records and need a model: the default is the one recorded. No torch."""

from __future__ import annotations

import argparse
from pathlib import Path

from personaplex import cli
from personaplex.outputs import file_name

_RUN = "python -m personaplex.replay call.record"
EXAMPLES = (
    f"{_RUN} --output-wav both.wav --output-text t.json",
    f"{_RUN} --html call.html",
    f"{_RUN} --compare",
    f"{_RUN} --continue --seconds 4 --output-wav more.wav",
)


def parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m personaplex.replay",
        description="Makes a recorded conversation heard, compares it with what the model says now, or goes "
        "on from its end. Exit code 1: --compare found a difference.",
        examples=EXAMPLES,
    )
    parser.add_argument("record", type=Path, metavar="RECORD", help="a record of the service")
    files = parser.add_argument_group("outputs")
    files.add_argument(
        "--output-wav", type=file_name, metavar="FILE", help="stereo: the agent on the left, the user right"
    )
    files.add_argument("--output-text", type=file_name, metavar="FILE", help="JSON: the words with times")
    files.add_argument("--html", type=file_name, metavar="FILE", help="one page with all of it, to be opened")
    work = parser.add_argument_group("the model again")
    work.add_argument(
        "--compare", action="store_true", help="run the model on the same user and say where it differs"
    )
    work.add_argument(
        "--continue", dest="go_on", action="store_true", help="let the conversation go on after its end"
    )
    work.add_argument(
        "--seconds", type=cli.positive, default=10.0, metavar="N", help="for how long (10 seconds)"
    )
    work.add_argument(
        "--input-wav", type=Path, metavar="FILE", help="what the user says then; without it, nothing"
    )
    add_model(parser.add_argument_group("model"))
    return parser


def add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", help="7b, tiny or a directory; the recorded one unless given")
    group.add_argument("--hf-repo", dest="repo", help="Hugging Face repository of 7b; as recorded")
    group.add_argument("--revision", help="branch, tag or commit in that repository; as recorded")
    cli.add_checkpoint_files(group)
    group.add_argument("--lora", type=Path, metavar="FILE", help="the adapter, where one is recorded")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), help="of the language model; as recorded"
    )
    group.add_argument("--weights", choices=("auto", "int8"), help="as recorded")
    group.add_argument("--kv", choices=("auto", "int8"), help="as recorded")
