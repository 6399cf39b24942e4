"""The whole suite, in two processes: `make test`.

Tests of a running service, and others in real time, wait more than they compute: they run at the ordinary
priority. The rest, which computes more than it waits, runs beside them, niced, so that it takes only what
they leave over of the processors. Its report follows theirs. A test of it that failed is judged again by
itself, with all of the processors: one that was only starved passes then. Both reports are shown.

    python tests/suite.py [pytest options]    # the exit status is 1 when either part failed
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
REAL_TIME = (  # bounds of seconds and less, or replicas that are suspected after such
    "tests/tools/test_loadtest.py",
    "tests/tools/test_loadtest_dialogue.py",
    "tests/unit/test_loadtest_protocols.py",
    "tests/unit/test_loop.py",
    "tests/unit/test_media.py",
    "tests/unit/test_recorder.py",
    "tests/unit/test_replica_sessions.py",
    "tests/unit/test_transcripts.py",
    "tests/slow/test_access_stack.py",
    "tests/slow/test_client.py",
    "tests/slow/test_client_resume.py",
    "tests/slow/test_connections.py",
    "tests/slow/test_conversation_audio.py",
    "tests/slow/test_conversation_ends.py",
    "tests/slow/test_failover.py",
    "tests/slow/test_moves.py",
    "tests/slow/test_protocol_failover.py",
    "tests/slow/test_protocol_hostile.py",
    "tests/slow/test_protocol_hostile_readers.py",
    "tests/slow/test_protocol_telephone.py",
    "tests/slow/test_resume.py",
    "tests/slow/test_resume_found.py",
    "tests/slow/test_transcription_session.py",
)
TIMED = ("tests/service", *REAL_TIME)
BESIDE = (
    *("tests/tools", "tests/chart", "tests/gpu", "tests/unit", "tests/slow", "tests/talk"),
    *(f"--ignore={file}" for file in REAL_TIME),
)
NICENESS = 19  # the least: bounds of the tests beside it are a frame or two
CACHE = ("-o", "cache_dir=.pytest_cache/beside")  # of its own: what failed in it is read from there
FAILED = 1  # pytest's status where tests ran and some failed; it has others where it was ended or broke
AGAIN = ("--last-failed", "--last-failed-no-failures=none")


def start(
    folders: Sequence[str], options: Sequence[str], report: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """pytest over `folders`, to be ended by SIGINT; with a `report` niced, and writing there."""

    def prepare() -> None:  # no thread runs yet
        signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored, as it is here
        os.nice(0 if report is None else NICENESS)

    errors = None if report is None else subprocess.STDOUT
    source = None if report is None else subprocess.DEVNULL
    return subprocess.Popen(
        pytest(folders, options), cwd=ROOT, stdin=source, stdout=report, stderr=errors, preexec_fn=prepare
    )


def pytest(folders: Sequence[str], options: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "pytest", *options, *folders]


def main(options: Sequence[str]) -> int:
    parts: list[subprocess.Popen[bytes]] = []
    ended = False

    def end(*_: object) -> None:
        nonlocal ended
        ended = True
        for part in parts:
            part.send_signal(signal.SIGINT)  # pytest then takes down what it has started

    signal.signal(signal.SIGTERM, end)
    with tempfile.TemporaryFile() as report:
        parts += [start(TIMED, options), start(BESIDE, [*options, *CACHE], report)]
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells both parts itself
        timed, beside = (part.wait() for part in parts)
        report.seek(0)
        sys.stdout.buffer.write(report.read())
        sys.stdout.flush()
    if beside == FAILED and not ended:
        sys.stdout.write("What failed beside the others, by itself:\n")
        sys.stdout.flush()
        parts[:] = [start(BESIDE, [*options, *CACHE, *AGAIN])]
        beside = parts[0].wait()
    return int(any((timed, beside)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
