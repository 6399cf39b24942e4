"""Processes that must not outlive others, by what Linux's kernel and /proc offer; elsewhere nothing is done.

Knows no Ray.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection, Iterable
from pathlib import Path

END_TIMEOUT_S = 5.0

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


def end_with_parent() -> bool:
    """From now on this process is killed when its parent ends, also after exec. False: the parent is gone."""
    if sys.platform != "linux":
        return True
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent != 1


def adopt_orphans() -> None:
    """From now on whatever loses its parent below this process becomes its child, and so can be found."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def below(pid: int) -> list[int]:
    """Ids of all living processes below `pid`, children before grandchildren; [] where there is no /proc."""
    found, unseen = list[int](), [pid]
    while unseen:
        one = unseen.pop(0)
        for task in Path(f"/proc/{one}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                unseen += [child for child in map(int, task.read_text().split()) if lives(child)]
        found.append(one)
    return found[1:]


def named(pids: Iterable[int], names: Collection[str]) -> dict[int, str]:
    """Those of `pids` whose program is called one of `names`, with its name; {} where there is no /proc."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            if name in names:
                found[pid] = name
    return found


def end_all_below(spared: set[int]) -> None:
    """Kills every process below this one but `spared` and waits for their end, END_TIMEOUT_S at most."""
    deadline = time.monotonic() + END_TIMEOUT_S
    while (doomed := set(below(os.getpid())) - spared) and time.monotonic() < deadline:
        for pid in doomed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)  # their children become ours


def lives(pid: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
