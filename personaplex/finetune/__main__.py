"""`python -m personaplex.finetune --help`: datasets from recorded calls, adapters, merged checkpoints.

`torchrun --nproc-per-node N -m personaplex.finetune train ...` trains on N GPUs.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from personaplex import cli

if __name__ == "__main__":
    cli.guard_imports("finetune")

from personaplex.errors import TrainingFailed
from personaplex.finetune import run
from personaplex.finetune.options import parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; exit codes are those of `cli`: 1 when some calls are unusable or training failed."""
    handler = logging.StreamHandler()
    handler.setFormatter(cli.OneLine("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    return cli.run(
        lambda: _run(parser().parse_args(argv)),
        "finetune",
        "interrupted; the same command goes on from the last checkpoint",
    )


def _run(options: argparse.Namespace) -> int:
    commands = {"prepare": run.prepare, "train": run.train, "merge": run.merge, "show": run.show}
    try:
        return commands[options.command](options)
    except TrainingFailed as error:
        cli.complain(str(error))
        return cli.FAILED


if __name__ == "__main__":
    sys.exit(main())
