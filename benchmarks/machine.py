"""What every result has: the machine it was measured on, and a way out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from loadtest.report import machine as plain_machine


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, Python, and the versions of the packages that matter to a result."""
    return plain_machine() | {package: version(package) for package in packages}


def publish(result: dict[str, Any], output: Path | None) -> None:
    """Prints a result as JSON and writes it to `output`, if there is one."""
    text = json.dumps(result, indent=2)
    print(text)
    if output:
        output.write_text(text + "\n", encoding="utf-8")


def cpu_seconds(processes: Iterable[int]) -> float:
    """CPU time that these processes have used."""
    ticks = 0
    for pid in processes:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def run_seconds(pid: int) -> float:
    """CPU time of all threads that a process has now, to the nanosecond; `cpu_seconds` counts whole ticks."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def stolen_seconds() -> float:
    """What the machine's host has taken from all its cores."""
    fields = Path("/proc/stat").read_text().split(maxsplit=9)
    return int(fields[8]) / os.sysconf("SC_CLK_TCK")
