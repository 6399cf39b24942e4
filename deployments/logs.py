"""Log lines of the service's processes; they go to stderr, which Ray collects with the rest."""

from __future__ import annotations

import logging
import sys

LOGGERS = ("deployments", "personaplex")


def configure(level: str) -> None:
    """Shows our own loggers from `level` (debug, info, warning, error) on. Idempotent."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(level.upper())
        logger.propagate = False
        if not logger.handlers:
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
            logger.addHandler(handler)
