"""Free TCP ports that no other test run on this machine picks at the same time.

A port that was only probed belongs to nobody until its server listens: another suite, or any outgoing
connection, may take it meanwhile. So ports come from below the kernel's ephemeral range, and each is
reserved by a lock on a file until this process ends.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from pathlib import Path

PORTS = range(15_000, 30_000)
TRIES = 1_000

_reserved: list[int] = []  # descriptors of the locks; the kernel drops them with the process


def free_port() -> int:
    """A port of 127.0.0.1 on which nothing listens, reserved for this process."""
    folder = Path(tempfile.gettempdir()) / f"personaplex-test-ports-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    draw = random.SystemRandom()
    for _ in range(TRIES):
        port = draw.choice(PORTS)
        lock = os.open(folder / str(port), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.bind(("", port))
        except OSError:
            os.close(lock)
            continue
        _reserved.append(lock)
        return port
    raise RuntimeError(f"no free port among {PORTS.start} to {PORTS.stop - 1} in {TRIES} tries")
