"""Rewrites the golden renders: `python tests/kube/golden.py`, then look at `git diff tests/data/chart`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kube import chart

FOLDER = chart.ROOT / "tests" / "data" / "chart"
# Name -> values file and what is set beside it; dashboards are compared with their own files.
RENDERS = {
    "dev": ("values-dev.yaml", ()),
    "everything": ("ci/everything-values.yaml", ("monitoring.dashboards.enabled=false",)),
    "mig": ("ci/mig-values.yaml", ()),
    "podspec": ("ci/podspec-values.yaml", ()),
    "balancer": (
        "ci/minimal-values.yaml",
        (
            "service.type=LoadBalancer",
            "service.annotations.cloud\\.example/balancer=internal",
            "apiKeys.existingSecret=keys",
        ),
    ),
}


def rendered(name: str) -> str:
    values, sets = RENDERS[name]
    return chart.template(values, sets).stdout


def main() -> None:
    for name in RENDERS:
        (FOLDER / f"{name}.yaml").write_text(rendered(name))


if __name__ == "__main__":
    main()
