"""Replicas in this process, on loopback sockets, for tests of failover: the real sessions, links and engine
loop, without Ray. They can be killed, frozen and thawed; a gateway's real `Leases` asks them for slots."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import itertools
import time
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, cast

import numpy as np
from ray.exceptions import ActorDiedError

from deployments.gateway.failover import Failovers
from deployments.gateway.leases import Leases
from deployments.gateway.resumes import Resumes
from deployments.gateway.services import Services
from deployments.metrics import Metrics, Series
from deployments.parts import ReplicaSettings
from deployments.replica.sessions import Sessions
from deployments.settings import Settings
from deployments.wire.handshake import GatewayHandshake, Keyring
from deployments.wire.link import Link, OnLost, OnMessage, connect, listen
from deployments.wire.messages import Grant, Held, LeaseRequest, ReplicaStatus
from deployments.wire.tokens import ResumeTokens
from deployments.wire.whereabouts import ResumeBook, Whereabouts
from personaplex.config import STREAMS, Pcm
from personaplex.engine.echo import EchoEngine
from personaplex.engine.events import Batch
from personaplex.engine.interface import Output, Slot, Stepper, Tokens
from personaplex.session.core import Limits
from personaplex.sessionlog import SessionLog
from personaplex.tokenlog import TokenLog

KEYRING = Keyring(bytes(range(32)))
TOKENS = ResumeTokens(KEYRING.secrets)
LOOK_FOR_S = 0.3  # this fleet is always up to date
BURST_S = 20.0  # a busy machine may be late: these tests are about what is said, not when


class Counted:
    """Metrics that are kept: totals of counters by their labels, and all that was observed."""

    def __init__(self) -> None:
        self.totals: dict[tuple[str, ...], float] = {}
        self.observed: dict[tuple[str, ...], list[float]] = {}

    def add(self, series: Series, amount: float = 1.0, **labels: str) -> None:
        key = (series.name, *labels.values())
        self.totals[key] = self.totals.get(key, 0) + amount

    def set(self, series: Series, value: float) -> None:
        self.totals[(series.name,)] = value

    def observe(self, series: Series, value: float, **labels: str) -> None:
        self.observed.setdefault((series.name, *labels.values()), []).append(value)


class MemoryEngine(EchoEngine):
    """An echo whose tokens depend on every frame its session has heard, as a model's do; rebuilt from logs
    that hold all of the sound."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._memory: dict[Slot, int] = {}

    def admit_rebuild(self, log: SessionLog) -> Slot:
        assert len(log.sound) == log.frames, "the log of a short session"
        slot = super().admit_rebuild(log)
        for pcm, row in zip(log.sound, log.tokens, strict=True):
            assert (self._tokens(slot, pcm) == row).all(), "a log that is not what was heard"
        return slot

    def step(self) -> list[Output]:
        heard = {state.slot: state.heard for state in self._open.values() if state.heard is not None}
        return [
            dataclasses.replace(output, tokens=self._tokens(output.slot, heard[output.slot]))
            for output in super().step()
        ]

    def _tokens(self, slot: Slot, pcm: Pcm) -> Tokens:
        self._memory[slot] = zlib.crc32(np.ascontiguousarray(pcm).tobytes(), self._memory.get(slot, 0))
        return np.random.default_rng(self._memory[slot]).integers(0, 2_000, STREAMS)


class LoopbackReplica:
    """One replica."""

    def __init__(self, name: str, settings: ReplicaSettings, make: Callable[[], Stepper]) -> None:
        self.name, self.alive, self.frozen = name, True, False
        self.metrics = Counted()
        self.changed = asyncio.Event()
        self.sessions = Sessions(settings, make, cast(Metrics, self.metrics), self.changed.set, KEYRING, name)
        self.links: list[Link] = []
        self._held: list[Any] = []  # events of the engine while it is frozen
        self._dispatch = self.sessions._dispatch
        self.sessions._dispatch = self._pass_on  # type: ignore[method-assign]

    async def start(self) -> None:
        started = asyncio.wrap_future(self.sessions.engine.start())
        self.sessions.slots = await started
        self._server, self.port = await listen(self._accept, "127.0.0.1")

    @property
    def used(self) -> int:
        return self.sessions.holders.used

    def kill(self) -> None:
        """SIGKILL: its sockets are gone, nothing more is said."""
        self.alive = False
        self._server.close()
        for link in self.links:
            if link._transport is not None:
                link._transport.abort()
        self.sessions.engine.stop()
        self.changed.set()

    def freeze(self) -> None:
        """SIGSTOP: nothing is read, nothing is said."""
        self.frozen = True
        for link in self.links:
            if link._transport is not None and not link._transport.is_closing():
                link._transport.pause_reading()

    def thaw(self) -> None:
        """SIGCONT."""
        self.frozen = False
        for link in self.links:
            if link._transport is not None and not link._transport.is_closing():
                link._transport.resume_reading()
        held, self._held = self._held, []
        for batch, packed in held:
            self._dispatch(batch, packed)

    def _accept(self) -> Link:
        link = self.sessions.accept()
        self.links.append(link)
        if self.frozen:
            asyncio.get_running_loop().call_soon(self.freeze)
        return link

    def _pass_on(self, batch: Batch, packed: Any) -> None:
        if not self.alive:
            return
        if self.frozen:
            self._held.append((batch, packed))
        else:
            self._dispatch(batch, packed)


