"""What an operator may ask of a gateway, with a key of its own: docs/resume.md.

    GET  /api/admin/sessions    every session and the replica that holds it
    POST /api/admin/moves       {"session": NAME}, or {"replica": NAME} and perhaps "hold_s": SECONDS

Without `admin_keys_file` there are no such addresses (404). A request without a key is answered with 401, one
with another key, an API key among them, with 403. Nothing here tells anything of what is said in a session.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from deployments.gateway.answers import PRIVATE, Refused, answering, read_body
from deployments.gateway.keys import Key, KeyTable
from deployments.wire.messages import ReplicaStatus
from deployments.wire.orders import MoveOrder, OrderResult
from personaplex.errors import BadParameter, Forbidden, Unauthorized

logger = logging.getLogger(__name__)

BODY_LIMIT = 4_096  # bytes
HOLD_S = 60.0  # a replica gets no new session for so long after its sessions were moved
HOLD_LIMIT_S = 3_600.0
_NAME = re.compile(r"[A-Za-z0-9_.#-]{1,128}")  # of a session or a replica


class AdminRoutes:
    """One gateway's."""

    def __init__(
        self,
        keys: Callable[[], KeyTable],
        api_keys: Callable[[], KeyTable],
        replicas: Callable[[], Awaitable[Sequence[ReplicaStatus]]],
        give: Callable[[MoveOrder], Awaitable[OrderResult]],
    ) -> None:
        """`keys` are the operators' of this moment, `api_keys` those of sessions, which are worth nothing
        here. `give` has an order carried out by whichever gateways it concerns."""
        self._keys, self._api_keys, self._replicas, self._give = keys, api_keys, replicas, give

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/api/admin/sessions", answering(self._sessions)),
            Route("/api/admin/moves", answering(self._move), methods=["POST"]),
        ]

    def _identify(self, request: Request) -> Key:
        """Whose request it is. Raises Unauthorized, Forbidden."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        shown = token.strip() if scheme.lower() == "bearer" else ""
        if not shown:
            raise Unauthorized("an operator's key is needed, as Authorization: Bearer KEY")
        key = self._keys().find(shown)
        if key is None or self._api_keys().find(shown) is not None:
            raise Forbidden("this is no operator's key")
        return key

    async def _sessions(self, request: Request) -> Response:
        self._identify(request)
        replicas = [
            {
                "replica": one.replica,
                "node": one.node,
                "slots": one.slots,
                "accepting": one.accepting,
                "sessions": [{"session": each.session, "seconds": each.seconds} for each in one.sessions],
                "detached": [each.session for each in one.detached],
            }
            for one in await self._replicas()
        ]
        return JSONResponse({"replicas": replicas}, headers=PRIVATE)

    async def _move(self, request: Request) -> Response:
        key = self._identify(request)
        order = _order(await read_body(request, BODY_LIMIT))
        if order.replica and order.replica not in {one.replica for one in await self._replicas()}:
            raise Refused(404, "there is no replica of this name")
        logger.info("operator %s: move %s", key.shown, order.session or f"all at {order.replica}")
        result = await self._give(order)
        if order.session and not result.sessions and not result.silent:
            raise Refused(404, "there is no live session of this name")
        rows = [
            {"session": one.session, "outcome": one.outcome, "from": one.source, "to": one.target}
            for one in result.sessions
        ]
        return JSONResponse({"sessions": rows, "gateways_silent": result.silent}, headers=PRIVATE)


def _order(body: bytes) -> MoveOrder:
    """Raises BadParameter."""
    wrong = BadParameter('the body must be JSON: {"session": NAME} or {"replica": NAME, "hold_s": SECONDS}')
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise wrong from error
    if not isinstance(fields, dict) or set(fields) not in ({"session"}, {"replica"}, {"replica", "hold_s"}):
        raise wrong
    names = [fields[name] for name in ("session", "replica") if name in fields]
    hold_s = fields.get("hold_s", HOLD_S)
    if not all(isinstance(name, str) and _NAME.fullmatch(name) for name in names):
        raise wrong
    if isinstance(hold_s, bool) or not isinstance(hold_s, int | float):
        raise wrong
    if not (math.isfinite(hold_s) and 0 <= hold_s <= HOLD_LIMIT_S):
        raise BadParameter(f"hold_s must be between 0 and {HOLD_LIMIT_S:g}")
    if "session" in fields:
        return MoveOrder(session=fields["session"])
    return MoveOrder(replica=fields["replica"], hold_s=float(hold_s))
