"""Who in a gateway's process wants to know which replicas there are to choose from.

Serve makes the router and hands nobody a reference to it, so the gateway and its router meet here. Both refer
to this as a module, never to names in it: Serve pickles their classes by value, which would copy those.
"""

from __future__ import annotations

from collections.abc import Callable

_watchers: list[Callable[[frozenset[str]], None]] = []


def watch_replicas(changed: Callable[[frozenset[str]], None]) -> None:
    """From now on `changed` is told, on the router's event loop, the names of the replicas that sessions may
    be given to, whenever that changes. A process has one router of sessions and one gateway."""
    _watchers.append(changed)


def tell(replicas: frozenset[str]) -> None:
    """These are the replicas now."""
    for changed in _watchers:
        changed(replicas)
