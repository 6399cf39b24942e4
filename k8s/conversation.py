"""One short conversation with a running service, for `helm test` and `python -m k8s smoke`.

    python -m k8s.conversation --url ws://HOST:8000/api/chat [--api-keys-file FILE]

Speaks a tone for a few seconds through `python -m personaplex.client` and checks what comes back: sound of
about the same length. What the agent says is not judged. Exit code 0 when it answered, else 1.
"""

from __future__ import annotations

import argparse
import array
import math
import subprocess
import sys
import tempfile
import wave
from pathlib import Path

from personaplex import cli
from personaplex.errors import ConfigError
from personaplex.files import key_lines

RATE = 24_000
SECONDS = 4.0
LEAST = 0.5  # share of the input's length that must come back
TIMEOUT_S = 120.0


def tone(path: Path, seconds: float = SECONDS) -> None:
    """A 220 Hz tone that swells and fades, 16-bit mono at 24 kHz: enough to see that audio passes."""
    count = int(RATE * seconds)
    swell = (math.sin(math.pi * i / count) * math.sin(2 * math.pi * 220 * i / RATE) for i in range(count))
    samples = array.array("h", (int(8_000 * value) for value in swell))
    if sys.byteorder == "big":
        samples.byteswap()
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())


def length(path: Path) -> float:
    """Seconds of sound in a wav file."""
    with wave.open(str(path), "rb") as file:
        return file.getnframes() / file.getframerate()


def first_key(path: Path) -> str:
    """The first key of a file with one key a line. Raises ValueError when there is none, or no file."""
    try:
        return key_lines(path)[0].split()[0]  # options may follow
    except ConfigError as error:
        raise ValueError(str(error)) from error


def converse(
    url: str, key: str | None = None, insecure: bool = False, seconds: float = SECONDS, least: float = LEAST
) -> str:
    """Speaks for `seconds` and gives what the client printed.

    The key goes to the client on its standard input: a command line can be read by everyone on the machine.
    Raises RuntimeError when it failed, or when less than the share `least` came back.
    """
    with tempfile.TemporaryDirectory() as folder:
        spoken, heard = Path(folder, "in.wav"), Path(folder, "out.wav")
        tone(spoken, seconds)
        command = [sys.executable, "-m", "personaplex.client", "--url", url]
        command += ["--input-wav", str(spoken), "--output-wav", str(heard)]
        if key:
            command += ["--key-file", "/dev/stdin"]
        if insecure:
            command.append("--insecure")
        try:
            limit = TIMEOUT_S + seconds
            done = subprocess.run(command, input=key or "", capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"no conversation within {limit:.0f} s") from error
        if done.returncode:
            raise RuntimeError((done.stderr or done.stdout).strip() or "the client failed")
        answered = length(heard)
        if answered < least * seconds:
            raise RuntimeError(f"{seconds:.1f} s were spoken, but only {answered:.1f} s came back")
        return done.stdout


EXAMPLES = ("python -m k8s.conversation --url ws://localhost:8998/api/chat",)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m k8s.conversation", description="One short conversation.", examples=EXAMPLES
    )
    parser.add_argument("--url", required=True, help="ws://HOST:PORT/api/chat")
    parser.add_argument("--api-keys-file", type=Path, help="file of keys, one a line; the first is used")
    parser.add_argument("--insecure", action="store_true", help="accept any certificate")
    return parser


def main() -> int:
    return cli.run(lambda: _main(_parser().parse_args()), "client")


def _main(args: argparse.Namespace) -> int:
    try:
        key = first_key(args.api_keys_file) if args.api_keys_file else None
        print(converse(args.url, key, args.insecure))
    except (RuntimeError, OSError, ValueError) as error:
        cli.complain(str(error), "no conversation: ")
        return cli.FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
