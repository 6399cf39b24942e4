"""A loudspeaker for browsers where there is none: PulseAudio plays into nothing, at a sound card's pace."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAM = "pulseaudio"
MODULES = (
    *("-L", "module-native-protocol-unix auth-anonymous=1 socket={folder}/sound"),
    *("-L", "module-null-sink rate=48000"),
)
START_TIMEOUT_S = 60.0


def can_sound() -> bool:
    """Whether sound can be played without a device."""
    return shutil.which(PROGRAM) is not None


@contextlib.contextmanager
def loudspeaker() -> Iterator[dict[str, str]]:
    """The variables by which a program finds it, while it is there."""
    with tempfile.TemporaryDirectory(prefix="loudspeaker-", ignore_cleanup_errors=True) as folder:
        modules = [part.format(folder=folder) for part in MODULES]
        command = [PROGRAM, "-n", "--daemonize=no", "--exit-idle-time=-1", "--use-pid-file=no", *modules]
        own = {"XDG_RUNTIME_DIR": folder, "PULSE_STATE_PATH": folder, "HOME": folder}
        silent = subprocess.DEVNULL
        server = subprocess.Popen(command, stdout=silent, stderr=silent, env={**os.environ, **own})
        try:
            end = time.monotonic() + START_TIMEOUT_S
            while not (Path(folder) / "sound").exists():
                assert server.poll() is None, f"{PROGRAM} ended"
                assert time.monotonic() < end, f"{PROGRAM} did not start"
                time.sleep(0.05)
            yield {"PULSE_SERVER": f"unix:{folder}/sound"}
        finally:
            server.terminate()
            server.wait(20)
