"""The gateway deployment: the web application clients talk to. No torch in this process.

    /api/chat      WebSocket, one conversation (see host.py); 426 without an upgrade
    /v1/...        OpenAI's protocols, where the setting protocols has them (see openai.py)
    /twilio/... /telnyx/... /asterisk/...   the telephone, likewise (see telephone.py)
    /api/admission whether a session with this query would be let in now: 204, or the refusal
    /api/info      model, slots and load of the service
    /api/voices    names a session may ask for
    /api/key, /api/tokens, POST and DELETE of /api/voices: access.py
    /api/admin/... for operators, where there is an admin_keys_file: admin.py
    /api/prompts   role texts to choose from
    /metrics       this gateway's own series, where the setting metrics_page asks for them
    /healthz       200 when sessions can be taken, 503 while no replica is there; `proxy_limits` is whether
                   the process that read this request has the limits of ingress.py
    /              the web page

Nothing a client sent is logged, used as a path or as a metric label.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from pathlib import Path
from typing import Any

from ray.exceptions import TaskCancelledError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import BaseRoute, Mount, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from deployments import garbage, ingress, logs, metrics
from deployments.gateway import tracing, watchers
from deployments.gateway.access import AccessRoutes
from deployments.gateway.accounts import Accounts
from deployments.gateway.admin import AdminRoutes
from deployments.gateway.admission import AccessControl
from deployments.gateway.asking import Asking
from deployments.gateway.conversation import CLOSE_TIMEOUT_S
from deployments.gateway.failover import Failovers
from deployments.gateway.headers import SecurityHeaders
from deployments.gateway.host import SessionHost
from deployments.gateway.keys import Keys
from deployments.gateway.leases import Leases
from deployments.gateway.links import ReplicaLinks
from deployments.gateway.listening import Listening
from deployments.gateway.observer import Observer
from deployments.gateway.openai import OpenAIEndpoints
from deployments.gateway.orders import OrderDesk, birth, make_way
from deployments.gateway.ownvoices import OwnVoices
from deployments.gateway.records import Records
from deployments.gateway.resumes import Resumes
from deployments.gateway.room import Room
from deployments.gateway.services import Services
from deployments.gateway.status import StatusRoutes
from deployments.gateway.telephone import TelephoneEndpoints
from deployments.gateway.tokenlogs import TokenLogs
from deployments.gateway.transcripts import Transcripts
from deployments.gateway.turns import Turns
from deployments.gateway.waits import Waits
from deployments.keysync import KeySync
from deployments.parts import GatewaySettings
from deployments.settings import behind_haproxy, proxies_in_front, proxy_callback
from deployments.wire.speech import Answer
from personaplex.errors import ConfigError
from personaplex.session.core import Limits
from personaplex.transcription.listener import Speech

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "web"


class Gateway:
    """One per process, with handles to the replicas and to the fleet."""

    def __init__(
        self,
        settings: GatewaySettings,
        replicas: DeploymentHandle[Any],
        fleet: DeploymentHandle[Any],
        transcribers: DeploymentHandle[Any] | None = None,
    ) -> None:
        """`transcribers`: none with transcription=off."""
        logs.configure(settings.log_level, settings.log_format)
        self._settings = settings
        self._fleet = Observer(fleet)
        self._metrics = metrics.gateway_metrics(page=settings.metrics_page)
        name, turns = uuid.uuid4().hex, Turns(time.monotonic)
        self._keys = Keys([key.get_secret_value() for key in settings.api_keys], settings.api_keys_file)
        self._accounts = self._make_accounts(fleet, name, turns)
        failovers = Failovers(
            after_s=settings.failover_after_s,
            audio_s=settings.rebuild_audio_s,
            limit_s=settings.queue_timeout_s,
        )
        waits = Waits(settings.session_limit_s, settings.queue_timeout_s)
        self._leases = self._make_leases(replicas, turns, failovers, waits)
        self._room = Room(
            self._fleet,
            self._leases,
            turns,
            waits,
            limit=settings.sessions_per_gateway,
            changed=self._publish,
        )
        self._access = self._make_access()
        self._link_keys = KeySync(fleet)
        self._links = ReplicaLinks(settings, self._link_keys)
        asking = Asking(self._fleet.describe, self._links.reach)
        self._voices = OwnVoices(
            fleet,
            asking,
            self._metrics,
            allowed=settings.own_voices,
            ttl_s=settings.own_voice_ttl_s,
            table=lambda: self._keys.table,
        )
        self._access_routes = AccessRoutes(
            self._access, self._accounts, self._voices, asking, query_limit=settings.query_limit_bytes
        )
        self._records = Records.of(settings, self._metrics)
        self._services = self._make_services(failovers, transcribers, waits)
        watchers.watch_replicas(self._services.moves.running)
        self._admin_keys = Keys([], settings.admin_keys_file)
        self._desk = OrderDesk(fleet, birth(name), self._services.moves, failovers.suspects)
        self._host = self._make_host(waits)
        self._status_routes = StatusRoutes(
            settings, self._fleet, self._leases, self._room, self._voices, self._metrics_text
        )
        asyncio.get_running_loop().set_exception_handler(report_failure)
        self._tasks = [
            asyncio.ensure_future(task)
            for task in (
                self._metrics.keep(self._publish),
                self._fleet.wait_close(name, self._close),
                self._accounts.run(self._leases.waiting),
                self._keys.watch(self._keys_read),
                self._room.watch(),
                self._admin_keys.watch(self._keys_read),
                self._desk.watch(),
            )
        ]
        warn_of_proxies_without_limits()
        self._publish()  # a series that is not there yet cannot be told from a gateway that is not read

    def _admin_routes(self) -> list[BaseRoute]:
        if self._settings.admin_keys_file is None:
            return []
        return AdminRoutes(
            keys=lambda: self._admin_keys.table,
            api_keys=lambda: self._keys.table,
            replicas=self._fleet.describe,
            give=self._desk.give,
        ).routes()

    def _make_host(self, waits: Waits) -> SessionHost:
        return SessionHost(
            self._services,
            fleet=self._fleet,
            access=self._access,
            accounts=self._accounts,
            room=self._room,
            waits=waits,
            voices=self._voices,
            records=self._records,
            query_limit=self._settings.query_limit_bytes,
        )

    def _make_accounts(self, fleet: DeploymentHandle[Any], name: str, turns: Turns) -> Accounts:
        return Accounts(
            fleet,
            name,
            self._metrics,
            turns,
            table=lambda: self._keys.table,
            sessions_per_key=self._settings.sessions_per_key,
            revoke_ends_sessions=self._settings.revoke_ends_sessions,
        )

    def _make_leases(
        self, replicas: DeploymentHandle[Any], turns: Turns, failovers: Failovers, waits: Waits
    ) -> Leases:
        return Leases(
            replicas,
            queue_limit=self._settings.queue_limit,
            queue_timeout_s=self._settings.queue_timeout_s,
            turns=turns,
            who=self._accounts.holder_of,
            granted=lambda session: waits.served(session, time.monotonic()),
            freed=lambda seconds: waits.ended(seconds, time.monotonic()),
            shared=lambda one: self._keys.table.holders > 1 and not self._accounts.talks(one),
            suspects=failovers.suspects,
        )

    def _make_access(self) -> AccessControl:
        return AccessControl(
            (lambda: self._keys.table) if self._settings.guarded else None,
            self._settings.allowed_origins,
            sessions_per_address=self._settings.address_limit,
            trusted_proxies=proxies_in_front(self._settings.trusted_proxies),
            unlimited_networks=self._settings.unlimited,
            peer_is_proxy=behind_haproxy(),
        )

    def _make_services(
        self, failovers: Failovers, transcribers: DeploymentHandle[Any] | None, waits: Waits
    ) -> Services:
        return Services(
            leases=self._leases,
            metrics=self._metrics,
            limits=Limits(
                session_s=self._settings.session_limit_s,
                idle_s=self._settings.idle_limit_s,
                first_audio_s=self._settings.first_audio_s,
                burst_s=self._settings.burst_s,
            ),
            connect=self._links.connect,
            connect_timeout_s=self._settings.lease_timeout_s,
            keep=TokenLogs(self._settings.token_log_dir).keep,
            changed=self._publish,
            wait=self._room.wait,
            began=lambda session: waits.live(session, time.monotonic()),
            trace=tracing.connect() if self._settings.tracing else None,
            transcripts=None if transcribers is None else self._transcripts(transcribers),
            failovers=failovers,
            resumes=self._make_resumes(),
        )

    def _transcripts(self, transcribers: DeploymentHandle[Any]) -> Transcripts:
        async def transcribe(speech: Speech) -> Answer:
            answer: Answer = await transcribers.transcribe.remote(speech)
            return answer

        return Transcripts(
            transcribe,
            self._metrics,
            Listening(self._settings.burst_frames),
            backlog_s=self._settings.transcription_backlog_s,
            transcribers=self._settings.transcribers_max,
        )

    def __serve_build_asgi_app__(self) -> Starlette:
        routes: list[BaseRoute] = [
            *self._host.routes(),
            *OpenAIEndpoints(self._host, self._settings, lambda: self._link_keys.keyring.secrets).routes(),
            *TelephoneEndpoints(self._host, self._settings).routes(),
            WebSocketRoute("/{path:path}", no_socket),  # static files know no sockets
            *self._status_routes.routes(),
            *self._access_routes.routes(),
            *self._admin_routes(),
        ]
        if self._settings.static != "none":
            page = Path(self._settings.static) if self._settings.static else PAGE
            if not page.is_dir():
                raise ConfigError("static is neither none nor a directory")
            # Compressing a small file takes half a millisecond; the large ones of vendor would delay speech.
            routes.append(Mount("/vendor", StaticFiles(directory=page / "vendor", check_dir=False)))
            routes.append(Mount("/", GZipMiddleware(StaticFiles(directory=page, html=True), compresslevel=6)))
        pages = Middleware(
            SecurityHeaders, policy=self._settings.content_security_policy, hsts_s=self._settings.hsts_s
        )
        return Starlette(routes=routes, middleware=[pages])

    def _make_resumes(self) -> Resumes | None:
        if not self._settings.resume_grace_s:
            return None
        return Resumes(
            self._settings.resume_grace_s,
            lambda: self._link_keys.keyring.secrets,
            self._fleet,
            self._links.reach,
        )

    async def _close(self) -> None:
        """Graceful shutdown: closes the queued sessions; replicas close those that hold a slot."""
        self._leases.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._room.empty.wait(), CLOSE_TIMEOUT_S)
        if self._services.transcripts is not None:
            self._services.transcripts.close()
        if self._records is not None:
            await self._records.close()

    def _keys_read(self, well: bool) -> None:
        self._metrics.add(metrics.KEYS_RELOADS, result="loaded" if well else "failed")

    def _metrics_text(self) -> bytes:
        self._publish()
        return self._metrics.text()

    def _publish(self) -> None:
        self._metrics.set(metrics.SESSIONS_OPEN, self._room.open)
        self._metrics.set(metrics.SESSIONS_LIVE, len(self._services.live))
        self._metrics.set(metrics.SESSIONS_QUEUED, self._leases.queued)
        self._metrics.set(metrics.CALLERS, self._access.counted)
        self._metrics.set(metrics.TASKS, len(asyncio.all_tasks()))


async def no_socket(socket: WebSocket) -> None:
    """Refuses an upgrade at an address without one."""
    with contextlib.suppress(RuntimeError, OSError, WebSocketDisconnect):  # its client may have gone
        await socket.send_denial_response(PlainTextResponse("no WebSocket here\n", status_code=404))


def report_failure(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The event loop's exception handler. Ray cancels what a request has started when its client leaves, and
    Serve's own calls among it, which nobody waits for any more: that is no failure."""
    if not isinstance(context.get("exception"), TaskCancelledError):
        loop.default_exception_handler(context)


def warn_of_proxies_without_limits() -> None:
    """One line of log where Ray's processes were started without the limits of ingress.py."""
    if proxy_callback() != ingress.CALLBACK:
        logger.warning(
            "Serve's proxies take compressed messages of 16 MiB from anybody: set %s=%s for Ray",
            *(ingress.VARIABLE, ingress.CALLBACK),
        )


class ServedGateway(Gateway):
    """A gateway as Serve makes it: only where there is room for replicas too."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: GatewaySettings, *handles: DeploymentHandle[Any]
    ) -> None:
        """`handles` as Gateway takes them: to the replicas, to the fleet, and perhaps to transcribers."""
        logs.configure(settings.log_level, settings.log_format)  # for `make_way`, which may say why it ends
        await make_way(handles[1])
        super().__init__(settings, *handles)
        garbage.settle()
