"""The routes that say what there is: the service and its load, voices, role texts, health, metrics."""

from __future__ import annotations

from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

import personaplex
from deployments import ingress
from deployments.gateway.info import prompt_list, voice_list
from deployments.gateway.leases import Leases
from deployments.gateway.observer import Observer
from deployments.gateway.ownvoices import OwnVoices
from deployments.gateway.room import Room
from deployments.parts import GatewaySettings

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class StatusRoutes:
    """One gateway's."""

    def __init__(
        self,
        settings: GatewaySettings,
        fleet: Observer,
        leases: Leases,
        room: Room,
        voices: OwnVoices,
        metrics_text: Callable[[], bytes],
    ) -> None:
        self._settings, self._fleet, self._leases, self._room = settings, fleet, leases, room
        self._voices, self._metrics_text = voices, metrics_text

    def routes(self) -> list[BaseRoute]:
        routes: list[BaseRoute] = [
            Route("/api/info", self.info),
            Route("/api/voices", self.voices, methods=["GET", "HEAD"]),
            Route("/api/prompts", self.prompts),
            Route("/healthz", self.health),
        ]
        return [*routes, Route("/metrics", self.metrics)] if self._settings.metrics_page else routes

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
                "prompt_tokens": self._settings.prompt_tokens,
                "queue_places": self._settings.queue_limit,
                "wait_s": await self._room.expected_wait(),
                "own_voices": self._voices.describe(),
                "record": self._settings.record,
                "transcription": self._settings.transcription,
            }
        )

    async def voices(self, request: Request) -> Response:
        replicas = await self._fleet.describe()
        return JSONResponse(voice_list({voice for replica in replicas for voice in replica.voices}))

    async def prompts(self, request: Request) -> Response:
        replicas = await self._fleet.describe()
        return JSONResponse(prompt_list(replicas[0].model if replicas else None))

    async def health(self, request: Request) -> Response:
        up = any(replica.accepting for replica in await self._fleet.describe())
        return JSONResponse(
            {"status": "ok" if up else "no replica", "proxy_limits": ingress.limited(request.scope)},
            status_code=200 if up else 503,
        )

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics_text(), media_type=METRICS_TYPE)
