"""The fleet as a gateway sees it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.wire.messages import Held, ReplicaStatus
from deployments.wire.whereabouts import Whereabouts
from personaplex.errors import SessionLost

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 2.0
ASK_EVERY_S = 0.5
RETRY_S = 1.0  # while the fleet is away


class Observer:
    """The replicas as of at most ASK_EVERY_S ago, and news of the service's end."""

    def __init__(self, fleet: DeploymentHandle[Any]) -> None:
        self._fleet = fleet
        self._asking = asyncio.Lock()
        self._known: list[ReplicaStatus] = []
        self._asked = float("-inf")
        self._telling: set[asyncio.Future[None]] = set()

    async def wait_close(self, gateway: str, close: Callable[[], Awaitable[None]]) -> None:
        """Awaits `close()` once the service ends. To be run as a task for as long as the gateway lives."""
        while True:
            try:
                await _answer(self._fleet.wait_close.remote(gateway))
                await close()
                await _answer(self._fleet.closed.remote(gateway))
                return
            except (RayError, RayServeException) as error:  # the fleet has ended and will be there again
                logger.info("the fleet is away: %s", type(error).__name__)
                await asyncio.sleep(RETRY_S)

    async def spend(self, ticket: str, valid_s: float) -> bool:
        """Whether a ticket is spent for the first time, by any gateway. Raises SessionLost when the fleet
        does not answer: nobody can tell then."""
        try:
            return bool(
                await asyncio.wait_for(_answer(self._fleet.spend.remote(ticket, valid_s)), ASK_TIMEOUT_S)
            )
        except (RayError, RayServeException, asyncio.TimeoutError) as error:
            raise SessionLost("the service is starting; please call again") from error

    async def look_up(self, session: str) -> Whereabouts | None:
        """What gateways told of a session; None when the fleet does not answer."""
        try:
            known: Whereabouts = await asyncio.wait_for(
                _answer(self._fleet.look_up.remote(session)), ASK_TIMEOUT_S
            )
            return known
        except (RayError, RayServeException, asyncio.TimeoutError):
            return None

    def use_tokens(self, session: str, good_from: int, valid_s: float) -> None:
        """A session's earlier tokens are used. Told in the background, for `valid_s` until it is heard."""
        self._tell(lambda: self._fleet.use_tokens.remote(session, good_from, valid_s), valid_s)

    def keep_session(self, session: str, held: Held, generation: int, valid_s: float) -> None:
        """This gateway keeps a session for so long. Told in the background."""
        self._tell(lambda: self._fleet.keep_session.remote(session, held, generation, valid_s), valid_s)

    def _tell(self, call: Callable[[], Any], valid_s: float) -> None:
        telling = asyncio.ensure_future(_tell_until(call, time.monotonic() + valid_s))
        self._telling.add(telling)
        telling.add_done_callback(self._telling.discard)

    async def describe(self) -> list[ReplicaStatus]:
        """[] while no replica is there, and when the fleet does not answer."""
        async with self._asking:
            if time.monotonic() - self._asked >= ASK_EVERY_S:
                try:
                    self._known = await asyncio.wait_for(
                        _answer(self._fleet.describe.remote()), ASK_TIMEOUT_S
                    )
                except (RayError, RayServeException, asyncio.TimeoutError):
                    self._known = []
                self._asked = time.monotonic()
            return self._known


async def _tell_until(call: Callable[[], Any], until: float) -> None:
    while time.monotonic() < until:
        try:
            await asyncio.wait_for(_answer(call()), ASK_TIMEOUT_S)
            return
        except (RayError, RayServeException, asyncio.TimeoutError) as error:
            logger.info("the fleet could not be told: %s", type(error).__name__)
            await asyncio.sleep(RETRY_S)


async def _answer(response: Any) -> Any:
    return await response
