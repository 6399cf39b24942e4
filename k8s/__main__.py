"""The operator's tool: `python -m k8s COMMAND --help`. Exit codes: see errors.py."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from personaplex import cli

if __name__ == "__main__":
    cli.guard_imports("k8s")

import yaml

from k8s import conversation, errors, moves, preflight, rollout, sessions, sizing, smoke
from k8s.cluster import Cluster

_size = cli.number(0, 2**20, above=True)

Command = Callable[[argparse.Namespace], None]

EXAMPLES = (
    "helm template speech helm/personaplex | python -m k8s preflight -n speech",
    "python -m k8s rollout speech -n speech --timeout 3600",
    "python -m k8s smoke speech -n speech",
    "python -m k8s sessions speech -n speech",
    "python -m k8s serve-config -f manifest.yaml",
    "python -m k8s slots --memory-gib 80 --bandwidth-gbs 3350 --kv int8",
)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m k8s", description="Operates PersonaPlex on KubeRay.", examples=EXAMPLES
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = functools.partial(_command, commands)

    command = add("preflight", _preflight, "would the rendered manifest run on this cluster?")
    command.add_argument("-f", "--manifest", default="-", help="output of helm template; - is standard input")
    command = add(
        "rollout", _rollout, "wait until an upgrade is complete, then release the old cluster early"
    )
    command.add_argument("name", help="name of the RayService")
    command.add_argument(
        "--timeout", type=cli.not_negative, metavar="S", help="the change's own longest, unless given"
    )
    command.add_argument(
        "--interval", type=cli.positive, default=5.0, metavar="S", help="time between readings"
    )
    command.add_argument(
        "--zeros", type=cli.whole(1), default=4, help="readings without a session before the release"
    )
    command.add_argument("--keep-old", action="store_true", help="leave the old cluster to KubeRay's delay")
    command = add("smoke", _smoke, "ready? then one real conversation")
    command.add_argument("name", help="name of the RayService")
    command.add_argument("--url", help="talk through this address instead of a tunnel: wss://HOST/api/chat")
    command.add_argument("--api-keys-file", type=Path, help="file of keys; the first is used")
    command = add("sessions", _sessions, "who is where; --drain and --move bring sessions elsewhere")
    command.add_argument("name", help="name of the RayService")
    chosen = command.add_mutually_exclusive_group()
    chosen.add_argument("--drain", metavar="POD", help="evict this replica's pod and wait until it has gone")
    chosen.add_argument("--move", metavar="SESSION", help="bring this session to another replica")
    command.add_argument("--admin-key-file", type=Path, help="operator's key, for --move")
    command.add_argument("--timeout", type=cli.not_negative, default=3_600.0, metavar="S")
    command = add(
        "serve-config", _serve_config, "print the Serve config inside a rendered manifest", local=True
    )
    command.add_argument("-f", "--manifest", default="-", help="output of helm template; - is standard input")
    command = add(
        "slots", _slots, "how many sessions a card holds: computed, or from a measurement", local=True
    )
    command.add_argument("--memory-gib", type=_size, required=True)
    how = command.add_mutually_exclusive_group(required=True)
    how.add_argument("--bandwidth-gbs", type=_size, default=0.0, help="GB/s of the data sheet")
    how.add_argument("--measured", type=Path, metavar="FILE", help="report of benchmarks.gpu on that card")
    command.add_argument("--kv", choices=sizing.KINDS, default="auto", help="as the setting")
    command.add_argument("--weights", choices=sizing.KINDS, default="auto", help="as the setting")
    return parser


def _command(
    commands: Any, name: str, run: Command, text: str, local: bool = False
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    if not local:
        command.add_argument("-n", "--namespace", help="namespace; the kubeconfig's unless given")
        command.add_argument("--context", help="kubeconfig context")
    return command


def _connect(args: argparse.Namespace) -> Cluster:
    return Cluster.connect(args.namespace, args.context)


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def _documents(source: str) -> list[Any]:
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        return list(yaml.safe_load_all(text))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise errors.Failed(f"the manifest cannot be read: {error}") from error


def _preflight(args: argparse.Namespace) -> None:
    findings = preflight.run(_connect(args), _documents(args.manifest))
    for finding in findings:
        print(f"{finding.level:<4}  {finding.text}")
    failed = sum(finding.level == "fail" for finding in findings)
    if failed:
        raise errors.Failed(f"{failed} of {len(findings)} checks failed")


def _rollout(args: argparse.Namespace) -> None:
    run = rollout.Rollout(
        _connect(args), args.name, _say, timeout_s=args.timeout, interval_s=args.interval, zeros=args.zeros
    )
    run.run(release=not args.keep_old)


def _smoke(args: argparse.Namespace) -> None:
    try:
        key = conversation.first_key(args.api_keys_file) if args.api_keys_file else None
    except (OSError, ValueError) as error:
        raise errors.Failed(f"the keys cannot be read: {error}") from error
    smoke.smoke(_connect(args), args.name, _say, args.url, key)


def _sessions(args: argparse.Namespace) -> None:
    cluster = _connect(args)
    if args.drain:
        sessions.drain(cluster, args.drain, _say, args.timeout)
        return
    if args.move:
        if args.admin_key_file is None:
            raise errors.Failed("--move needs --admin-key-file")
        moves.move(cluster, args.name, args.move, args.admin_key_file, _say)
        return
    state = rollout.read(cluster.service(args.name))
    uids = {state.uid}
    unknown = False
    for item in cluster.clusters():
        if uids & {owner["uid"] for owner in item["metadata"].get("ownerReferences", [])}:
            name = item["metadata"]["name"]
            found = sessions.loads(cluster, name)
            count = sessions.total(found)
            unknown = unknown or count is None
            role = "active" if name == state.active else "pending" if name == state.pending else "old"
            print(f"{name} ({role}): {'unknown' if count is None else count} sessions")
            print(sessions.table(found))
    if unknown:
        raise errors.Failed("some loads could not be read")


def _serve_config(args: argparse.Namespace) -> None:
    found = [item for item in _documents(args.manifest) if item and item.get("kind") == "RayService"]
    if len(found) != 1:
        raise errors.Failed(f"the manifest holds {len(found)} RayServices, not one")
    print(found[0]["spec"]["serveConfigV2"])


def _slots(args: argparse.Namespace) -> None:
    card = sizing.Card(args.memory_gib * 2**30, args.bandwidth_gbs * 1e9)
    steps, source = None, "computed from the model's shapes and the data sheet, not measured"
    if args.measured is not None:
        steps, gpu = sizing.read_measured(args.measured, args.kv)
        source = f"steps measured on {gpu} with bf16 weights, memory computed"
    print(source, file=sys.stderr)
    print(sizing.slots(card, args.kv, args.weights, steps))


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; the exit code says how it went."""
    return cli.run(
        lambda: _main(_parser().parse_args(arguments)), "k8s", "stopped; nothing is left half done"
    )


def _main(args: argparse.Namespace) -> int:
    try:
        args.run(args)
    except errors.ToolError as error:
        cli.complain(str(error))
        return error.code
    return 0


if __name__ == "__main__":
    sys.exit(main())