class LeaseCall:
    """A streaming call of a lease, as Serve gives it. `serve` puts the answers into the queue it is given; an
    exception among them is raised."""

    def __init__(self, serve: Callable[[asyncio.Queue[Any]], Coroutine[Any, Any, None]]) -> None:
        self._items: asyncio.Queue[Any] = asyncio.Queue()
        self._task = asyncio.ensure_future(serve(self._items))

    async def __anext__(self) -> Any:
        item = await self._items.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def cancel(self) -> None:
        self._task.cancel()


class Fleet:
    """Replicas, and Serve's part in giving their slots away: the first with room, in the order they were
    made."""

    def __init__(self, make: Callable[[], Stepper], **settings: Any) -> None:
        self._make = make
        self._settings = ReplicaSettings.of(Settings(burst_s=BURST_S, **settings))
        self._names = itertools.count()
        self.replicas: list[LoopbackReplica] = []
        self.asked: list[LeaseRequest] = []
        self.book = ResumeBook()

    async def add(self, make: Callable[[], Stepper] | None = None) -> LoopbackReplica:
        replica = LoopbackReplica(f"r{next(self._names)}", self._settings, make or self._make)
        await replica.start()
        self.replicas.append(replica)
        return replica

    def kill(self, replica: LoopbackReplica) -> None:
        replica.kill()
        self.replicas.remove(replica)

    async def describe(self) -> list[ReplicaStatus]:
        """What Serve's fleet would say of them."""
        return [
            ReplicaStatus(
                replica=one.name,
                node="",
                pid=0,
                model="memory",
                voices=(),
                slots=one.sessions.slots,
                accepting=one.sessions.accepting,
                sessions=one.sessions.holders.statuses(),
                detached=one.sessions.comebacks.kept.statuses,
                media=("127.0.0.1", one.port),
            )
            for one in self.replicas
        ]

    async def look_up(self, session: str) -> Whereabouts | None:
        return self.book.look_up(session, time.monotonic())

    def use_tokens(self, session: str, good_from: int, valid_s: float) -> None:
        self.book.use(session, good_from, valid_s, time.monotonic())

    def keep_session(self, session: str, held: Held, generation: int, valid_s: float) -> None:
        self.book.keep(session, held, generation, valid_s, time.monotonic())

    def options(self, **_: Any) -> Fleet:
        return self

    def remote(self, request: LeaseRequest) -> LeaseCall:
        self.asked.append(request)
        return LeaseCall(functools.partial(self.serve, request))

    async def serve(self, request: LeaseRequest, items: asyncio.Queue[Any]) -> None:
        while True:
            usable = [
                one for one in self.replicas if one.name not in request.excluded and one.sessions.accepting
            ]
            free = [one for one in usable if one.used < one.sessions.slots]
            if free:
                break
            await asyncio.sleep(0.01)
        replica = free[0]
        token, holder = replica.sessions.holders.hold(request)
        try:
            items.put_nowait(Grant("127.0.0.1", replica.port, token, replica.name, replica.sessions.slots))
            while not holder.freed.is_set() and replica.alive:
                replica.changed.clear()
                await replica.changed.wait()
            items.put_nowait(StopAsyncIteration() if replica.alive else ActorDiedError())
        finally:
            replica.sessions.holders.drop(token)


async def _forget(session: str, log: TokenLog) -> None:
    pass


async def link(replica: str, host: str, port: int, on_message: OnMessage, on_lost: OnLost) -> Link:
    handshake = GatewayHandshake(KEYRING, replica)
    return await connect(host, port, on_message, on_lost, handshake=handshake, outbox=250, stall_s=10.0)


def services(
    fleet: Fleet,
    published: Counted,
    *,
    after_s: float,
    queue_timeout_s: float = 20.0,
    grace_s: float = 30.0,
) -> Services:
    """What a gateway lends to its conversations, over `fleet`."""
    failovers = Failovers(after_s=after_s, limit_s=queue_timeout_s)
    return Services(
        leases=Leases(
            cast(Any, fleet), queue_limit=8, queue_timeout_s=queue_timeout_s, suspects=failovers.suspects
        ),
        metrics=cast(Metrics, published),
        limits=Limits(burst_s=BURST_S),
        connect=lambda grant, on_message, on_lost: link(
            grant.replica, grant.host, grant.port, on_message, on_lost
        ),
        connect_timeout_s=5.0,
        keep=_forget,
        changed=lambda: None,
        failovers=failovers,
        resumes=Resumes(
            grace_s,
            lambda: KEYRING.secrets,
            fleet,
            link,
            look_for_s=LOOK_FOR_S,
        ),
    )


@contextlib.asynccontextmanager
async def fleet_of(count: int, make: Callable[[], Stepper], **settings: Any) -> AsyncIterator[Fleet]:
    """So many replicas; all gone at the end."""
    fleet = Fleet(make, **settings)
    try:
        for _ in range(count):
            await fleet.add()
        yield fleet
    finally:
        for replica in list(fleet.replicas):
            fleet.kill(replica)
