"""Python's collector of garbage, in processes that speak every 80 ms.

A whole collection looks at every object, and Ray's and our own modules are some 130,000 of them: it takes
longer than a frame. Once a process serves, all that it holds by then is left out of every collection to come.
"""

from __future__ import annotations

import gc

YOUNG = 5_000  # objects that are made between two collections of the youngest; each looks at those alone


def settle() -> None:
    """Call it once, when everything is loaded."""
    gc.collect()
    gc.freeze()
    _, *older = gc.get_threshold()
    gc.set_threshold(YOUNG, *older)
