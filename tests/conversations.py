"""Parts of a conversation, for tests of sessions: sockets whose clients do as they are told, links
to replicas that remember what became of them, and the services that a session is lent."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from starlette.websockets import WebSocket, WebSocketState

from deployments import metrics
from deployments.gateway.conversation import Conversation
from deployments.gateway.leases import Claim, Waiter
from deployments.gateway.services import Services
from deployments.gateway.turns import QueuedRequest
from deployments.wire import messages
from deployments.wire.messages import Grant, MessageKind
from personaplex.config import FRAME_SIZE
from personaplex.persona import Persona
from personaplex.session.core import Limits


class Silence:
    """A socket whose client says nothing, as Starlette gives it."""

    client_state = application_state = WebSocketState.CONNECTED

    async def receive(self) -> dict[str, Any]:
        await asyncio.Event().wait()
        raise AssertionError

    async def send_bytes(self, data: bytes) -> None:
        pass

    async def close(self, code: int, reason: str = "") -> None:
        self.application_state = WebSocketState.DISCONNECTED


class Spy:
    """A media link and the lease for it; remembers what became of them."""

    grant = Grant("", 0, bytes(16), "", 1)
    dropped = 0

    def __init__(self) -> None:
        self.connected, self.closed, self.released = asyncio.Event(), False, asyncio.Event()
        self.hear: Any = None

    def send(self, kind: Any, payload: bytes) -> None:
        self.connected.set()

    def close(self) -> None:
        self.closed = True

    async def wait_freed(self, timeout_s: float) -> bool:
        await asyncio.sleep(0.05)
        return self.closed

    def release(self) -> None:
        self.released.set()


class Nothing:
    """Metrics, traces, callbacks: it and every method of it may be called."""

    def __call__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return self


class Counted(Nothing):
    """Metrics that keep the causes of sessions that never began."""

    def __init__(self) -> None:
        self.refused: list[str] = []

    def add(self, series: metrics.Series, amount: float = 1.0, **labels: str) -> None:
        if series is metrics.SESSIONS_REFUSED:
            self.refused.append(labels["cause"])


class Caller(Silence):
    """A socket whose client says everything at once, when it may; keeps what it was told at the end."""

    def __init__(self, *said: bytes) -> None:
        self._said = deque(said)
        self.may_speak, self.complaint, self.code = asyncio.Event(), "", 0

    async def receive(self) -> dict[str, Any]:
        await self.may_speak.wait()
        if self._said:
            return {"type": "websocket.receive", "bytes": self._said.popleft()}
        return await super().receive()

    async def close(self, code: int, reason: str = "") -> None:
        if not self.code:
            self.code, self.complaint = code, reason
        await super().close(code, reason)


class Slot(Spy):
    """A link that keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Any] = []

    def send_frame(self, kind: MessageKind, payload: bytes) -> None:
        assert kind is MessageKind.FRAME
        self.frames.append(messages.unpack_frame(payload)[1])

    def answer(self, frame: int, level: float) -> None:
        pcm = np.full(FRAME_SIZE, level, np.float32)
        self.hear(
            self,
            MessageKind.REPLY,
            messages.pack_reply(messages.Reply(frame, pcm, np.zeros(17, np.int64), "", 0)),
        )


class Listener(Caller):
    """A caller that keeps the pages it is sent, by their numbers, headers first."""

    def __init__(self, *said: bytes) -> None:
        super().__init__(*said)
        self.numbers: list[int] = []

    async def send_bytes(self, data: bytes) -> None:
        if data[0] == 1:
            self.numbers.append(int.from_bytes(data[19:23], "little"))


async def converse(caller: Caller, slot: Slot, limits: Limits, during: Callable[[], Awaitable[None]]) -> None:
    """Runs `during` once the replica was told the persona, then hangs up."""

    async def link(grant: Grant, hear: Any, lose: Any) -> Any:
        slot.hear = hear
        return slot

    services = dataclasses.replace(services_of(link), limits=limits)
    conversation = Conversation(cast(WebSocket, caller), "s", services)
    handler = asyncio.ensure_future(conversation.run(Persona(), claim_of(slot)))
    await asyncio.wait_for(slot.connected.wait(), 5)
    await during()
    handler.cancel()
    await asyncio.gather(handler, return_exceptions=True)


async def forget(*_: Any) -> None:
    pass


def claim_of(lease: Any) -> Claim:
    """A claim that has its slot."""
    loop = asyncio.get_running_loop()
    turn = loop.create_future()
    turn.set_result(lease)
    return Claim(Waiter(QueuedRequest("s", ""), loop.create_future()), turn, time.monotonic())


def services_of(connect: Any, *leases: Any) -> Services:
    """What a conversation is lent; `leases` are the ones it gets if its own does not do."""
    further = list(leases)

    async def claim(*_: Any) -> Claim:
        return claim_of(further.pop(0))

    values: dict[str, Any] = {
        "leases": SimpleNamespace(claim=claim),
        "connect": connect,
        "limits": Limits(),
        "keep": forget,
        "connect_timeout_s": 0.1,
    }
    for field in dataclasses.fields(Services):
        if field.name not in values and field.default_factory is dataclasses.MISSING:
            values[field.name] = Nothing()
    return Services(**values)
