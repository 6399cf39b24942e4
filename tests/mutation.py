"""Damaged copies of good input, and a bound on memory, for the tests of everything that parses bytes."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator
from pathlib import Path

_NUMBERS = (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\0\0\0\x80")
_HEADER = 64  # bytes; half of the damage goes there, where lengths and counts are


def mutants(good: bytes, count: int, rng: random.Random) -> Iterator[bytes]:
    """`count` copies of `good`, cut short, with bits and bytes changed, pieces doubled or lost."""
    for _ in range(count):
        copy = bytearray(good[: rng.randrange(1, len(good))] if rng.random() < 0.2 else good)
        for _ in range(rng.randint(1, 6)):
            place = rng.randrange(rng.choice((min(len(copy), _HEADER), len(copy))))
            match rng.randrange(5):
                case 0:
                    copy[place] = rng.randrange(256)
                case 1:
                    copy[place] ^= 1 << rng.randrange(8)
                case 2:
                    copy[place : place + 4] = rng.choice(_NUMBERS)
                case 3:
                    copy[place:place] = copy[place : place + rng.randint(1, 64)]
                case 4 if len(copy) > 1:
                    del copy[place : min(len(copy) - 1 + place, place + rng.randint(1, 16))]
            copy = copy or bytearray(1)
        yield bytes(copy)


@contextlib.contextmanager
def memory_within(mib: int) -> Iterator[None]:
    """Fails when at any time within the block this process held `mib` MiB more than at its beginning.

    Linux keeps the mark and, unlike getrusage's, lets it be set back.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _kib("VmRSS")
    yield
    grown = (_kib("VmHWM") - before) / 1_024
    assert grown < mib, f"took {grown:.0f} MiB"


def _kib(field: str) -> int:
    found = re.search(rf"^{field}:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1])
