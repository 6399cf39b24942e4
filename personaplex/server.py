"""The whole service on one machine: `python -m personaplex.server --help`.

Parses the command line; `deployments/command.py` does the rest. The options of
NVIDIA's `moshi.server` mean the same here or are refused; every other setting can be given with --set or in
the environment, as PERSONAPLEX_<NAME>. Browsers give a page the microphone on localhost or over https only:
--ssl makes a certificate.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personaplex import cli
from personaplex.errors import ConfigError

if TYPE_CHECKING:
    from deployments.settings import Settings

_TUNNEL = (
    "it would lead conversations through somebody else's server; use --ssl, or `ssh -L 8998:localhost:8998`"
)
_REFUSED = {"gradio-tunnel": _TUNNEL, "gradio-tunnel-token": _TUNNEL}  # of moshi.server's options
# Options that are settings of the same name.
_SETTINGS = (
    *("model", "device", "slots", "weights", "kv", "static"),
    *("hf_repo", "hf_revision", "moshi_weight", "mimi_weight", "tokenizer", "voice_prompt_dir", "lora"),
)
EXAMPLES = (
    "python -m personaplex.server",
    "python -m personaplex.server --model tiny --slots 2 --port 8998",
    "python -m personaplex.server --ssl certs --host 0.0.0.0",
    "python -m personaplex.server --model 7b --slots 8 --kv int8 --set api_keys_file=keys.txt",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the service until SIGINT or SIGTERM; 0 then, 2 for a wrong set-up, 1 when Ray
    ended before, 130 for Ctrl-C while it started."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return cli.run(lambda: _main(_parser().parse_args(argv)), "serve")


def _main(options: argparse.Namespace) -> int:
    from deployments import command  # an optional extra: what is missing of it is one line of error

    with command.visible(command.one_card(options.device, os.environ.get(command.CARDS))):
        settings = _settings(options)
        try:
            command.run(
                settings,
                options.host,
                options.port,
                ssl_folder=options.ssl,
                with_haproxy=options.haproxy,
            )
        except command.RayEnded as error:
            cli.complain(str(error))
            return cli.FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m personaplex.server",
        description="The whole service on this machine: Ray, gateway, model replica and web page.",
        examples=EXAMPLES,
    )
    parser.add_argument("--host", default="localhost", help="address to listen on; 0.0.0.0 is all")
    parser.add_argument("--port", type=cli.whole(1, 65_535), default=8998)
    parser.add_argument("--ssl", type=Path, metavar="DIR", help="https; makes a certificate in DIR if needed")
    parser.add_argument(
        "--haproxy", action="store_true", help="HAProxy carries the sockets: for many sessions; without --ssl"
    )
    parser.add_argument("--model", help="auto, 7b, tiny, echo or a directory with a checkpoint")
    parser.add_argument("--device", help="auto, cpu, cuda, or cuda:N for one card of several")
    parser.add_argument("--slots", help="sessions at once")
    parser.add_argument(
        "--weights", help="auto or int8: half the bytes of most weights, at some cost in quality"
    )
    parser.add_argument("--kv", help="auto or int8: half the memory of a session, for a little noise")
    parser.add_argument(
        "--cpu-offload", action="store_true", help="keep weights that do not fit in host memory"
    )
    parser.add_argument("--low-latency", action="store_true", help="less delay for more work; see the README")
    parser.add_argument("--hf-repo", help="Hugging Face repository of the weights")
    parser.add_argument("--hf-revision", help="its branch, tag or commit")
    parser.add_argument("--moshi-weight", help="language model weights, in place of the repository's")
    parser.add_argument("--mimi-weight", help="codec weights, in place of the repository's")
    parser.add_argument("--tokenizer", help="text tokenizer, in place of the repository's")
    parser.add_argument("--voice-prompt-dir", help="directory of voices, in place of the repository's")
    parser.add_argument("--lora", metavar="FILE", help="an adapter for this model; see docs/finetuning.md")
    parser.add_argument("--static", metavar="DIR|none", help="directory of another web page, or none")
    for name in _REFUSED:
        parser.add_argument(f"--{name}", nargs="?", const="", help=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    from deployments.command import load_settings
    from deployments.settings import refuse_keys_among

    for name, reason in _REFUSED.items():
        if getattr(options, name.replace("-", "_")) is not None:
            raise ConfigError(f"--{name} is not supported: {reason}")
    values: dict[str, Any] = {}
    for name in _SETTINGS:
        value = getattr(options, name)
        if value is not None:
            values[name] = value
    if options.device == "mps":
        raise ConfigError("--device mps is not supported: choose auto, cpu, cuda or cuda:N")
    if (options.device or "").startswith("cuda:"):
        values["device"] = "cuda"  # the only one there will be: see command.one_card
    for name in ("cpu_offload", "low_latency"):
        if getattr(options, name):
            values[name] = True
    for item in options.set:
        name, given, value = item.partition("=")
        if not given:
            raise ConfigError(f"--set takes NAME=VALUE, not {item!r}")
        values[name] = value
    refuse_keys_among(options.set)
    return load_settings(values)


if __name__ == "__main__":
    status = main()
    if status == cli.FAILED:  # Ray has ended
        os._exit(status)  # its own exit handlers would talk to processes that are gone
    sys.exit(status)
