"""The keys that open a session: one a line of a file, with their limits; read again when the file changes.

    KEY [label=NAME] [sessions=N] [minutes=N] [priority=0..9] [own_voices=yes|no]

Keys are kept as digests, so that neither their length nor a common prefix shows, and compared in constant
time. What is wrong with a file names its line and never its content. See docs/access.md.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deployments.wire.holdings import Limits
from personaplex.errors import ConfigError
from personaplex.files import key_lines

logger = logging.getLogger(__name__)

UNLABELLED = "unlabelled"
PRIORITY = 5  # of a key that says none
PRIORITIES = range(10)
KEYS_LIMIT = 20_000  # in one file; every one is compared with what a client shows
LOOK_EVERY_S = 1.0
SETTLE_S = 0.5  # a file that is written in place is read once it has been left alone for this long

_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True)
class Key:
    """What one key may do. `holder`: whom its limits count, its label or a digest. None: as set."""

    holder: str
    label: str = ""
    sessions: int | None = None
    minutes: float = 0.0
    priority: int = PRIORITY
    own_voices: bool | None = None

    @property
    def shown(self) -> str:
        """Its name in metrics and logs."""
        return self.label or UNLABELLED

    def limits(self, sessions: int) -> Limits:
        """`sessions`: of keys that say none."""
        return Limits(sessions if self.sessions is None else self.sessions, 60.0 * self.minutes)


class KeyTable:
    """All keys of one moment."""

    def __init__(self, keys: Iterable[tuple[str, Key]] = ()) -> None:
        """Pairs of a key and what it may do. Raises ConfigError for one that is there twice, and for labels
        whose keys do not have the same limits."""
        self._keys: dict[bytes, Key] = {}
        labels: dict[str, Key] = {}
        for text, key in keys:
            digest = _digest(text)
            if digest in self._keys:
                raise ConfigError("a key is there twice")
            if key.label and labels.setdefault(key.label, key) != key:
                raise ConfigError(f"the keys labelled {key.label} have different limits")
            self._keys[digest] = key

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def holders(self) -> int:
        return len({key.holder for key in self._keys.values()})

    def any_own_voices(self) -> bool:
        return any(key.own_voices for key in self._keys.values())

    def find(self, shown: str) -> Key | None:
        """The key a client shows; None when there is no such key."""
        asked, found = _digest(shown), None
        for digest, key in self._keys.items():  # all of them, always
            if hmac.compare_digest(asked, digest):
                found = key
        return found

    def holds(self, key: Key) -> bool:
        """Whether a key like this one still opens a session."""
        return any(one.holder == key.holder for one in self._keys.values())


def read_keys(path: Path) -> Iterator[tuple[str, Key]]:
    """The keys in a file. Raises ConfigError, which names the line."""
    lines = key_lines(path)
    if len(lines) > KEYS_LIMIT:
        raise ConfigError(f"{path.name} holds more than {KEYS_LIMIT} keys")
    for number, line in enumerate(lines, start=1):
        try:
            yield parse_key(line)
        except ValueError as error:
            raise ConfigError(f"{path.name}: key {number}: {error}") from error


def parse_key(line: str) -> tuple[str, Key]:
    """The key in a line, and what it may do. Raises ValueError, in words that show no part of the line but
    the names of options."""
    text, *options = line.split()
    values: dict[str, str] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if name not in _OPTIONS or not equals:
            raise ValueError(f"behind the key come options NAME=VALUE: {', '.join(_OPTIONS)}")
        if name in values:
            raise ValueError(f"{name} is there twice")
        values[name] = value
    label = values.get("label", "")
    parsed = {name: _OPTIONS[name](value) for name, value in values.items() if name != "label"}
    if "label" in values and not _LABEL.fullmatch(label):
        raise ValueError("label must be letters, digits and _.-, at most 64 of them")
    if label == UNLABELLED:
        raise ValueError(f"label must be another word than {UNLABELLED}")
    return text, Key(f"label {label}" if label else plain_holder(text), label, **parsed)  # type: ignore[arg-type]


def plain_holder(text: str) -> str:
    """The holder of a key without a label."""
    digest = hashlib.blake2b(text.encode(errors="surrogatepass"), person=b"holder of a key", digest_size=16)
    return f"key {digest.hexdigest()}"


def _whole(name: str, numbers: Sequence[int]) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) not in numbers:
            raise ValueError(f"{name} must be a whole number from {numbers[0]} to {numbers[-1]}")
        return int(value)

    return parse


def _minutes(value: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value) or not math.isfinite(float(value)):
        raise ValueError("minutes must be a number, such as 90 or 0.5")
    return float(value)


def _switch(value: str) -> bool:
    if value not in ("yes", "no"):
        raise ValueError("own_voices must be yes or no")
    return value == "yes"


_OPTIONS: dict[str, Callable[[str], object]] = {
    "label": str,
    "sessions": _whole("sessions", range(1_000_001)),
    "minutes": _minutes,
    "priority": _whole("priority", PRIORITIES),
    "own_voices": _switch,
}


class Keys:
    """The keys now: those given with the settings, and those in a file. `table` is replaced as a whole."""

    def __init__(self, given: Sequence[str], path: Path | None) -> None:
        """Raises ConfigError for a file that cannot be read."""
        self._given, self._path = tuple(given), path
        self._seen = self._loaded = self._state()
        self.table = self._read()

    def changed(self) -> bool:
        """Whether the file is another one than was read last, and is complete: it was put in place as a
        whole, or has been left alone for SETTLE_S."""
        state = self._state()
        if state == self._loaded:
            return False
        replaced = state is not None and (self._loaded is None or state[:2] != self._loaded[:2])
        settled = state is None or time.time() - state[2] / 1e9 >= SETTLE_S
        known, self._seen = state == self._seen, state
        return replaced or settled or (known and state is not None and state[2] > time.time_ns())

    def reload(self) -> None:
        """Reads the file. Raises ConfigError, and then the old keys stay; the same file is not tried again
        until it changes."""
        before = self._state()
        self._loaded = before
        table = self._read()
        if self._state() != before:  # it was changed meanwhile
            self._loaded = None
        self.table = table

    async def watch(self, loaded: Callable[[bool], None]) -> None:
        """Reads the file again whenever it changes, for ever where there is one; `loaded(ok)` after each
        time."""
        while self._path is not None:
            await asyncio.sleep(LOOK_EVERY_S)
            if not await asyncio.to_thread(self.changed):
                continue
            try:
                await asyncio.to_thread(self.reload)
            except ConfigError as error:
                logger.warning("the old keys stay: %s", error)
                loaded(False)
            else:
                logger.info("keys read again: %d", len(self.table))
                loaded(True)

    def _state(self) -> tuple[int, int, int, int] | None:
        if self._path is None:
            return None
        try:
            state = os.stat(self._path)
        except (OSError, ValueError):
            return None
        return state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size

    def _read(self) -> KeyTable:
        found = [(text, Key(plain_holder(text))) for text in self._given]
        try:
            if self._path is not None:
                found += read_keys(self._path)
            return KeyTable(found)
        except ConfigError as error:
            raise ConfigError(f"api_keys_file: {error}") from error


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()
