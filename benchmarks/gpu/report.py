"""Results of `benchmarks.gpu`, part by part, so that nothing measured is lost to what comes after it.

A part that raises is written down and the others go on. Parts run in groups, each group in a process of its
own: a kernel that faults takes its process's device context with it, and one that hangs is ended in time.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.setup import synchronise

log = logging.getLogger(__name__)

GRACE_S = 15.0  # beyond a group's own budget, before it is ended


class Report:
    """Results by part, in a file that is written anew after each."""

    def __init__(self, budget_s: float, output: Path | None, device: torch.device | None = None) -> None:
        self.data: dict[str, Any] = {"seconds": {}, "skipped": [], "errors": {}}
        self._end, self._output, self._device = time.monotonic() + budget_s, output, device

    @property
    def left_s(self) -> float:
        """Seconds until the end of the budget."""
        return self._end - time.monotonic()

    def part(self, name: str, needs_s: float, work: Callable[[], Any]) -> Any:
        """Runs one part if `needs_s` are left; its result, or None."""
        if self.left_s < needs_s:
            self.data["skipped"].append(name)
            return None
        log.info("%s", name)
        start = time.monotonic()
        try:
            result = work()
            if self._device is not None:
                synchronise(self._device)  # what a part launched fails in it, not in the next
            self.data[name] = result
        except Exception as error:  # a task root: one part's fault is a result too
            log.exception("%s failed", name)
            self.data["errors"][name] = f"{type(error).__name__}: {error}"[:500]
            result = None
        self.data["seconds"][name] = round(time.monotonic() - start, 1)
        self.save()
        return result

    def merge(self, group: str, found: dict[str, Any]) -> None:
        """Adds what the process of one group found."""
        for key in ("seconds", "errors"):
            self.data[key] |= found.pop(key, {})
        self.data["skipped"] += found.pop("skipped", [])
        self.data |= found
        self.save()
        log.info("%s done, %.0f s left", group, self.left_s)

    def save(self) -> None:
        if self._output:
            self._output.write_text(json.dumps(self.data, indent=1) + "\n")


def run_group(report: Report, group: str, budget_s: float, arguments: list[str]) -> None:
    """Runs `python -m benchmarks.gpu --group GROUP` and takes over its results, however it ends."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "group.json"
        command = [sys.executable, "-m", "benchmarks.gpu", "--group", group, "--output", str(path)]
        command += ["--budget", f"{budget_s:.0f}", *arguments]
        start = time.monotonic()
        try:
            code: int | str = subprocess.run(command, timeout=budget_s + GRACE_S).returncode
        except subprocess.TimeoutExpired:
            code = f"ended after {budget_s + GRACE_S:.0f} s"
        found = json.loads(path.read_text()) if path.exists() else {}
        if code not in (0, 1):  # 1: parts failed, and are named
            found.setdefault("errors", {})[f"group {group}"] = f"its process ended with {code}"
        found.setdefault("seconds", {})[f"group {group}"] = round(time.monotonic() - start, 1)
        report.merge(group, found)
