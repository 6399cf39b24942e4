"""Records in folders: `python -m personaplex.records --help`. Only `export` needs a model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from personaplex import cli
from personaplex.errors import ConfigError
from personaplex.record.folder import Filter, Unreadable, find_records, select
from personaplex.record.format import Record
from personaplex.record.options import add_model
from personaplex.record.transcript import words
from personaplex.record.writer import claimed

_RUN = "python -m personaplex.records"
EXAMPLES = (
    f"{_RUN} list records/ --since 2026-11-01 --shortest 30",
    f"{_RUN} show records/ --session 5e55",
    f"{_RUN} export records/ --voice NATF2 --output dataset/",
    f"{_RUN} delete records/ --person customer-17",
    f"{_RUN} delete records/ --until 30d",
)
_AGE = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; exit codes are those of `cli`: 1 when some records could not be read or deleted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return cli.run(lambda: _run(argv), "model")


def _run(argv: Sequence[str] | None) -> int:
    options = parser().parse_args(argv)
    run: Callable[[argparse.Namespace, Filter], int] = options.run
    return run(options, _filter(options))


def parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog=_RUN, description="Finds, shows, exports and deletes recorded conversations.", examples=EXAMPLES
    )
    commands = parser.add_subparsers(required=True, metavar="list | show | export | delete")
    for name, run, about in (
        ("list", _list, "a line a record"),
        ("show", _show, "what they were and what the agent said"),
        ("export", _export, "a dataset: stereo wavs (agent left, user right) and word-timed JSON"),
        ("delete", _delete, "delete them for good"),
    ):
        command = commands.add_parser(name, help=about, description=about.capitalize() + ".")
        command.set_defaults(run=run)
        command.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="records or folders of them")
        _add_filter(command.add_argument_group("which (all that hold)"))
        if name == "list":
            command.add_argument("--json", action="store_true", help="a JSON object a line")
        if name == "export":
            command.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder")
            add_model(command.add_argument_group("model"))
        if name == "delete":
            command.add_argument("--all", action="store_true", help="every record of the folders")
            command.add_argument("--dry-run", action="store_true", help="only say which")
    return parser


def _add_filter(group: argparse._ArgumentGroup) -> None:
    when = "as 2026-11-01, 2026-11-01T12:30 (UTC) or an age such as 30d, 12h"
    group.add_argument("--since", type=moment, default=Filter.since, metavar="TIME", help=when)
    group.add_argument("--until", type=moment, default=Filter.until, metavar="TIME", help="began before then")
    group.add_argument("--session", metavar="ID", help="the session's name, or how it begins")
    group.add_argument("--person", metavar="NAME", help="the name the client gave (record_person)")
    group.add_argument("--voice", metavar="NAME", help="the agent's voice")
    group.add_argument("--role", metavar="WORDS", help="words of the role text")
    group.add_argument("--shortest", type=cli.not_negative, default=0.0, metavar="S", help="seconds")
    group.add_argument("--longest", type=cli.not_negative, default=Filter.longest_s, metavar="S")


def _filter(options: argparse.Namespace) -> Filter:
    return Filter(
        since=options.since,
        until=options.until,
        session=options.session,
        person=options.person,
        voice=options.voice,
        role=options.role,
        shortest_s=options.shortest,
        longest_s=options.longest,
    )


def moment(text: str) -> float:
    """An option's type: a time in UTC, or so long ago, as seconds since 1970."""
    age = _AGE.fullmatch(text)
    if age:
        return time.time() - int(age[1]) * _UNITS[age[2]]
    try:
        found = datetime.fromisoformat(text.removesuffix("Z") + ("+00:00" if text.endswith("Z") else ""))
        return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time: as 2026-11-01, 2026-11-01T12:30 or 30d"
        ) from error


