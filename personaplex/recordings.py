"""Which files of the inputs are recordings, and a word about every one that is not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from personaplex.audio.readable import OTHER_SUFFIXES, SOUND_SUFFIXES
from personaplex.errors import ConfigError

SHOWN_NAMES = 5  # of files that are left out, before "and N more"

PathLike = str | os.PathLike[str]
Failure = tuple[str, str]  # name of a recording, reason


@dataclass
class Found:
    """What the inputs hold: recordings to run, and why other files are not run."""

    recordings: list[Path] = field(default_factory=list)
    unreadable: list[Failure] = field(default_factory=list)  # sound, but of a format that cannot be read
    notes: list[str] = field(default_factory=list)  # one line a folder about the files that are no recordings


def find_recordings(inputs: Sequence[PathLike]) -> Found:
    """Recordings in the order given; those of a folder in order of their names, subfolders not looked into.

    Files and pipes named one by one are taken as they are. Raises ConfigError for an input that does not
    exist and for a folder without a recording.
    """
    found = Found()
    for path in map(Path, inputs):
        if not path.exists():
            raise ConfigError(f"no such input: {path}")
        if path.is_dir():
            _look_into(path, found)
        else:
            found.recordings.append(path)
    return found


def _look_into(folder: Path, found: Found) -> None:
    before, companions, others = len(found.recordings), [], []
    unreadable = []
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if path.name.startswith("._"):
            companions.append(path.name)
        elif path.name.startswith("."):
            continue
        elif suffix in SOUND_SUFFIXES and (path.is_file() or not path.exists()):  # a dead link fails by name
            found.recordings.append(path)
        elif suffix in OTHER_SUFFIXES and path.is_file():
            unreadable.append(
                (path.name, f"skipped: libsndfile does not read {suffix}; convert it to WAV or FLAC")
            )
        else:
            others.append(path.name + "/" * path.is_dir())
    found.unreadable += unreadable
    if companions:
        found.notes.append(f"{folder}: macOS metadata left out: {_listed(companions)}")
    if others:
        found.notes.append(f"{folder}: left out, no recordings by their names: {_listed(others)}")
    if len(found.recordings) == before:
        unread = (
            f" that can be read (there is {_listed([name for name, _ in unreadable])})" if unreadable else ""
        )
        raise ConfigError(f"no recording in {folder}{unread}")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
