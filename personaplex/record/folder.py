"""Records in a folder: found by what they are about, read within bounds, deleted by name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from personaplex.errors import BadRecord, ConfigError
from personaplex.files import read_bounded
from personaplex.record.format import FILE_LIMIT, SUFFIX, Record, parse


@dataclass(frozen=True)
class Filter:
    """What to take: each condition that is set has to hold. Times are seconds since 1970; `voice` is the
    voice's name, `role` a part of the role text, in any case; lengths are seconds."""

    since: float = -math.inf
    until: float = math.inf
    session: str | None = None
    person: str | None = None
    voice: str | None = None
    role: str | None = None
    shortest_s: float = 0.0
    longest_s: float = math.inf

    def takes(self, record: Record) -> bool:
        head = record.head
        return (
            self.since <= head.began < self.until
            and (self.session is None or head.session.startswith(self.session))
            and (self.person is None or head.person == self.person)
            and (self.voice is None or head.persona.voice == self.voice)
            and (self.role is None or self.role.casefold() in head.persona.text_prompt.casefold())
            and self.shortest_s <= record.seconds <= self.longest_s
        )

    @property
    def empty(self) -> bool:
        return self == Filter()


@dataclass(frozen=True)
class Unreadable:
    """A file that is named like a record and cannot be read as one."""

    path: Path
    reason: str


def read_record(path: Path) -> Record:
    """Raises BadRecord, or OSError, which names the file."""
    try:
        return parse(read_bounded(path, FILE_LIMIT))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def find_records(paths: Iterable[Path]) -> list[Path]:
    """The files named, and of folders every record in them, oldest first. Raises ConfigError for a name that
    is not there."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(one for one in path.rglob(f"*{SUFFIX}") if one.is_file())
        elif path.exists():
            found.append(path)
        else:
            raise ConfigError(f"{path} is not there")
    return list(dict.fromkeys(found))


def select(paths: Iterable[Path], wanted: Filter) -> Iterator[tuple[Path, Record] | Unreadable]:
    """The records among `paths` that `wanted` takes, and what cannot be read."""
    for path in paths:
        try:
            record = read_record(path)
        except BadRecord as error:
            yield Unreadable(path, str(error))
        except OSError as error:
            yield Unreadable(path, error.strerror or type(error).__name__)
        else:
            if wanted.takes(record):
                yield path, record
