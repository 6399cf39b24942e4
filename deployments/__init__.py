"""The service on Ray Serve. Its faces are `deployments:app`, the application with settings from the
environment, and `deployments:build`, which makes it from arguments (application.py).

Both come into being when first asked for, so that `deployments.settings` needs no Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.deployment import Application

    from deployments.application import build as build

    app: Application

__all__ = ["app", "build"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deployments.application import build
    from deployments.settings import Settings

    globals()["build"] = build
    if name == "app":
        globals()["app"] = build(Settings.load())
    return globals()[name]
