"""The sessions of one gateway's clients from their upgrade to their end: who is let in, what is left of them.

An upgrade is accepted only once the session has a slot or a place in the queue; until then a refusal is an
HTTP status (`admission.refusal`). A client that says only after the upgrade what it wants is let in when
there is room. Later errors are an error message and a close code.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from deployments import metrics
from deployments.gateway.accounts import Accounts
from deployments.gateway.admission import AccessControl, ClientInfo, refusal
from deployments.gateway.conversation import Comeback, Conversation
from deployments.gateway.keys import Key
from deployments.gateway.leases import Claim
from deployments.gateway.observer import Observer
from deployments.gateway.openai import Admit
from deployments.gateway.ownvoices import OwnVoices
from deployments.gateway.protocols.translator import Translator
from deployments.gateway.query import (
    allows_transcription,
    heard_from,
    persona_from,
    read_from,
    read_query,
    wants_status,
)
from deployments.gateway.reconnects import Reconnects
from deployments.gateway.recorder import Recording
from deployments.gateway.records import Records
from deployments.gateway.resumes import Taken
from deployments.gateway.room import Room
from deployments.gateway.services import Services
from deployments.gateway.telephone import TICKET_S
from deployments.gateway.waits import Waits
from deployments.wire.messages import LeaseRequest
from personaplex.errors import PersonaplexError, ResumeRefused, SessionLost, Unauthorized
from personaplex.persona import Persona

logger = logging.getLogger(__name__)

_LEFT = (RuntimeError, OSError, WebSocketDisconnect)  # what a socket raises whose client has gone


class SessionHost:
    """One gateway's."""

    def __init__(
        self,
        services: Services,
        *,
        fleet: Observer,
        access: AccessControl,
        accounts: Accounts,
        room: Room,
        waits: Waits,
        voices: OwnVoices,
        records: Records | None,
        query_limit: int,
    ) -> None:
        """`query_limit`: bytes. `records`: None where nobody is recorded."""
        self._services, self._fleet, self._access, self._accounts = services, fleet, access, accounts
        self._room, self._waits, self._voices, self._records = room, waits, voices, records
        self._query_limit = query_limit
        self._metrics = services.metrics
        self._reconnects = Reconnects()

    def routes(self) -> list[BaseRoute]:
        return [
            WebSocketRoute("/api/chat", self.chat),
            Route("/api/chat", self.upgrade_required),
            Route("/api/admission", self.admission),
        ]

    async def chat(self, socket: WebSocket) -> None:
        session = uuid.uuid4().hex
        async with contextlib.AsyncExitStack() as counted:
            counted.enter_context(self._room.counting())
            taken: Taken | None = None
            try:
                self._free_former(socket)
                persona, caller, key = counted.enter_context(self._admit(socket))
                taken = await self._take(socket)
                if taken is not None:
                    session, persona = taken.session, taken.log.persona
                    counted.callback(taken.give_back)
                await counted.enter_async_context(self._accounts.enter(session, key))
                if taken is None:
                    persona = await self._voices.bring(persona, key)
                claim = await self._services.leases.claim(LeaseRequest.of(session, persona))
            except PersonaplexError as error:
                await self._refuse(socket, session, error)
            except asyncio.CancelledError:
                self._left(session)
                raise
            else:
                await self._converse(socket, session, persona, caller, claim, taken)

    def _free_former(self, connection: HTTPConnection) -> None:
        """A connection that a client has left, though it still looks open, is not to be what refuses it: by
        the number of sessions of its address or of this gateway."""
        query = read_query(connection.scope["query_string"], self._query_limit)
        if (token := query.get("resume")) is not None and self._services.resumes is not None:
            self._access.identify(ClientInfo.of(connection, query))
            self._services.resumes.free(token)

    async def _take(self, connection: HTTPConnection) -> Taken | None:
        """The session that the client comes back to, None for a new one. Raises ResumeRefused."""
        query = read_query(connection.scope["query_string"], self._query_limit)
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
            counted.enter_context(self._room.counting())
            try:
                persona, caller, key = counted.enter_context((admit or self._admit)(connection or socket))
                self._room.check_limit()
                await counted.enter_async_context(self._accounts.enter(session, key))
                await self._room.check()
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
        query = read_query(socket.scope["query_string"], self._query_limit)
        recording: Recording | None = None

        async def begin(persona: Persona, ticket: str) -> tuple[Persona, Claim]:
            nonlocal recording
            if ticket and not await self._fleet.spend(ticket, TICKET_S):
                raise Unauthorized("this call's ticket was used before")
            persona = await self._voices.bring(persona, key)
            engine = await self._engine(query)
            if conversation.over:  # before Python 3.12 asyncio.wait_for may swallow that we are cancelled
                raise SessionLost("the session ended before it began")
            recording = self._begin_record(query, session, persona, engine)
            if recording is not None:
                conversation.record(recording)
            return persona, await self._services.leases.claim(LeaseRequest.of(session, persona))

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
        query = read_query(socket.scope["query_string"], self._query_limit)
        try:
            engine = await self._engine(query)
            await socket.accept()
            recording = self._begin_record(query, session, persona, engine)
            comeback = None if taken is None else Comeback(taken, heard_from(query), read_from(query))
        except (*_LEFT, asyncio.CancelledError) as error:
            claim.give_up()
            self._left(session)
            if isinstance(error, asyncio.CancelledError):  # the socket's state does not tell: it changes late
                raise
            return
        except BaseException:  # a fault of ours
            claim.give_up()
            self._waits.left(session, time.monotonic())
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
        self._waits.left(session, time.monotonic())
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
        self._waits.left(session, time.monotonic())
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

    async def upgrade_required(self, request: Request) -> Response:
        headers = {"upgrade": "websocket", "connection": "upgrade"}
        return PlainTextResponse("this address speaks WebSocket\n", status_code=426, headers=headers)

    async def admission(self, request: Request) -> Response:
        """Why an upgrade failed, for a page to show: browsers hide its status from scripts."""
        try:
            with self._admit(request) as (persona, _, key):
                self._accounts.check(key)
                await self._voices.bring(persona, key)
                self._room.check_limit(further=1)
                await self._room.check()
                if (taken := await self._take(request)) is not None:
                    taken.give_back()
        except PersonaplexError as error:
            return refusal(error)
        return Response(status_code=204, headers={"cache-control": "no-store"})

    async def check_room(self) -> None:
        """Raises NoCapacity when a session would find neither a slot nor a place in the queue now."""
        await self._room.check()

    @contextlib.contextmanager
    def _admit(self, connection: HTTPConnection) -> Iterator[tuple[Persona, str, Key | None]]:
        """The persona asked for, the caller's name for Reconnects and its key, while the session is counted
        for its address. Raises what the client is to be told."""
        self._room.check_limit()
        query = read_query(connection.scope["query_string"], self._query_limit)
        with self._access.enter(ClientInfo.of(connection, query)) as entrant:
            persona = persona_from(query)
            if self._records is not None:
                self._records.wanted(query)
            caller = f"{entrant.caller} {persona.voice} {hash(persona.text_prompt)}"
            self._reconnects.check(caller, time.monotonic())
            yield persona, caller, entrant.key
