"""The whole suite, in two processes: `make test`.

Tests of a running service, and others in real time, wait more than they compute: they run at the ordinary
priority. The rest, which computes more than it waits, runs beside them, niced, so that it takes only what
they leave over of the processors. Its report follows theirs.

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

ROOT = Path(__file__).resolve().parents[1]
REAL_TIME = (  # bounds of parts of a second, or replicas that are suspected after such
    "tests/tools/test_loadtest.py",
    "tests/tools/test_loadtest_dialogue.py",
    "tests/unit/test_client.py",
    "tests/unit/test_client_resume.py",
    "tests/unit/test_connections.py",
    "tests/unit/test_conversation_audio.py",
    "tests/unit/test_conversation_ends.py",
    "tests/unit/test_loadtest_protocols.py",
    "tests/unit/test_loop.py",
    "tests/unit/test_recorder.py",
    "tests/slow/test_failover.py",
    "tests/slow/test_moves.py",
    "tests/slow/test_protocol_telephone.py",
    "tests/slow/test_resume.py",
    "tests/slow/test_resume_found.py",
)
TIMED = ("tests/service", *REAL_TIME)
BESIDE = (
    *("tests/tools", "tests/chart", "tests/gpu", "tests/unit", "tests/slow"),
    *(f"--ignore={file}" for file in REAL_TIME),
)
NICENESS = 19  # the least: bounds of the tests beside it are a frame or two


def pytest(folders: Sequence[str], options: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "pytest", *options, *folders]


def main(options: Sequence[str]) -> int:
    parts: list[subprocess.Popen[bytes]] = []

    def end(*_: object) -> None:
        for part in parts:
            part.send_signal(signal.SIGINT)  # pytest then takes down what it has started

    signal.signal(signal.SIGTERM, end)
    with tempfile.TemporaryFile() as report:
        parts.append(subprocess.Popen(pytest(TIMED, options), cwd=ROOT))
        parts.append(
            subprocess.Popen(
                pytest(BESIDE, options),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=report,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: os.nice(NICENESS),  # no thread runs yet
            )
        )
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells both parts itself
        codes = [part.wait() for part in parts]
        report.seek(0)
        sys.stdout.buffer.write(report.read())
        sys.stdout.flush()
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
