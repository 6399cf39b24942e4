"""What sessions said, as tokens in files: one per session, for whoever set `token_log_dir`."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from personaplex.tokenlog import TokenLog

logger = logging.getLogger(__name__)


class TokenLogs:
    """One gateway's; without a folder nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    async def keep(self, session: str, log: TokenLog) -> None:
        """At the end of a session. A file that cannot be written ends nothing: it is logged."""
        folder = self._folder
        if folder is None or not len(log):
            return
        try:
            await asyncio.to_thread(folder.mkdir, mode=0o700, parents=True, exist_ok=True)
            # Packing an hour takes a quarter of a second: three frames of every other session.
            await asyncio.to_thread(log.save, folder / f"{session}.npz")
        except OSError:
            logger.exception("the tokens of session %s could not be saved", session)
