"""Reports a replica's status to the fleet, at every change and every REPORT_EVERY_S."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.wire.messages import REPORT_EVERY_S, ReplicaStatus

logger = logging.getLogger(__name__)

SETTLE_S = 0.02  # changes that come together make one report
LEAVE_TIMEOUT_S = 2.0  # for the fleet to hear that this replica ends


class Reporter:
    """Reports `status()`; calls `on_close` when the fleet tells the replica to close its sessions."""

    def __init__(
        self,
        fleet: DeploymentHandle[Any],
        status: Callable[[], ReplicaStatus],
        on_close: Callable[[], None],
    ) -> None:
        self._fleet, self._status, self._on_close = fleet, status, on_close
        self._changed = asyncio.Event()
        self._task = asyncio.ensure_future(self._report())

    def changed(self) -> None:
        """Reports soon: the status has changed."""
        self._changed.set()

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(RayError, RayServeException, asyncio.TimeoutError):
            await asyncio.wait_for(_answer(self._fleet.leave.remote(self._status().replica)), LEAVE_TIMEOUT_S)

    async def _report(self) -> None:
        while True:
            self._changed.clear()
            try:
                if await _answer(self._fleet.report.remote(self._status())):
                    self._on_close()
            except (RayError, RayServeException) as error:
                logger.warning("the fleet could not be told: %s", type(error).__name__)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), REPORT_EVERY_S)
            await asyncio.sleep(SETTLE_S)


async def _answer(response: Any) -> Any:
    return await response
