"""Rewrites the golden renders: `python tests/kube/golden.py`, then look at `git diff tests/data/chart`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kube import chart

GOLDEN = {"values-dev.yaml": "dev", "ci/everything-values.yaml": "everything"}


def main() -> None:
    for values, name in GOLDEN.items():
        path = chart.ROOT / "tests" / "data" / "chart" / f"{name}.yaml"
        path.write_text(chart.template(values, chart.CASES[values]).stdout)


if __name__ == "__main__":
    main()
