"""What every result has: the machine it was measured on, and a way out."""

from __future__ import annotations

import json
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
