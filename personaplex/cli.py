"""What the commands share at the terminal: exit codes, one line for every failure, checked values, examples.

    0    done
    1    the work began, and some or all of it failed
    2    refused before the work began: an option, a file or the set-up is wrong
    130  Ctrl-C

A failure is one line on stderr that starts with `error: `, whatever the names of files in it hold. Standard
library only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from personaplex.errors import ConfigError, PersonaplexError

FAILED, REFUSED, INTERRUPTED = 1, 2, 130

OWN_PACKAGES = ("personaplex", "deployments", "loadtest", "k8s")

Command = Callable[[], int]

# Line ends, what moves the cursor or changes colours, and what turns text around.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def run(command: Command, extra: str, interrupted: str = "interrupted") -> int:
    """The exit code of `command`; errors raised on purpose, the system's and Ctrl-C become one line.

    `extra` is the optional part of this package that has all that the command imports, `interrupted` the line
    after Ctrl-C.
    """
    open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name or a transcript the terminal cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        code = command()
        return code if _flushed() else FAILED
    except BrokenPipeError:  # `| head`; the interpreter would flush once more, and fail once more
        _discard_stdout()
        complain("nobody reads the output any more")
        return FAILED
    except (PersonaplexError, OSError) as error:
        complain(reason(error))
    except ModuleNotFoundError as error:
        if not _is_foreign(error):
            raise
        complain(_missing(error, extra))
    except KeyboardInterrupt:
        complain(interrupted, "")
        return INTERRUPTED
    return REFUSED


def guard_imports(extra: str) -> None:
    """Makes one line of what may end a command before `run`: a package that is missing, Ctrl-C while large
    ones load. For `if __name__ == "__main__"` at the head of a command's module.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, ModuleNotFoundError) and _is_foreign(error):
            complain(_missing(error, extra))
            _exit(REFUSED)
        if isinstance(error, KeyboardInterrupt):
            complain("interrupted", "")
            _exit(INTERRUPTED)
        sys.__excepthook__(kind, error, trace)

    open_standard_streams()
    sys.excepthook = hook


def open_standard_streams() -> None:
    """Puts the null device where the caller has closed stdin, stdout or stderr: the next file to be opened,
    an output perhaps, would get that descriptor, and whatever is said there would go into it."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115  for the rest of the process
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _exit(code: int) -> NoReturn:
    sys.stdout.flush()
    os._exit(code)  # an excepthook has no other way to choose the code; nothing has begun yet


def _is_foreign(error: ModuleNotFoundError) -> bool:
    return (error.name or "personaplex").partition(".")[0] not in OWN_PACKAGES


def _missing(error: ModuleNotFoundError, extra: str) -> str:
    name = (error.name or "").partition(".")[0]
    return f"the Python package {name} is missing: pip install 'personaplex-serve[{extra}]'"


def complain(message: str, head: str = "error: ") -> None:
    """Says one thing on stderr, as one line. Where stderr cannot be written the exit code has to do."""
    with contextlib.suppress(OSError):
        print(f"{head}{one_line(message)}", file=sys.stderr, flush=True)


def one_line(text: str) -> str:
    """`text` with the characters escaped that would break the line or steer the terminal."""
    return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class OneLine(logging.Formatter):
    """Log records as `complain` writes: they name files too."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


def reason(error: Exception) -> str:
    """An error in words, with the file it is about."""
    if isinstance(error, OSError) and error.strerror:
        name = error.filename
        return error.strerror if name is None else f"{os.fsdecode(name)}: {error.strerror}"
    return str(error) or type(error).__name__


def _flushed() -> bool:
    """Whether all that was said on stdout was written. Raises BrokenPipeError."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_stdout()
        complain(f"stdout: {reason(error)}")
        return False
    return True


def _discard_stdout() -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError):  # not a real stdout
        pass
    finally:
        os.close(null)


class Parser(argparse.ArgumentParser):
    """A parser whose help ends with `examples` and whose complaints are ConfigError, for `run` to show."""

    def __init__(self, *, examples: Sequence[str] = (), **options: object) -> None:
        if examples:
            options["epilog"] = "examples:\n" + "\n".join(f"  {line}" for line in examples)
            options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every option's default, and the examples line by line."""


def whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """An option's type: an integer from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from error
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"must be {_range(least, most, 2**63 - 1)}, got {text}")
        return value

    return parse


def number(least: float = 0.0, most: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """An option's type: a finite number from `least` (or, with `above`, more than it) to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from error
        if not (math.isfinite(value) and least <= value <= most) or (above and value == least):
            wanted = f"more than {least:g}" if above else _range(least, most, math.inf)
            raise argparse.ArgumentTypeError(f"must be a finite number, {wanted}, got {text}")
        return value

    return parse


def _range(least: float, most: float, unlimited: float) -> str:
    return f"at least {least}" if most == unlimited else f"between {least} and {most}"


port = whole(0, 65_535)
positive = number(0, above=True)
not_negative = number()


def text(value: str) -> str:
    """An option's type: text that can be sent and tokenized, so no bytes outside the terminal's encoding."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(
            f"is not text in UTF-8 (at character {error.start + 1}): is the terminal, or the script, "
            "in another encoding?"
        ) from error
    return value


def add_checkpoint_files(group: argparse._ArgumentGroup) -> None:
    """Options for files that take the place of a checkpoint's own."""
    for name, what in (
        ("moshi-weight", "language model"),
        ("mimi-weight", "codec"),
        ("tokenizer", "tokenizer"),
        ("voice-prompt-dir", "voices"),
    ):
        group.add_argument(
            f"--{name}", type=Path, metavar="PATH", help=f"{what}, in place of the checkpoint's"
        )
