"""`make test` fails when any part of it does, and runs what measures time at the ordinary priority."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import suite

SAY = "import os, sys; print(sys.argv[1], os.nice(0)); raise SystemExit(int(sys.argv[2]))"


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("timed", "beside", "code"), [(0, 0, 0), (1, 0, 1), (0, 1, 1), (2, 5, 1)])
def test_both_parts_count_and_are_shown(
    timed: int, beside: int, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    codes = {suite.TIMED: timed, suite.BESIDE: beside}

    def command(folders: Sequence[str], options: Sequence[str]) -> list[str]:
        name = "timed" if folders is suite.TIMED else "beside"
        return [sys.executable, "-c", SAY, name, str(codes[tuple(folders)])]

    monkeypatch.setattr(suite, "pytest", command)
    assert suite.main([]) == code
    niceness = os.nice(0)
    shown = capfd.readouterr().out.splitlines()
    assert shown == [f"timed {niceness}", f"beside {min(19, niceness + suite.NICENESS)}"]


def test_every_folder_of_tests_has_its_part() -> None:
    folders = {f"tests/{path.parent.name}" for path in (suite.ROOT / "tests").glob("*/test_*.py")}
    ignored = {f"--ignore={file}" for file in suite.REAL_TIME}
    assert folders == {*suite.TIMED, *suite.BESIDE, "tests/browser"} - {*suite.REAL_TIME, *ignored}
    assert all((suite.ROOT / file).is_file() for file in suite.REAL_TIME)
    assert ignored < {*suite.BESIDE}, "or they would run twice"
    assert not list((suite.ROOT / "tests").glob("test_*.py"))


def test_a_suite_that_is_ended_ends_its_parts_as_ctrl_c_does(tmp_path: Path) -> None:
    part = (
        "import pathlib, sys, time\n"
        "try:\n"
        "    pathlib.Path(sys.argv[1], 'began').touch()\n"
        "    time.sleep(60)\n"
        "except KeyboardInterrupt:\n"
        "    pathlib.Path(sys.argv[1], 'ended').touch()\n"
    )
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        folder.mkdir()
    program = (
        f"import sys, suite\n"
        f"folders = iter({[str(folder) for folder in folders]})\n"
        f"suite.pytest = lambda *_: [sys.executable, '-c', {part!r}, next(folders)]\n"
        f"sys.exit(suite.main([]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(suite.ROOT / "tests")}
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as process:
        deadline = time.monotonic() + 30
        while not all((folder / "began").exists() for folder in folders):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert all((folder / "ended").exists() for folder in folders)
