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


@pytest.mark.parametrize(
    ("timed", "beside", "again", "code"),
    [
        (0, 0, None, 0),
        (1, 0, None, 1),
        (0, 1, 1, 1),
        (0, 1, 0, 0),
        (1, 1, 0, 1),
        (2, 5, None, 1),
        (0, 2, None, 1),
    ],
)
def test_both_parts_count_and_are_shown(
    timed: int,
    beside: int,
    again: int | None,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    codes = {"timed": timed, "beside": beside, "again": again}

    def command(folders: Sequence[str], options: Sequence[str]) -> list[str]:
        name = "timed" if folders is suite.TIMED else "again" if suite.AGAIN[0] in options else "beside"
        return [sys.executable, "-c", SAY, name, str(codes[name])]

    monkeypatch.setattr(suite, "pytest", command)
    assert suite.main([]) == code
    niceness = os.nice(0)
    shown = capfd.readouterr().out.splitlines()
    assert shown[:2] == [f"timed {niceness}", f"beside {min(19, niceness + suite.NICENESS)}"]
    assert shown[3:] == ([] if again is None else [f"again {niceness}"])


def test_what_is_judged_again_is_what_failed_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    command = [*suite.pytest(["."], [*suite.CACHE, "-c", os.devnull, "--rootdir=."])]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    second = subprocess.run(
        [*command, *suite.AGAIN], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert first.returncode == second.returncode == suite.FAILED
    assert "1 failed, 1 passed" in first.stdout
    assert "1 failed" in second.stdout
    assert "passed" not in second.stdout
    (tmp_path / "test_two.py").write_text("def test_good(): assert 0\ndef test_bad(): pass\n")
    assert (
        subprocess.run([*command, *suite.AGAIN], cwd=tmp_path, capture_output=True, check=False).returncode
        == 0
    )


def test_every_folder_of_tests_has_its_part() -> None:
    folders = {f"tests/{path.parent.name}" for path in (suite.ROOT / "tests").glob("*/test_*.py")}
    ignored = {f"--ignore={file}" for file in suite.REAL_TIME}
    parts = {*suite.TIMED, *suite.BESIDE} - {*suite.REAL_TIME, *ignored}
    assert folders == {*parts, "tests/browser"}  # which has a command of its own
    assert all((suite.ROOT / file).is_file() for file in suite.REAL_TIME)
    assert ignored < {*suite.BESIDE}, "or they would run twice"
    assert not list((suite.ROOT / "tests").glob("test_*.py"))


PART = """
import pathlib, sys, time
folder, stays, code = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
try:
    (folder / "began").touch()
    time.sleep(60 * stays)
except KeyboardInterrupt:
    (folder / "ended").touch()
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("stays", "codes", "wanted"),
    [((1, 1, 1), (2, 2, 2), (0, 1)), ((1, 0, 1), (2, 1, 2), (0,)), ((0, 0, 1), (0, 1, 2), (2,))],
    ids=["both parts", "one is over and has failed", "what is judged again"],
)
def test_a_suite_that_is_ended_ends_its_parts_as_ctrl_c_does(
    stays: Sequence[int], codes: Sequence[int], wanted: Sequence[int], tmp_path: Path
) -> None:
    """`stays`: whether each part runs on until it is ended, the third being what is judged again; `wanted`:
    which of those that have begun by then are. No other begins."""
    folders = [tmp_path / str(number) for number in range(3)]
    for folder in folders:
        folder.mkdir()
    rows = [[str(one), str(stay), str(code)] for one, stay, code in zip(folders, stays, codes, strict=True)]
    begun = folders[: max(2, max(wanted) + 1)]
    program = (
        f"import sys, suite\n"
        f"rows = iter({rows})\n"
        f"suite.pytest = lambda *_: [sys.executable, '-c', {PART!r}, *next(rows)]\n"
        f"sys.exit(suite.main([]))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(suite.ROOT / "tests")}
    with subprocess.Popen([sys.executable, "-c", program], env=environment) as process:
        deadline = time.monotonic() + 30
        while not all((folder / "began").exists() for folder in begun):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert process.returncode == 1
    assert [number for number, one in enumerate(folders) if (one / "ended").exists()] == list(wanted)
    assert [folder for folder in folders if (folder / "began").exists()] == begun
