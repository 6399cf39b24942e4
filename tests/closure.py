"""What an extra of this project needs, taken from the environment the tests run in.

A fresh environment with some extras costs a minute of downloads. `furnish` puts the same distributions, file
by file, into a new one, so that an installer finds its requirements satisfied and has only the project to
add. What it has overlooked the installer fetches, and what is too much the tests of the result notice.
"""

from __future__ import annotations

import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = "personaplex-serve"


def needed(extras: set[str]) -> dict[str, Distribution]:
    """All distributions that the project with `extras` depends on, by canonical name, without the project."""
    found: dict[str, Distribution] = {}
    waiting = [(PROJECT, frozenset(extras))]
    seen = set(waiting)
    while waiting:
        name, wanted = waiting.pop()
        try:
            one = distribution(name)
        except PackageNotFoundError:
            continue  # of another system, or overlooked
        if name != PROJECT:
            found[name] = one
        for line in one.requires or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted or {""}):
                entry = (canonicalize_name(requirement.name), frozenset(requirement.extras))
                if entry not in seen:
                    seen.add(entry)
                    waiting.append(entry)
    return found


def furnish(prefix: Path, extras: set[str]) -> None:
    """Links the files of `needed(extras)` to where an environment at `prefix` has them, commands included."""
    here = Path(sys.prefix).resolve()
    for one in needed(extras).values():
        for file in one.files or ():
            source = Path(one.locate_file(file)).resolve()
            if not source.is_relative_to(here) or not source.is_file():
                continue
            target = prefix / source.relative_to(here)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.parent == prefix / "bin":
                _copy_command(source, target)
            elif not target.exists():
                target.symlink_to(source)


def _copy_command(source: Path, target: Path) -> None:
    """A command runs in its own environment's Python: that of `target`."""
    script, ours = source.read_bytes(), f"#!{sys.executable}".encode()
    target.write_bytes(script.replace(ours, f"#!{target.parent}/python".encode(), 1))
    target.chmod(0o755)
