"""One run of a command in a folder of its own, and what every run has to keep to."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile

Main = Callable[[Sequence[str]], int]
RATE = 24_000


@dataclass(frozen=True)
class Row:
    """`arguments` of a command, the exit code, and words of its line on stderr ("" where there is none)."""

    arguments: str
    code: int
    says: str
    arrange: Callable[[], None] = lambda: None

    def __str__(self) -> str:
        return self.arguments.encode(errors="backslashreplace").decode()


def sound(path: str, seconds: float = 0.2, pitch: float = 220.0, **options: str) -> Path:
    """A tone at 24 kHz; the folder is made."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(round(seconds * RATE)) / RATE
    soundfile.write(target, 0.3 * np.sin(2 * np.pi * pitch * t), RATE, **options)
    return target


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Say:
    """What a command says: on stderr, and by logging, which the command itself sends to stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        self._capsys, self._caplog = capsys, caplog

    def take(self) -> str:
        """All since the last call."""
        said = self._capsys.readouterr().err + "".join(f"{line}\n" for line in self._caplog.messages)
        self._caplog.clear()
        return said


def run_row(main: Main, row: Row, say: Say, head: str = "") -> str:
    """Runs a row in the working folder: the code, one error line at most, no traceback, inputs as they were.

    A refused command leaves no new file. Gives what it said on stderr.
    """
    row.arrange()
    before = contents(Path())
    say.take()
    code = main(shlex.split(head) + shlex.split(row.arguments))
    said = say.take()
    assert code == row.code, said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == (code not in (0, 130)), said
    assert row.says in said, said
    after = contents(Path())
    assert {name: after.get(name) for name in before} == before
    if code == 2:
        assert after.keys() == before.keys()
    return said