class _Search:
    """The records asked for, while those that cannot be read are said and counted."""

    def __init__(self, options: argparse.Namespace, wanted: Filter) -> None:
        self.paths = find_records(options.paths)
        self.failed = 0
        self._wanted = wanted

    def __iter__(self) -> Iterator[tuple[Path, Record]]:
        for found in select(self.paths, self._wanted):
            if isinstance(found, Unreadable):
                self.fail(found.path, found.reason)
            else:
                yield found

    def fail(self, path: Path, why: str) -> None:
        self.failed += 1
        cli.complain(f"{path}: {why}")

    @property
    def code(self) -> int:
        return cli.FAILED if self.failed else 0


def _list(options: argparse.Namespace, wanted: Filter) -> int:
    search = _Search(options, wanted)
    total, count = 0.0, 0
    for path, record in search:
        total, count = total + record.seconds, count + 1
        if options.json:
            print(json.dumps(_facts(path, record), ensure_ascii=False))
            continue
        head = record.head
        person = f"  {head.person}" if head.person else ""
        print(
            f"{_when(head.began)}  {record.seconds:>8.1f} s  {head.persona.voice:<8} {_state(record):<10} "
            f"{head.session}{person}  {path}"
        )
    if not options.json:
        cli.complain(f"{count} records, {total:.1f} s", "")
    return search.code


def _show(options: argparse.Namespace, wanted: Filter) -> int:
    search = _Search(options, wanted)
    for path, record in search:
        for name, value in _facts(path, record).items():
            if value not in ("", None):
                print(f"{name}: {value}")
        for line in _lines(record):
            print(line)
        print()
    return search.code


def _export(options: argparse.Namespace, wanted: Filter) -> int:
    from personaplex.export import Exporter  # torch: only where a model runs

    search = _Search(options, wanted)
    exporter = Exporter(options, options.output, search.paths)
    for path, record in search:
        exporter.add(path, record, search.fail)
    exporter.finish()
    print(f"{exporter.count} conversations, {exporter.seconds:.1f} s: {exporter.manifest}")
    return search.code


def _delete(options: argparse.Namespace, wanted: Filter) -> int:
    if wanted.empty and not options.all and any(path.is_dir() for path in options.paths):
        raise ConfigError("that would delete every record of a folder: say which, or --all")
    search, deleted = _Search(options, wanted), 0
    for path in _condemned(search, everything=wanted.empty):
        try:
            with claimed(path) as finished:
                if not finished:
                    search.fail(path, "still being written; not deleted")
                    continue
                if not options.dry_run:
                    path.unlink()
        except OSError as error:
            search.fail(path, cli.reason(OSError(error.errno, error.strerror)))
        else:
            deleted += 1
            print(path)
    cli.complain(f"{deleted} records {'would be ' if options.dry_run else ''}deleted", "")
    return search.code


def _condemned(search: _Search, everything: bool) -> Iterator[Path]:
    """What is to be deleted. Without a condition also what cannot be read; with one that is a failure, as it
    cannot be judged."""
    if everything:
        yield from search.paths
    else:
        for path, _ in search:
            yield path


def _facts(path: Path, record: Record) -> dict[str, object]:
    head = record.head
    return {
        "record": str(path),
        "session": head.session,
        "began": _when(head.began),
        "seconds": round(record.seconds, 2),
        "state": _state(record),
        "damage": record.damage,
        "missing_frames": record.span - len(record),
        "person": head.person,
        "voice": head.persona.voice,
        "text_prompt": head.persona.text_prompt,
        "sampling": dataclasses.asdict(head.persona.sampling),
        "model": head.model,
        "engine": dict(head.engine),
        "version": head.version,
    }


def _state(record: Record) -> str:
    if record.damage is not None:
        return "damaged"
    return "whole" if record.ended is not None else "cut short"


def _when(began: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began))


def _lines(record: Record) -> Iterator[str]:
    """The agent's words, a line for what is said without a pause of a second and a half."""
    line: list[str] = []
    start = end = 0.0
    for word in words(record):
        if line and word.start - end > 1.5:
            yield f"  {start:>8.2f}  {' '.join(line)}"
            line = []
        start = start if line else word.start
        end = word.end
        line.append(word.text)
    if line:
        yield f"  {start:>8.2f}  {' '.join(line)}"


if __name__ == "__main__":
    sys.exit(main())
