"""Fills a Hugging Face cache with what a replica needs, so that replicas run offline and read-only.

    HF_HOME=/models/huggingface HF_TOKEN=... python -m k8s.fetch_weights [--repo R] [--revision V]

Runs in the GPU image, in an init container or a Job. Downloads the files the loader would ask for, unpacks
the voices beside their archive, and then writes the marker that replicas wait for (--marker FILE). Exit code
1 with one line when it fails: a missing token, an unaccepted licence, no space.
"""

from __future__ import annotations

import argparse
import sys

from personaplex import cli
from personaplex.errors import PersonaplexError
from personaplex.model.hub import DEFAULT_REPO, resolve
from personaplex.outputs import file_name, try_output
from personaplex.voicearchive import unpack


def fetch(repo: str, revision: str) -> None:
    """Raises CheckpointError, which says what to do, or OSError when the disk is full or read-only."""
    checkpoint = resolve("7b", hf_repo=repo, revision=revision)
    if checkpoint.voices is not None and checkpoint.voices.is_file():
        unpack(checkpoint.voices)


EXAMPLES = ("HF_HOME=/models/huggingface HF_TOKEN=... python -m k8s.fetch_weights --marker /models/complete",)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m k8s.fetch_weights", description="Fill the weights' cache.", examples=EXAMPLES
    )
    parser.add_argument("--repo", default=DEFAULT_REPO)
    parser.add_argument("--revision", default="main")
    parser.add_argument("--marker", type=file_name, help="file made when everything is there")
    return parser


def main(arguments: list[str] | None = None) -> int:
    return cli.run(
        lambda: _main(_parser().parse_args(arguments)), "model", "interrupted; what has arrived is kept"
    )


def _main(args: argparse.Namespace) -> int:
    try:
        if args.marker:
            try_output(args.marker)
        fetch(args.repo, args.revision)
        if args.marker:
            args.marker.touch()
    except (PersonaplexError, OSError) as error:
        cli.complain(cli.reason(error), "weights not fetched: ")
        return cli.FAILED
    print(f"{args.repo} at {args.revision} is complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
