"""What a gateway keeps of its sessions: with whose consent, what a record says of itself, where it goes.

Records are off unless the setting `record` says otherwise. A client that is recorded is told so in its
session's details.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path

import personaplex
from deployments import metrics
from deployments.gateway.query import person_from, wants_record
from deployments.gateway.recorder import Recorder, Recording
from deployments.gateway.retention import Retention, RetentionLimits, store_at
from deployments.metrics import Metrics
from deployments.parts import GatewaySettings
from personaplex.persona import Persona
from personaplex.record.format import Head

CLOSE_TIMEOUT_S = 2.0  # for what is left to be written when the gateway ends
_DAY_S = 86_400.0


class Records:
    """The records of one gateway; made on its event loop."""

    def __init__(self, settings: GatewaySettings, folder: Path, published: Metrics) -> None:
        self._settings, self._metrics = settings, published
        self._loop = asyncio.get_running_loop()
        store = store_at(settings.record_upload) if settings.record_upload else None
        limits = RetentionLimits(settings.record_keep_days * _DAY_S, settings.record_keep_bytes)
        self._recorder = Recorder(folder, self._tell)
        self._retention = Retention(folder, limits, self._tell, store)
        self._retention.start()

    @classmethod
    def of(cls, settings: GatewaySettings, published: Metrics) -> Records | None:
        """None when nothing is to be recorded. Raises ConfigError for a store that cannot be used."""
        if settings.record == "off" or settings.record_dir is None:
            return None
        return cls(settings, settings.record_dir, published)

    def wanted(self, query: Mapping[str, str]) -> bool:
        """Whether the session with this query is recorded. Raises BadParameter for a name that is none."""
        person_from(query)
        return self._settings.record == "always" or wants_record(query)

    def begin(
        self, session: str, persona: Persona, query: Mapping[str, str], engine: Mapping[str, str]
    ) -> Recording:
        """`engine` is what a replica says of its model, {} where none is known."""
        settings = {**engine}
        head = Head(
            session=session,
            began=0.0,
            persona=persona,
            version=personaplex.__version__,
            model=settings.pop("model", ""),
            engine=settings,
            person=person_from(query),
        )
        return self._recorder.begin(head)

    def finish(self, recording: Recording, cause: str) -> None:
        """The session is over."""
        self._recorder.finish(recording, cause)

    async def close(self) -> None:
        """Writes what is left, within CLOSE_TIMEOUT_S."""
        self._retention.stop()
        await asyncio.to_thread(self._recorder.close, CLOSE_TIMEOUT_S)

    def _tell(self, result: str) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._count, result)

    def _count(self, result: str) -> None:
        self._metrics.add(metrics.RECORDS, result=result)
