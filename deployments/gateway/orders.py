"""A gateway's part in an operator's orders to move sessions: it asks the fleet for them and obeys.

With the answers comes whether gateways of another version have taken over, as in a rollout. This one gets no
new calls then; its clients that can come back are asked over, each once and not all at the same time. One
that has the CPU which a replica needs does not begin.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from typing import Any

from ray.exceptions import RayError
from ray.serve import get_replica_context
from ray.serve.exceptions import RayServeException

from deployments.gateway.moves import Moves
from deployments.gateway.suspects import Suspects
from deployments.wire.orders import GatewayBirth, MoveOrder, News, OrderResult
from personaplex.errors import SessionLost

logger = logging.getLogger(__name__)

RETRY_S = 1.0  # while the fleet is away


class OrderDesk:
    """One gateway's. `fleet` is a handle with `next_orders`, `answer_order` and `move_sessions`."""

    def __init__(self, fleet: Any, gateway: GatewayBirth, moves: Moves, suspects: Suspects) -> None:
        self._fleet, self._gateway, self._moves, self._suspects = fleet, gateway, moves, suspects
        self._asking_over: asyncio.Future[None] | None = None
        self._tasks: set[asyncio.Future[None]] = set()

    async def watch(self) -> None:
        """Carries out orders, for ever; several at the same time."""
        while True:
            try:
                news: News = await _answer(self._fleet.next_orders.remote(self._gateway))
            except (RayError, RayServeException) as error:
                logger.info("the fleet is away: %s", type(error).__name__)
                await asyncio.sleep(RETRY_S)
                continue
            if news.outdated and (self._asking_over is None or self._asking_over.done()):
                self._asking_over = asyncio.ensure_future(self._moves.ask_over())
            for number, order in news.orders:
                task = asyncio.ensure_future(self._carry_out(number, order))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def give(self, order: MoveOrder) -> OrderResult:
        """Has every gateway carry out an order. Raises SessionLost while the fleet is away."""
        try:
            result: OrderResult = await _answer(self._fleet.move_sessions.remote(order))
        except (RayError, RayServeException) as error:
            raise SessionLost("the service is starting; please try again") from error
        return result

    async def _carry_out(self, number: int, order: MoveOrder) -> None:
        if order.replica and order.hold_s:
            self._suspects.hold(order.replica, order.hold_s)
        moved = await self._moves.order(order.session, order.replica)
        try:
            await _answer(self._fleet.answer_order.remote(self._gateway.name, number, moved))
        except (RayError, RayServeException) as error:  # whoever asked is told that we gave no answer
            logger.warning("what came of an order could not be told: %s", type(error).__name__)


async def make_way(fleet: Any) -> None:
    """Ends the process where a replica needs its CPU more; Serve tries again. An error raised would not do:
    Serve then asks for another gateway's CPU before it frees this one's."""
    with contextlib.suppress(RayError, RayServeException):  # the fleet is away
        if await _answer(fleet.in_the_way.remote(birth(""))):
            logger.warning("no CPU is left for a replica: this gateway ends, and begins again behind it")
            logging.shutdown()
            os._exit(1)


def birth(name: str) -> GatewayBirth:
    """The gateway of this process, which has just begun. Outside Serve there are no versions."""
    try:
        version = get_replica_context().code_version or ""
    except RayServeException:
        version = ""
    return GatewayBirth(name, version, time.time())


async def _answer(response: Any) -> Any:
    return await response
