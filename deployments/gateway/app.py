"""The gateway deployment: the web application clients talk to. No torch in this process.

    /api/chat      WebSocket, one conversation (see personaplex/session); 426 without an upgrade
    /v1/...        OpenAI's protocols, where the setting protocols has them (see openai.py)
    /twilio/... /telnyx/... /asterisk/...   the telephone, likewise (see telephone.py)
    /api/admission whether a session with this query would be let in now: 204, or the refusal
    /api/info      model, slots and load of the service
    /api/voices    names a session may ask for
    /api/admin/... for operators, where there is an admin_keys_file: admin.py
    /api/key, /api/tokens, POST and DELETE of /api/voices: access.py
    /api/prompts   role texts to choose from
    /metrics       this gateway's own series, where the setting metrics_page asks for them
    /healthz       200 when sessions can be taken, 503 while no replica is there; `proxy_limits` is whether
                   the process that read this request has the limits of ingress.py
    /              the web page

An upgrade is accepted only once the session has a slot or a place in the queue; until then a refusal is an
HTTP status (`admission.refusal`). Later errors are an error message and a close code. Nothing a
client sent is logged, used as a path or as a metric label.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ray.exceptions import TaskCancelledError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

import personaplex
from deployments import ingress, logs, metrics
from deployments.gateway import tracing, watchers
from deployments.gateway.access import AccessRoutes
from deployments.gateway.accounts import Accounts
from deployments.gateway.admin import AdminRoutes
from deployments.gateway.admission import AccessControl, ClientInfo, refusal
from deployments.gateway.asking import Asking
from deployments.gateway.conversation import CLOSE_TIMEOUT_S, Comeback, Conversation
from deployments.gateway.failover import Failovers
from deployments.gateway.headers import SecurityHeaders
from deployments.gateway.info import prompt_list, voice_list
from deployments.gateway.keys import Key, Keys
from deployments.gateway.leases import Claim, Leases
from deployments.gateway.listening import Listening
from deployments.gateway.observer import Observer
from deployments.gateway.openai import Admit, OpenAIEndpoints
from deployments.gateway.orders import OrderDesk, birth
from deployments.gateway.ownvoices import OwnVoices
from deployments.gateway.protocols.translator import Translator
from deployments.gateway.query import allows_transcription, heard_from, persona_from, read_query, wants_status
from deployments.gateway.reconnects import Reconnects
from deployments.gateway.recorder import Recording
from deployments.gateway.records import Records
from deployments.gateway.resumes import Resumes, Taken
from deployments.gateway.telephone import TICKET_S, TelephoneEndpoints
from deployments.gateway.transcripts import Transcripts
from deployments.gateway.turns import Turns
from deployments.gateway.upstream import Services
from deployments.gateway.waits import Waits
from deployments.keysync import KeySync
from deployments.parts import GatewaySettings
from deployments.settings import behind_haproxy, proxies_in_front, proxy_callback
from deployments.wire.handshake import GatewayHandshake
from deployments.wire.link import Link, OnLost, OnMessage, connect
from deployments.wire.messages import Grant, LeaseRequest
from deployments.wire.speech import Answer
from deployments.wire.tls import gateway_context
from personaplex.errors import (
    ConfigError,
    NoCapacity,
    PersonaplexError,
    ResumeRefused,
    SessionLost,
    Unauthorized,
)
from personaplex.persona import Persona
from personaplex.session.core import Limits
from personaplex.tokenlog import TokenLog
from personaplex.transcription.listener import Speech

logger = logging.getLogger(__name__)

SLOTS_EVERY_S = 5.0  # between two looks at how many slots there are
PAGE = Path(__file__).parent / "web"

_LEFT = (RuntimeError, OSError, WebSocketDisconnect)  # what a socket raises whose client has gone


class Gateway:
    """Made by Serve, one per process, with handles to the replicas and to the fleet."""

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
        self._leases = self._make_leases(replicas, turns, failovers)
        self._access = self._make_access()
        self._reconnects = Reconnects()
        self._link_keys = KeySync(fleet)
        self._tls = None if settings.media_tls == "off" else gateway_context(settings.media_tls_dir)
        asking = Asking(self._fleet.describe, self._reach)
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
        self._services = self._make_services(failovers, transcribers)
        watchers.watch_replicas(self._services.moves.running)
        self._admin_keys = Keys([], settings.admin_keys_file)
        self._desk = OrderDesk(fleet, birth(name), self._services.moves, failovers.suspects)
        self._waits, self._slots = Waits(), 0
        self._open = 0
        self._empty = asyncio.Event()  # no session is open
        self._empty.set()
        asyncio.get_running_loop().set_exception_handler(report_failure)
        self._tasks = [
            asyncio.ensure_future(task)
            for task in (
                self._metrics.keep(self._publish),
                self._fleet.wait_close(name, self._close),
                self._accounts.run(self._leases.waiting),
                self._keys.watch(self._keys_read),
                self._count_slots(),
                self._desk.watch(),
            )
        ]
        if settings.admin_keys_file is not None:
            self._tasks.append(asyncio.ensure_future(self._admin_keys.watch(self._keys_read)))
        warn_of_proxies_without_limits()
        self._publish()  # a series that is not there yet cannot be told from a gateway that is not read

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

    def _make_leases(self, replicas: DeploymentHandle[Any], turns: Turns, failovers: Failovers) -> Leases:
        return Leases(
            replicas,
            queue_limit=self._settings.queue_limit,
            queue_timeout_s=self._settings.queue_timeout_s,
            turns=turns,
            who=self._accounts.holder_of,
            granted=lambda session: self._waits.served(session, time.monotonic()),
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

    def _make_services(self, failovers: Failovers, transcribers: DeploymentHandle[Any] | None) -> Services:
        return Services(
            leases=self._leases,
            metrics=self._metrics,
            limits=Limits(
                session_s=self._settings.session_limit_s,
                idle_s=self._settings.idle_limit_s,
                first_audio_s=self._settings.first_audio_s,
                burst_s=self._settings.burst_s,
            ),
            connect=self._connect,
            connect_timeout_s=self._settings.lease_timeout_s,
            keep=self._keep,
            changed=self._publish,
            wait=self._wait,
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
            WebSocketRoute("/api/chat", self.chat),
            Route("/api/chat", self.upgrade_required),
            *OpenAIEndpoints(self, self._settings, lambda: self._link_keys.keyring.secrets).routes(),
            *TelephoneEndpoints(self, self._settings).routes(),
            WebSocketRoute("/{path:path}", self.no_socket),  # static files know no sockets
            Route("/api/admission", self.admission),
            Route("/api/info", self.info),
            Route("/api/voices", self.voices, methods=["GET", "HEAD"]),
            *self._access_routes.routes(),
            *self._admin_routes(),
            Route("/api/prompts", self.prompts),
            Route("/healthz", self.health),
        ]
        if self._settings.metrics_page:
            routes.append(Route("/metrics", self.metrics))
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

    def _admin_routes(self) -> list[BaseRoute]:
        if self._settings.admin_keys_file is None:
            return []
        return AdminRoutes(
            keys=lambda: self._admin_keys.table,
            api_keys=lambda: self._keys.table,
            replicas=self._fleet.describe,
            give=self._desk.give,
        ).routes()

    async def chat(self, socket: WebSocket) -> None:
        session = uuid.uuid4().hex
        async with contextlib.AsyncExitStack() as counted:
            counted.enter_context(self._counting())
            taken: Taken | None = None
            try:
                persona, caller, key = counted.enter_context(self._admit(socket))
                taken = await self._take(socket)
                if taken is not None:
                    session, persona = taken.session, taken.log.persona
                    counted.callback(taken.give_back)
                await counted.enter_async_context(self._accounts.enter(session, key))
                if taken is None:
                    persona = await self._voices.bring(persona, key)
                claim = await self._leases.claim(LeaseRequest.of(session, persona))
            except PersonaplexError as error:
                await self._refuse(socket, session, error)
            except asyncio.CancelledError:
                self._left(session)
                raise
            else:
                await self._converse(socket, session, persona, caller, claim, taken)

    async def _take(self, connection: HTTPConnection) -> Taken | None:
        """The session that the client comes back to, None for a new one. Raises ResumeRefused."""
        query = read_query(connection.scope["query_string"], self._settings.query_limit_bytes)
        token = query.get("resume")
        if token is None:
            return None
        try:
            if self._services.resumes is None:
                raise ResumeRefused
            taken = await self._services.resumes.take(token)
        except ResumeRefused:
            self._metrics.add(metrics.RESUMES, outcome="refused")
            raise
        logger.info("session %s goes on: its client has come back", taken.session)
        return taken

    async def talk(
        self,
        socket: WebSocket,
        protocol: str,
        make: Callable[[str, Persona], Translator],
        refuse: Callable[[PersonaplexError], Response],
        *,
        connection: HTTPConnection | None = None,
        admit: Admit | None = None,
        subprotocol: str | None = None,
    ) -> None:
        """A session of a client that says only after the upgrade what it wants; see `openai.Host`."""
        session = uuid.uuid4().hex
        async with contextlib.AsyncExitStack() as counted:
            counted.enter_context(self._counting())
            try:
                persona, caller, key = counted.enter_context((admit or self._admit)(connection or socket))
                self._check_limit()
                await counted.enter_async_context(self._accounts.enter(session, key))
                await self.check_room()
                translator = make(session, persona)
            except PersonaplexError as error:
                await self._refuse(socket, session, error, refuse, protocol)
                return
            await self._converse_later(socket, session, translator, caller, key, subprotocol)

    def admitted(self, connection: HTTPConnection) -> contextlib.AbstractContextManager[Any]:
        return self._admit(connection)

    async def _converse_later(
        self,
        socket: WebSocket,
        session: str,
        translator: Translator,
        caller: str,
        key: Key | None,
        subprotocol: str | None,
    ) -> None:
        query = read_query(socket.scope["query_string"], self._settings.query_limit_bytes)
        recording: Recording | None = None

        async def begin(persona: Persona, ticket: str) -> tuple[Persona, Claim]:
            nonlocal recording
            if ticket and not await self._fleet.spend(ticket, TICKET_S):
                raise Unauthorized("this call's ticket was used before")
            persona = await self._voices.bring(persona, key)
            recording = self._begin_record(query, session, persona, await self._engine(query))
            if recording is not None:
                conversation.record(recording)
            return persona, await self._leases.claim(LeaseRequest.of(session, persona))

        try:
            await socket.accept(subprotocol)
        except (*_LEFT, asyncio.CancelledError) as error:
            self._left(session, translator.name)
            if isinstance(error, asyncio.CancelledError):
                raise
            return
        conversation = Conversation(
            socket,
            session,
            self._services,
            protocol=translator,
            begin=begin,
            transcribe=translator.user_text and allows_transcription(query),
        )
        try:
            self._accounts.attach(session, conversation)
            await conversation.run()
        finally:
            self._ended(session, caller, conversation, recording)

    async def _converse(
        self,
        socket: WebSocket,
        session: str,
        persona: Persona,
        caller: str,
        claim: Claim,
        taken: Taken | None = None,
    ) -> None:
        query = read_query(socket.scope["query_string"], self._settings.query_limit_bytes)
        try:
            engine = await self._engine(query)
            await socket.accept()
            recording = self._begin_record(query, session, persona, engine)
            comeback = None if taken is None else Comeback(taken, heard_from(query))
        except (*_LEFT, asyncio.CancelledError) as error:
            claim.give_up()
            self._left(session)
            if isinstance(error, asyncio.CancelledError):  # the socket's state does not tell: it changes late
                raise
            return
        except BaseException:  # a fault of ours
            claim.give_up()
            self._metrics.add(metrics.SESSIONS_REFUSED, cause=metrics.FAILED, protocol="chat")
            raise
        conversation: Conversation | None = None
        try:
            status = wants_status(query)
            conversation = Conversation(
                socket,
                session,
                self._services,
                status=status,
                recording=recording,
                transcribe=allows_transcription(query) and (status or recording is not None),
                resumable=status,
                comeback=comeback,
            )
            self._accounts.attach(session, conversation)
            await conversation.run(persona, claim)
        finally:
            claim.give_up()  # without effect where it is the conversation's
            self._ended(session, caller, conversation, recording)

    def _ended(
        self, session: str, caller: str, conversation: Conversation | None, recording: Recording | None
    ) -> None:
        error = SessionLost("it never began") if conversation is None else conversation.error
        if conversation is None:
            self._metrics.add(metrics.SESSIONS_REFUSED, cause=metrics.cause(error), protocol="chat")
        self._reconnects.ended(caller, error, time.monotonic())
        self._accounts.close(session, metrics.cause(error))
        now = time.monotonic()
        self._waits.left(session, now)
        if conversation is not None and conversation.talked_s > 0:
            self._waits.ended(conversation.talked_s, now)
        if recording is not None and self._records is not None:
            recording.over()
            finishing = asyncio.ensure_future(self._finish_record(self._records, recording, conversation))
            self._services.ending.add(finishing)
            finishing.add_done_callback(self._services.ending.discard)

    async def _finish_record(
        self, records: Records, recording: Recording, conversation: Conversation | None
    ) -> None:
        error = SessionLost("it never began") if conversation is None else conversation.error
        try:
            if conversation is not None:
                await conversation.last_words()
        finally:
            records.finish(recording, metrics.cause(error))

    def _begin_record(
        self, query: Mapping[str, str], session: str, persona: Persona, engine: Mapping[str, str]
    ) -> Recording | None:
        if self._records is None:
            return None
        return self._records.begin(session, persona, query, engine) if self._records.wanted(query) else None

    async def _engine(self, query: Mapping[str, str]) -> Mapping[str, str]:
        """What a record says of its engine. Who is not recorded waits for no answer of the fleet."""
        if self._records is None or not self._records.wanted(query):
            return {}
        return next((one.engine for one in await self._fleet.describe()), {})

    def _left(self, session: str, protocol: str = "chat") -> None:
        """A client that went before its session began."""
        self._metrics.add(metrics.SESSIONS_REFUSED, cause=metrics.LEFT, protocol=protocol)
        logger.info("session %s ended: its client left before it began", session)

    async def _refuse(
        self,
        socket: WebSocket,
        session: str,
        error: PersonaplexError,
        answer: Callable[[PersonaplexError], Response] = refusal,
        protocol: str = "chat",
    ) -> None:
        self._metrics.add(metrics.SESSIONS_REFUSED, cause=metrics.cause(error), protocol=protocol)
        logger.info("session %s refused: %s", session, metrics.cause(error))
        with contextlib.suppress(*_LEFT):
            await socket.send_denial_response(answer(error))

    async def no_socket(self, socket: WebSocket) -> None:
        with contextlib.suppress(*_LEFT):
            await socket.send_denial_response(PlainTextResponse("no WebSocket here\n", status_code=404))

    async def upgrade_required(self, request: Request) -> Response:
        headers = {"upgrade": "websocket", "connection": "upgrade"}
        return PlainTextResponse("this address speaks WebSocket\n", status_code=426, headers=headers)

    async def admission(self, request: Request) -> Response:
        """Why an upgrade failed, for a page to show: browsers hide its status from scripts."""
        try:
            with self._admit(request) as (persona, _, key):
                self._accounts.check(key)
                await self._voices.bring(persona, key)
                if self._open >= self._settings.sessions_per_gateway:
                    raise NoCapacity("this gateway holds as many sessions as it may")
                await self.check_room()
                if (taken := await self._take(request)) is not None:
                    taken.give_back()
        except PersonaplexError as error:
            return refusal(error)
        return Response(status_code=204, headers={"cache-control": "no-store"})

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
                "wait_s": await self._expected_wait(),
                "own_voices": self._voices.describe(),
                "record": self._settings.record,
                "transcription": self._settings.transcription,
            }
        )

    async def voices(self, request: Request) -> Response:
        replicas = await self._fleet.describe()
        return JSONResponse(voice_list({voice for replica in replicas for voice in replica.voices}))

    async def prompts(self, request: Request) -> Response:
        return JSONResponse(prompt_list())

    async def metrics(self, request: Request) -> Response:
        self._publish()
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def health(self, request: Request) -> Response:
        up = any(replica.accepting for replica in await self._fleet.describe())
        return JSONResponse(
            {"status": "ok" if up else "no replica", "proxy_limits": ingress.limited(request.scope)},
            status_code=200 if up else 503,
        )

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        self._open += 1
        self._empty.clear()
        self._publish()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._empty.set()
            self._publish()

    @contextlib.contextmanager
    def _admit(self, connection: HTTPConnection) -> Iterator[tuple[Persona, str, Key | None]]:
        """The persona asked for, the caller's name for Reconnects and its key, while the session is counted
        for its address. Raises what the client is to be told."""
        self._check_limit()
        query = read_query(connection.scope["query_string"], self._settings.query_limit_bytes)
        with self._access.enter(ClientInfo.of(connection, query)) as entrant:
            persona = persona_from(query)
            if self._records is not None:
                self._records.wanted(query)
            caller = f"{entrant.caller} {persona.voice} {hash(persona.text_prompt)}"
            self._reconnects.check(caller, time.monotonic())
            yield persona, caller, entrant.key

    def _check_limit(self) -> None:
        if self._open > self._settings.sessions_per_gateway:
            raise NoCapacity("this gateway holds as many sessions as it may")

    async def check_room(self) -> None:
        """Raises NoCapacity when a session would find neither a slot nor a place in the queue now."""
        if self._leases.queue_full and not any(
            one.accepting and one.used < one.slots for one in await self._fleet.describe()
        ):
            raise NoCapacity("every slot is taken and the queue is full")

    def _make_resumes(self) -> Resumes | None:
        if not self._settings.resume_grace_s:
            return None
        return Resumes(
            self._settings.resume_grace_s,
            lambda: self._link_keys.keyring.secrets,
            self._fleet.describe,
            self._reach,
        )

    async def _connect(self, grant: Grant, on_message: OnMessage, on_lost: OnLost) -> Link:
        return await self._reach(grant.replica, grant.host, grant.port, on_message, on_lost)

    async def _reach(
        self, replica: str, host: str, port: int, on_message: OnMessage, on_lost: OnLost
    ) -> Link:
        """A link to a replica, for a session or a question."""
        return await connect(
            host,
            port,
            on_message,
            on_lost,
            handshake=GatewayHandshake(await self._link_keys.known(), replica),
            outbox=self._settings.burst_frames,
            stall_s=self._settings.stall_limit_s,
            tls=self._tls,
        )

    async def _close(self) -> None:
        """Graceful shutdown: closes the queued sessions; replicas close those that hold a slot."""
        self._leases.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._empty.wait(), CLOSE_TIMEOUT_S)
        if self._services.transcripts is not None:
            self._services.transcripts.close()
        if self._records is not None:
            await self._records.close()

    def _wait(self, session: str, place: int) -> float | None:
        """What a session at `place` of this gateway's queue may be told of its wait, in seconds."""
        return self._waits.queued(session, self._place(place), self._slots, time.monotonic())

    def _place(self, place: int) -> int:
        """A place in this gateway's queue, among those of all gateways: they take turns."""
        return round(place * (1 + self._accounts.waiting_elsewhere / max(self._leases.queued, place)))

    async def _count_slots(self) -> None:
        """Keeps the number of slots that callers in the queue wait for, for ever."""
        while True:
            self._slots = sum(one.slots for one in await self._fleet.describe() if one.accepting)
            await asyncio.sleep(SLOTS_EVERY_S)

    async def _expected_wait(self) -> float | None:
        """What a caller would wait who came now, as far as it may be said."""
        replicas = await self._fleet.describe()
        if any(one.accepting and one.used < one.slots for one in replicas):
            return 0.0
        place = self._place(self._leases.queued + 1)
        found = self._waits.estimate(place, self._slots, time.monotonic())
        return round(found, 1) if found is not None and self._waits.honest else None

    def _keys_read(self, well: bool) -> None:
        self._metrics.add(metrics.KEYS_RELOADS, result="loaded" if well else "failed")

    def _publish(self) -> None:
        self._metrics.set(metrics.SESSIONS_OPEN, self._open)
        self._metrics.set(metrics.SESSIONS_LIVE, len(self._services.live))
        self._metrics.set(metrics.SESSIONS_QUEUED, self._leases.queued)
        self._metrics.set(metrics.CALLERS, self._access.counted)
        self._metrics.set(metrics.TASKS, len(asyncio.all_tasks()))

    async def _keep(self, session: str, log: TokenLog) -> None:
        folder = self._settings.token_log_dir
        if folder is None or not len(log):
            return
        try:
            await asyncio.to_thread(folder.mkdir, mode=0o700, parents=True, exist_ok=True)
            # Packing an hour takes a quarter of a second: three frames of every other session.
            await asyncio.to_thread(log.save, folder / f"{session}.npz")
        except OSError:
            logger.exception("the tokens of session %s could not be saved", session)


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
