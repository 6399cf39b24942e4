"""The fleet deployment: one small process that knows every replica's last status.

A full replica has no call left to answer questions with, so replicas report here. The fleet also announces
the shutdown, to replicas and gateways, and it makes the secret of the media link (wire/handshake.py). No
session needs it to start or to go on: if it dies, Serve restarts it and the next reports fill it.
"""

from __future__ import annotations

import asyncio
import secrets
import time

from deployments.wire.handshake import SECRET_BYTES
from deployments.wire.holdings import Elsewhere, Holdings, Judgement, Ledger, Limits
from deployments.wire.messages import Held, ReplicaStatus
from deployments.wire.orders import GatewayBirth, MovedSession, MoveOrder, News, OrderResult, Orders
from deployments.wire.voicestore import VoiceStore
from deployments.wire.whereabouts import ResumeBook, Whereabouts

FORGET_AFTER_S = 5.0  # without a report
ORDER_TIMEOUT_S = 300.0  # for the gateways to carry out an operator's order


class Fleet:
    """Made by Serve, once per application."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[ReplicaStatus, float]] = {}
        self._closing = False
        self._end = asyncio.Event()
        self._gateways: set[str] = set()
        self._spent: dict[str, float] = {}  # tickets, and when they are over
        self._secret = b""
        self._ledger = Ledger(time.monotonic())
        self._voices = VoiceStore()
        self._orders = Orders(time.monotonic)
        self._resumes = ResumeBook()

    async def link_secret(self, known: bytes) -> bytes:
        """The application's secret. `known`: the one that the caller has, b"" at its start."""
        self._secret = self._secret or known or secrets.token_bytes(SECRET_BYTES)
        return self._secret

    async def enter_session(
        self, gateway: str, session: str, holder: str, limits: Limits, day: int
    ) -> Judgement:
        """Whether a gateway may begin a session of a key with limits; see `holdings.Ledger`."""
        return self._ledger.enter(gateway, session, holder, limits, day, time.monotonic())

    async def leave_session(self, gateway: str, session: str) -> None:
        """A session that was entered has ended."""
        self._ledger.leave(gateway, session)

    async def report_holdings(self, gateway: str, holdings: Holdings) -> Elsewhere:
        """Takes what a gateway holds, for its keys; returns what the others do."""
        return self._ledger.report(gateway, holdings, time.monotonic())

    async def put_voice(self, holder: str, digest: str, voice: bytes, ttl_s: float) -> None:
        """Keeps an own voice for sessions of its holder at any gateway; see `voicestore.VoiceStore`."""
        self._voices.put(holder, digest, voice, ttl_s, time.monotonic())

    async def get_voice(self, holder: str, digest: str) -> bytes | None:
        """An own voice, or None for one that is not there."""
        return self._voices.get(holder, digest, time.monotonic())

    async def delete_voice(self, holder: str, digest: str) -> None:
        """Forgets an own voice."""
        self._voices.delete(holder, digest)

    async def report(self, status: ReplicaStatus) -> bool:
        """Stores a replica's status; returns True when it must close its sessions."""
        self._known[status.replica] = (status, time.monotonic())
        self._orders.reported()
        return self._closing

    async def leave(self, replica: str) -> None:
        """Forgets a replica that ends."""
        self._known.pop(replica, None)

    async def describe(self) -> list[ReplicaStatus]:
        """Every replica that reported within FORGET_AFTER_S, sorted by name."""
        since = time.monotonic() - FORGET_AFTER_S
        self._known = {name: entry for name, entry in self._known.items() if entry[1] >= since}
        return [self._known[name][0] for name in sorted(self._known)]

    async def spend(self, ticket: str, valid_s: float) -> bool:
        """Whether a ticket that is good for `valid_s` at most is spent for the first time."""
        now = time.monotonic()
        self._spent = {name: until for name, until in self._spent.items() if until > now}
        if ticket in self._spent:
            return False
        self._spent[ticket] = now + valid_s
        return True

    async def use_tokens(self, session: str, good_from: int, valid_s: float) -> None:
        """A session's earlier tokens are used; see `whereabouts.ResumeBook.use`."""
        self._resumes.use(session, good_from, valid_s, time.monotonic())

    async def keep_session(self, session: str, held: Held, generation: int, valid_s: float) -> None:
        """A gateway keeps a session whose client may come back."""
        self._resumes.keep(session, held, generation, valid_s, time.monotonic())

    async def look_up(self, session: str) -> Whereabouts:
        """What gateways told of a session."""
        return self._resumes.look_up(session, time.monotonic())

    async def move_sessions(self, order: MoveOrder) -> OrderResult:
        """Has every gateway carry out an operator's order; see `orders.Orders`."""
        return await self._orders.run(order, ORDER_TIMEOUT_S)

    async def next_orders(self, gateway: GatewayBirth) -> News:
        """An operator's orders for a gateway; none after a few seconds, and then it asks again."""
        return await self._orders.next(gateway)

    async def in_the_way(self, gateway: GatewayBirth) -> bool:
        """Whether a gateway that begins has the CPU which a replica needs; see `orders.Orders`."""
        return await self._orders.in_the_way(gateway)

    async def answer_order(self, gateway: str, number: int, moved: list[MovedSession]) -> None:
        """What came of a gateway's sessions."""
        self._orders.answer(gateway, number, moved)

    async def close(self) -> None:
        """Graceful shutdown: replicas close their sessions with their next report, gateways those in their
        queues."""
        self._closing = True
        self._end.set()

    async def wait_close(self, gateway: str) -> None:
        """Returns at shutdown. The gateway then closes its queued sessions and calls `closed`."""
        self._gateways.add(gateway)
        await self._end.wait()

    async def closed(self, gateway: str) -> None:
        """This gateway has no queued session left."""
        self._gateways.discard(gateway)
        self._ledger.forget(gateway)
        self._orders.forget(gateway)

    async def held(self) -> int:
        """Slots in use plus gateways that still have to close their queue; 0 once the shutdown is done."""
        return len(self._gateways) + sum(replica.used for replica in await self.describe())
