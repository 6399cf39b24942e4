"""Prints what the project needs with some of its extras: python3 docker/requirements.py EXTRA,EXTRA

So that an image can install gigabytes of dependencies before the source, which changes every day.
"""

from __future__ import annotations

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def requirements(extras: list[str]) -> list[str]:
    """Raises KeyError for an extra that there is not."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    return [
        *project["dependencies"],
        *(line for extra in extras for line in project["optional-dependencies"][extra]),
    ]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1].split(","))))
