"""The machine a result was measured on, and what it can do at most."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, Python, and the versions of the packages that matter to a result."""
    cpus = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    named: dict[str, Any] = {
        "cpu": cpus[0] if cpus else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    return named | {package: version(package) for package in packages}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
