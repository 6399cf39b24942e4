"""The processes that read recordings of voices sent by strangers, each within limits of its own.

    python -m personaplex.audio.voiceprocess LONGEST_S SAMPLE_LIMIT < socket

This process loads the libraries, says READY on the Unix socket that is its standard input, and decodes
nothing itself. For every message on the socket, which carries three descriptors (recording, result, alive),
it forks a child. The child writes a byte to `alive`, limits its own memory, processor time, time by the
clock, files and descriptors before it reads the first byte, writes the result and ends; `alive` is closed by
its end, however it ends. The process ends when the socket does.

The result is one line of JSON with `loudness`, `problems` and `samples`, then so many float32 little-endian
at 24 kHz, normalised: what `voicewav.read_voice` gives. A recording that cannot be used makes a line with
`error`. A result that is cut off was too much work.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path

from personaplex.audio.voicewav import VoiceRecording, read_voice
from personaplex.errors import BadAudio

READY = b"ready"
MEMORY = 320 * 2**20  # bytes of address space beyond what the libraries take
CPU_S = 10
WALL_S = 20
FILE_BYTES = 16 * 2**20
DESCRIPTORS = 32


def limit() -> None:
    """From now on this process has only so much of everything; it makes way for live sessions."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        resource.RLIMIT_CPU: CPU_S + round(used.ru_utime + used.ru_stime + 0.5),
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NOFILE: DESCRIPTORS,
        resource.RLIMIT_CORE: 0,
    }
    with contextlib.suppress(OSError):  # not on macOS
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limits[resource.RLIMIT_AS] = pages * resource.getpagesize() + MEMORY
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))
    signal.alarm(WALL_S)
    with contextlib.suppress(OSError):
        os.nice(10)


def packed(recording: VoiceRecording) -> bytes:
    """See the module."""
    head = {
        "loudness": round(recording.loudness, 1),
        "problems": [{"kind": one.kind, "text": one.text} for one in recording.problems],
        "samples": len(recording.pcm),
    }
    return json.dumps(head).encode() + b"\n" + recording.pcm.astype("<f4").tobytes()


def read(source: int, longest_s: float, sample_limit: int) -> bytes:
    """The result for the recording in a descriptor."""
    try:
        return packed(read_voice(f"/dev/fd/{source}", longest_s, sample_limit))
    except BadAudio as error:
        return json.dumps({"error": str(error)}).encode() + b"\n"
    except MemoryError:
        return json.dumps({"error": "the recording takes too much memory to read"}).encode() + b"\n"


def serve(asked: socket.socket, longest_s: float, sample_limit: int) -> None:
    """Forks a child for every message, until the socket ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    asked.sendall(READY)
    while True:
        message, descriptors, _, _ = socket.recv_fds(asked, 1, 3)
        if not message:
            return
        if len(descriptors) == 3 and os.fork() == 0:
            asked.close()
            try:
                source, sink, alive = descriptors
                os.write(alive, b"!")
                limit()
                with open(sink, "wb", closefd=False) as file:
                    file.write(read(source, longest_s, sample_limit))
            finally:
                os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)


def main() -> None:
    import pyloudnorm  # noqa: F401  before the first child: importing it is no work of a recording

    with socket.socket(fileno=os.dup(0)) as asked:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)  # a child that closes `asked` holds the socket no longer
        os.close(nothing)
        serve(asked, float(sys.argv[1]), int(sys.argv[2]))


if __name__ == "__main__":
    main()
