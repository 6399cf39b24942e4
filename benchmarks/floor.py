"""The floor of the serving benchmark: a gateway's conversations with the engine in their own process.

No lease, no socket between gateway and engine, one process less. What is left is the work nobody can avoid:
WebSocket, Opus, Ogg, pacing, and the engine's thread.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from typing import cast

from ray import serve
from ray.serve.deployment import Application
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from deployments.application import GATEWAY_ENVIRONMENT, GATEWAY_HEADROOM, QUIET_LOGS
from deployments.gateway.conversation import Conversation
from deployments.gateway.leases import Claim, Leases
from deployments.gateway.services import Services
from deployments.metrics import gateway_metrics
from deployments.settings import Settings
from deployments.wire import messages
from deployments.wire.link import Link, OnLost, OnMessage
from deployments.wire.messages import Grant, MessageKind, SlotReady
from personaplex.engine.echo import EchoEngine
from personaplex.engine.events import Batch, Opened, Stepped
from personaplex.engine.loop import EngineLoop
from personaplex.persona import Persona
from personaplex.session.core import Limits
from personaplex.tokenlog import TokenLog


class LocalLink:
    """Takes a gateway's messages and gives them to the engine's thread; see `wire.link.Link`."""

    def __init__(self, engine: EngineLoop, links: dict[int, LocalLink], on_message: OnMessage) -> None:
        self.dropped = 0
        self._engine, self._links, self._on_message = engine, links, on_message
        self._session = -1

    def send(self, kind: MessageKind, payload: bytes) -> None:
        persona = messages.unpack_open(messages.unpack_opening(payload).rest)
        self._session = self._engine.open(persona)
        self._links[self._session] = self

    def send_frame(self, kind: MessageKind, payload: bytes) -> None:
        timestamp, frame = messages.unpack_frame(payload)
        self._engine.push(self._session, frame, timestamp)

    def hear(self, kind: MessageKind, payload: bytes) -> None:
        self._on_message(cast(Link, self), kind, payload)

    def close(self) -> None:
        self._links.pop(self._session, None)
        self._engine.close(self._session)


class LocalLease:
    """Always granted."""

    grant = Grant("", 0, bytes(messages.TOKEN_BYTES), "", 0)

    async def wait_freed(self, timeout_s: float) -> bool:
        return True

    def release(self) -> None:
        pass


class LocalClaim:
    """Has its slot."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    async def lease(self, on_position: Callable[[int], None]) -> LocalLease:
        return LocalLease()

    def give_up(self) -> None:
        pass


class FloorGateway:
    """Conversations over an engine in this process, and nothing else."""

    def __init__(self, settings: Settings) -> None:
        self._links: dict[int, LocalLink] = {}
        self._event_loop = asyncio.get_running_loop()
        self._engine = EngineLoop(
            lambda: EchoEngine(settings.slots),
            self._from_engine,
            gather_s=settings.gather_s,
            inbox_limit=settings.burst_frames,
        )
        self._engine.start().result()
        self._services = Services(
            leases=cast(Leases, None),  # asked only for a second lease, after a link that failed
            metrics=gateway_metrics(),
            limits=Limits(session_s=settings.session_limit_s),
            connect=self._connect,
            connect_timeout_s=settings.lease_timeout_s,
            keep=self._keep_nothing,
            changed=lambda: None,
        )

    def __serve_build_asgi_app__(self) -> Starlette:
        return Starlette(routes=[WebSocketRoute("/api/chat", self.chat)])

    async def chat(self, socket: WebSocket) -> None:
        await socket.accept()
        conversation = Conversation(socket, uuid.uuid4().hex, self._services)
        await conversation.run(Persona(), cast(Claim, LocalClaim()))

    async def _connect(self, grant: Grant, on_message: OnMessage, on_lost: OnLost) -> Link:
        return cast(Link, LocalLink(self._engine, self._links, on_message))

    async def _keep_nothing(self, session: str, log: TokenLog) -> None:
        pass

    def _from_engine(self, batch: Batch) -> None:
        self._event_loop.call_soon_threadsafe(self._dispatch, batch)

    def _dispatch(self, batch: Batch) -> None:
        for event in batch.events:
            link = self._links.get(getattr(event, "session", -1))
            if link is None:
                continue
            if isinstance(event, Stepped):
                said = event.output
                reply = messages.Reply(said.frame, said.pcm, said.tokens, said.text, event.timestamp)
                link.hear(MessageKind.REPLY, messages.pack_reply(reply))
            elif isinstance(event, Opened):
                link.hear(MessageKind.READY, messages.pack_ready(SlotReady(event.prefill_s)))


def build_floor(settings: Settings) -> Application:
    """The floor as an application with as many gateways as the service."""
    gateway = serve.deployment(
        name="gateway",
        num_replicas=settings.gateways_min,
        max_ongoing_requests=settings.sessions_per_gateway + GATEWAY_HEADROOM,
        ray_actor_options={
            "num_cpus": settings.gateway_num_cpus,
            "runtime_env": {"env_vars": GATEWAY_ENVIRONMENT},
        },
        logging_config=QUIET_LOGS,
    )(serve.ingress()(FloorGateway))
    application: Application = gateway.bind(settings)
    return application
