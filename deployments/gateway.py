"""The gateway deployment: the web application clients talk to. No torch in this process.

    /api/chat      WebSocket, one conversation (see personaplex/session)
    /api/info      model, slots and load of the service
    /api/voices    names a session may ask for
    /api/prompts   role texts to choose from
    /metrics       this gateway's own series, where the setting metrics_page asks for them
    /healthz       200 when sessions can be taken, 503 while no replica is there
    /              the web page

Errors of a session are told to its client as an error message and a close code; nothing a client sent is
logged, used as a path or as a metric label.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

import personaplex
from deployments import logs, media, metrics, tracing
from deployments.catalogue import prompt_list, voice_list
from deployments.conversation import Conversation
from deployments.doors import Doors, Visitor
from deployments.fleet import Observer
from deployments.lease import Leases
from deployments.line import Services
from deployments.query import persona_from, read_query, wants_status
from deployments.settings import Settings
from personaplex.errors import ConfigError, NoCapacity
from personaplex.persona import Persona
from personaplex.session.core import Limits
from personaplex.tokenlog import TokenLog

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "web"


class Gateway:
    """Made by Serve, one per process, with handles to the replicas and to the fleet."""

    def __init__(
        self, settings: Settings, replicas: DeploymentHandle[Any], fleet: DeploymentHandle[Any]
    ) -> None:
        logs.configure(settings.log_level, settings.log_format)
        self._settings = settings
        self._fleet = Observer(fleet)
        self._metrics = metrics.gateway_metrics(page=settings.metrics_page)
        self._leases = Leases(
            replicas, queue_limit=settings.queue_limit, queue_timeout_s=settings.queue_timeout_s
        )
        self._doors = Doors(
            settings.keys(),
            settings.allowed_origins,
            sessions_per_key=settings.sessions_per_key,
            sessions_per_address=settings.sessions_per_address,
            trusted_proxies=settings.trusted_proxies,
        )
        self._services = Services(
            leases=self._leases,
            metrics=self._metrics,
            limits=Limits(settings.session_limit_s, settings.idle_limit_s, settings.burst_s),
            connect=lambda grant, hear, lose: media.connect(
                grant.host, grant.port, hear, lose, settings.burst_frames
            ),
            connect_timeout_s=settings.lease_timeout_s,
            keep=self._keep,
            changed=self._publish,
            trace=tracing.connect() if settings.tracing else None,
        )
        self._open = 0
        self._keeping = asyncio.ensure_future(self._metrics.keep())
        self._publish()  # a series that is not there yet cannot be told from a gateway that is not read

    def __serve_build_asgi_app__(self) -> Starlette:
        routes: list[BaseRoute] = [
            WebSocketRoute("/api/chat", self.chat),
            Route("/api/info", self.info),
            Route("/api/voices", self.voices),
            Route("/api/prompts", self.prompts),
            Route("/healthz", self.health),
        ]
        if self._settings.metrics_page:
            routes.append(Route("/metrics", self.metrics))
        if self._settings.static != "none":
            page = Path(self._settings.static) if self._settings.static else PAGE
            if not page.is_dir():
                raise ConfigError("static is neither none nor a directory")
            routes.append(Mount("/", StaticFiles(directory=page, html=True)))
        return Starlette(routes=routes)

    async def chat(self, socket: WebSocket) -> None:
        await socket.accept()
        status = wants_status(socket.scope["query_string"])
        conversation = Conversation(socket, uuid.uuid4().hex, self._services, status=status)
        self._open += 1
        self._publish()
        try:
            await conversation.run(functools.partial(self._admit, socket))
        finally:
            self._open -= 1
            self._publish()

    async def census(self) -> dict[str, int]:
        """What must go back to nothing when the last session has ended; for operators and tests."""
        return {
            "sessions": self._open,
            "live": len(self._services.live),
            "queued": self._leases.queued,
            "doors": self._doors.inside,
            "tasks": len(asyncio.all_tasks()),
        }

    async def info(self, request: Request) -> Response:
        replicas = await self._fleet.describe()
        return JSONResponse(
            {
                "version": personaplex.__version__,
                "model": replicas[0].model if replicas else None,
                "replicas": len(replicas),
                "slots": sum(replica.slots for replica in replicas),
                "used": sum(replica.used for replica in replicas),
                "queued": self._leases.queued,
                "session_limit_s": self._settings.session_limit_s,
                "key_needed": self._settings.guarded,
            }
        )

    async def voices(self, request: Request) -> Response:
        replicas = await self._fleet.describe()
        return JSONResponse(voice_list({voice for replica in replicas for voice in replica.voices}))

    async def prompts(self, request: Request) -> Response:
        return JSONResponse(prompt_list())

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(self, request: Request) -> Response:
        up = any(replica.accepting for replica in await self._fleet.describe())
        return JSONResponse({"status": "ok" if up else "no replica"}, status_code=200 if up else 503)

    @contextlib.contextmanager
    def _admit(self, socket: WebSocket) -> Iterator[Persona]:
        """The persona asked for, while the doors count the session. Raises what the client is to be told."""
        if self._open > self._settings.sessions_per_gateway:
            raise NoCapacity("this gateway holds as many sessions as it may")
        query = read_query(socket.scope["query_string"], self._settings.query_limit_bytes)
        address = socket.client.host if socket.client else ""
        with self._doors.enter(Visitor(address, socket.headers, query)):
            yield persona_from(query)

    def _publish(self) -> None:
        self._metrics.set(metrics.SESSIONS_LIVE, len(self._services.live))
        self._metrics.set(metrics.SESSIONS_QUEUED, self._leases.queued)

    async def _keep(self, session: str, log: TokenLog) -> None:
        folder = self._settings.token_log_dir
        if folder is None or not len(log):
            return
        try:
            await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
            # Packing an hour takes a quarter of a second: three frames of every other session.
            await asyncio.to_thread(log.save, folder / f"{session}.npz")
        except OSError:
            logger.exception("the tokens of session %s could not be saved", session)
