"""Keeps a process's copy of the application's secret current: the fleet makes it, gateways and replicas ask.

A fleet that was restarted takes over the secret of whoever asks first, so a session is in no danger from it.
Should a process that knows none come first, there is a new secret; both ends then know the old and the new
one until all have asked, at most SYNC_EVERY_S later, and use one that both know (handshake.py). Who meets one
that knows none of its own asks at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.wire.handshake import Keyring

logger = logging.getLogger(__name__)

SYNC_EVERY_S = 5.0  # a call to the fleet costs as much as several frames of a session
AGAIN_S = 0.5  # between two calls, whatever others present
RETRY_S = 0.2  # while there is no secret yet


class KeySync:
    """Made on the event loop of its process; `keyring` is what it keeps."""

    def __init__(self, fleet: DeploymentHandle[Any]) -> None:
        self._missed = asyncio.Event()
        self.keyring = Keyring(missed=self._missed.set)
        self._fleet = fleet
        self._known = asyncio.Event()
        self._task = asyncio.ensure_future(self._sync())

    async def known(self) -> Keyring:
        """The keyring, once it holds a secret."""
        await self._known.wait()
        return self.keyring

    def close(self) -> None:
        self._task.cancel()

    async def _sync(self) -> None:
        while True:
            try:
                self.keyring.adopt(await _answer(self._fleet.link_secret.remote(self.keyring.newest)))
                self._known.set()
            except (RayError, RayServeException) as error:  # away; it will be there again
                logger.info("the fleet could not be asked for the link's secret: %s", type(error).__name__)
            if not self.keyring:
                await asyncio.sleep(RETRY_S)
                continue
            await asyncio.sleep(AGAIN_S)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._missed.wait(), SYNC_EVERY_S)
            self._missed.clear()


async def _answer(response: Any) -> Any:
    return await response
