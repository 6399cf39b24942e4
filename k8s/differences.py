"""Does the cluster that serves run what the RayService asks for?

KubeRay copies `rayClusterConfig` into each RayCluster it makes. With an upgrade strategy that replaces
nothing the copy stays what it was, and no condition says so: the two are compared. Both have passed through
the API server and one through KubeRay's own types, which write out empty values and shorten quantities.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

# Changed on a running cluster by the autoscaler, KubeRay or a queue; none of these starts a new one.
_LIVE = frozenset(
    {"replicas", "minReplicas", "maxReplicas", "scaleStrategy", "suspend", "managedBy", "idleSuspend"}
)
_QUANTITIES = re.compile(r"\.(requests|limits)\..+$|\.sizeLimit$")
_FACTORS = {
    **{
        unit: Fraction(1_000) ** power
        for power, unit in enumerate(("n", "u", "m", "", "k", "M", "G", "T", "P"), -3)
    },
    **{unit: Fraction(1_024) ** power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi"), 1)},
}
_FORM = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)([a-zA-Z]*)")


def differences(wanted: Any, running: Any) -> list[str]:
    """Paths at which two cluster configurations differ, in order; empty when they are the same."""
    return _compare(_plain(wanted, ""), _plain(running, ""), "")


def _plain(value: Any, path: str) -> Any:
    """The same without what says nothing (null, empty, an unset creation time) and what changes by itself."""
    if isinstance(value, dict):
        kept = {name: _plain(inner, f"{path}.{name}") for name, inner in value.items() if name not in _LIVE}
        return {name: inner for name, inner in kept.items() if inner not in (None, "", {}, [])}
    if isinstance(value, list):
        return [_plain(inner, path) for inner in value]
    if value is not None and _QUANTITIES.search(path):
        return quantity(value)
    return value


def quantity(value: str | int | float) -> Fraction:
    """A Kubernetes quantity (`500m`, `8Gi`, 2) as an exact number. Raises ValueError for what is none."""
    found = _FORM.fullmatch(str(value))
    if found is None or found[2] not in _FACTORS:
        raise ValueError(f"{value!r} is no quantity")
    return Fraction(Decimal(found[1])) * _FACTORS[found[2]]


def _compare(wanted: Any, running: Any, path: str) -> list[str]:
    if isinstance(wanted, dict) and isinstance(running, dict):
        names = sorted({*wanted, *running})
        return [
            found
            for name in names
            for found in _compare(wanted.get(name), running.get(name), f"{path}.{name}" if path else name)
        ]
    if isinstance(wanted, list) and isinstance(running, list) and len(wanted) == len(running):
        pairs = enumerate(zip(wanted, running, strict=True))
        return [found for index, (a, b) in pairs for found in _compare(a, b, f"{path}[{index}]")]
    return [] if wanted == running else [path]
