"""What tests of several modules ask for."""

from __future__ import annotations

import pytest

from personaplex.kernels import ops


@pytest.fixture(params=["numba", "torch"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Steps by Numba's kernels, or by torch, as where there is no Numba."""
    if request.param == "torch":
        monkeypatch.setattr(ops, "uses_numba", lambda _: False)
    return bool(request.param == "numba")
