"""Log lines of the service's processes; they go to stderr, which Ray collects with the rest.

As text for people or as one JSON object a line for collectors. What a call passes as
`extra={"fields": {...}}` becomes keys of the object; text shows the message only.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone
from typing import Literal

LOGGERS = ("deployments", "personaplex")

Form = Literal["text", "json"]


class JsonLines(logging.Formatter):
    """One record as one line of JSON; times are UTC."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str, form: Form = "text") -> None:
    """Shows our own loggers from `level` (debug, info, warning, error) on. Idempotent."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(level.upper())
        logger.propagate = False
        if not logger.handlers:
            handler = logging.StreamHandler(sys.stderr)
            text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
            handler.setFormatter(JsonLines() if form == "json" else text)
            logger.addHandler(handler)
