"""What the tests here share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from personaplex.training import grammar


@pytest.fixture(scope="module")
def few_words() -> Iterator[None]:
    """A dictionary without the natural voice, which only the `train` extra brings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar, "dictionary", lambda: (("Aachen", "Dallas", "Juneau"), ("aster", "lath")))
        yield
