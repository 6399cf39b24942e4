"""The addresses of OpenAI's two protocols: the upgrades, their refusals, and client secrets.

    /v1/live/sessions            WebSocket; POST (WebRTC) is not offered
    /v1/realtime                 WebSocket, GA and beta
    /v1/realtime/client_secrets  POST: a key for a browser that dies by itself and carries a configuration
    /v1/realtime/calls           POST (WebRTC): not offered

A refusal is an HTTP status before the upgrade with OpenAI's JSON of an error, so that clients that connect
again at every close do not loop. A client that says only later which session it wants is let in when there
is room, and asks for its slot once it has said so.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from deployments.gateway.keys import Key
from deployments.gateway.protocols import openai_events, realtime_dialect
from deployments.gateway.protocols.live import LiveTranslator
from deployments.gateway.protocols.openai_events import Refused, number_of, object_of, text_of
from deployments.gateway.protocols.realtime import RealtimeOptions, RealtimeTranslator
from deployments.gateway.protocols.realtime_dialect import Dialect, dialect_of, key_among
from deployments.gateway.protocols.realtime_session import Configuration
from deployments.gateway.protocols.tickets import Tickets
from deployments.gateway.protocols.translator import Translator
from deployments.gateway.query import read_query
from deployments.parts import GatewaySettings
from personaplex.errors import (
    BadParameter,
    NoCapacity,
    PersonaplexError,
    SessionLost,
    TooManySessions,
    Unauthorized,
)
from personaplex.persona import Persona

SECRET_PREFIX = "ek_"
SECRET_SECONDS = (10, 7_200)
SECRET_DEFAULT_S = 600
SESSION_BYTES = 16_384  # of a client secret's session

Make = Callable[[str, Persona], Translator]  # a session's name and the persona of its query
Admit = Callable[[HTTPConnection], contextlib.AbstractContextManager[tuple[Persona, str, Key | None]]]


class Host(Protocol):
    """What the gateway does for every protocol."""

    def admitted(self, connection: HTTPConnection) -> contextlib.AbstractContextManager[Any]:
        """Checks key, origin and limits; raises what the client is to be told."""
        ...

    def talk(
        self,
        socket: WebSocket,
        protocol: str,
        make: Make,
        refuse: Callable[[PersonaplexError], Response],
        *,
        connection: HTTPConnection | None = None,
        admit: Admit | None = None,
        subprotocol: str | None = None,
    ) -> Awaitable[None]:
        """A whole session of a client that says later what it wants. `connection` is what access is decided
        by, if not the socket's own; `admit` decides, if not keys and limits."""
        ...

    async def check_room(self) -> None:
        """Raises NoCapacity when a session would find neither a slot nor a place in the queue now."""
        ...


class OpenAIEndpoints:
    """Made with its gateway."""

    def __init__(self, host: Host, settings: GatewaySettings, secrets: Callable[[], Sequence[bytes]]) -> None:
        """`secrets`: the application's, newest first."""
        self._host, self._settings, self._secrets = host, settings, secrets
        self._options = RealtimeOptions(
            voices=settings.voice_aliases,
            speech_dbfs=settings.speech_dbfs,
            pause_s=settings.pause_s,
            barge_in=settings.barge_in,
            transcribes=settings.transcription == "on",
        )

    def routes(self) -> list[BaseRoute]:
        routes: list[BaseRoute] = []
        if "live" in self._settings.protocols:
            path = "/v1/live/sessions"
            routes += [WebSocketRoute(path, self.live), Route(path, self.no_webrtc, methods=["POST"])]
        if "realtime" in self._settings.protocols:
            routes += [
                WebSocketRoute("/v1/realtime", self.realtime),
                Route("/v1/realtime/client_secrets", self.client_secrets, methods=["POST"]),
                Route("/v1/realtime/calls", self.no_webrtc, methods=["POST"]),
            ]
        return routes

    async def live(self, socket: WebSocket) -> None:
        def make(session: str, persona: Persona) -> Translator:
            return LiveTranslator(
                session,
                persona,
                voices=self._settings.voice_aliases,
                expires_at=self._expires_at(),
                clock=time.monotonic,
                burst_s=self._settings.burst_s,
            )

        await self._host.talk(socket, LiveTranslator.name, make, refusal)

    async def realtime(self, socket: WebSocket) -> None:
        offered = list(socket.scope.get("subprotocols", ()))
        dialect = dialect_of(_lower(socket.headers), offered)
        subprotocol = realtime_dialect.SUBPROTOCOL if realtime_dialect.SUBPROTOCOL in offered else None
        secret_session: dict[str, Any] = {}
        connection: HTTPConnection = socket
        try:
            shown = key_among(offered) or _bearer(socket.headers)
            if shown.startswith(SECRET_PREFIX):
                _, content = self._tickets().read(shown.removeprefix(SECRET_PREFIX), time.time())
                shown, secret_session = content["key"], content["session"]
            connection = _with_key(socket, shown)
        except PersonaplexError as error:
            await self._host.talk(socket, RealtimeTranslator.name, _raising(error), refusal)
            return

        def make(session: str, persona: Persona) -> Translator:
            query = read_query(socket.scope["query_string"], self._settings.query_limit_bytes)
            translator = RealtimeTranslator(
                session,
                persona,
                dialect,
                self._options,
                model=query.get("model", ""),
                expires_at=self._expires_at(),
                clock=time.monotonic,
                burst_s=self._settings.burst_s,
            )
            try:
                translator.configure(secret_session)
            except Refused as error:  # it was good when it was made; a voice's name may be gone
                raise BadParameter(error.message) from error
            return translator

        name = RealtimeTranslator.name
        await self._host.talk(socket, name, make, refusal, connection=connection, subprotocol=subprotocol)

    async def client_secrets(self, request: Request) -> Response:
        now = int(time.time())
        try:
            with self._host.admitted(request):
                wanted = await _read_json(request)
                seconds, session = _read_secret(wanted)
                base = Configuration(
                    Persona(), voice_name=Persona().voice, transcribes=self._options.transcribes
                )
                configuration = base.updated(session, Dialect.GA, self._settings.voice_aliases)
                content = {"key": _bearer(request.headers) or _api_key(request.headers), "session": session}
                value = SECRET_PREFIX + self._tickets().make(content, now + seconds)
        except PersonaplexError as error:
            return refusal(error)
        except Refused as error:
            return _bad_request(error)
        shown = configuration.shown(Dialect.GA, f"sess_{uuid.uuid4().hex}", now + seconds)
        headers = {"cache-control": "no-store"}
        return JSONResponse({"value": value, "expires_at": now + seconds, "session": shown}, headers=headers)

    async def no_webrtc(self, request: Request) -> Response:
        words = "WebRTC is not offered here: connect by WebSocket"
        error = {"type": openai_events.INVALID, "code": "not_found", "message": words, "param": None}
        return JSONResponse({"error": error}, status_code=404)

    def _tickets(self) -> Tickets:
        """Raises SessionLost while the application's secret is not known yet."""
        known = self._secrets()
        if not known:
            raise SessionLost("the service is starting; please try again")
        return Tickets("client secret", known)

    def _expires_at(self) -> int:
        return int(time.time() + self._settings.session_limit_s)


def refusal(error: PersonaplexError) -> JSONResponse:
    """The answer to a request that is refused: the error's status, OpenAI's JSON, and when to come back."""
    headers = {"cache-control": "no-store"}
    if isinstance(error, (NoCapacity, TooManySessions)):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    body = {"error": openai_events.describe(error, str(error))}
    return JSONResponse(body, status_code=error.http_status, headers=headers)


def _bad_request(error: Refused) -> JSONResponse:
    told = {"type": openai_events.INVALID, "code": error.code, "message": error.message, "param": error.param}
    return JSONResponse({"error": told}, status_code=400)


async def _read_json(request: Request) -> Mapping[str, Any]:
    """The body as an object; an empty one counts as {}. The proxy bounds its length."""
    body = await request.body()
    try:
        value = json.loads(body) if body else {}
    except (ValueError, RecursionError) as error:
        raise BadParameter("the body is no JSON that can be read") from error
    return object_of(value, "body")


def _read_secret(wanted: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    after = object_of(wanted.get("expires_after"), "expires_after")
    seconds = number_of(after.get("seconds", SECRET_DEFAULT_S), "expires_after.seconds", *SECRET_SECONDS)
    session = dict(object_of(wanted.get("session"), "session"))
    text = text_of(json.dumps(session, ensure_ascii=True), "session")
    if len(text) > SESSION_BYTES:
        raise Refused("session_too_long", f"a session has at most {SESSION_BYTES} bytes", "session")
    return int(seconds), session


def _raising(error: PersonaplexError) -> Make:
    def make(session: str, persona: Persona) -> Translator:
        raise error

    return make


def _bearer(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _api_key(headers: Headers) -> str:
    return headers.get("x-api-key", "")


def _lower(headers: Headers) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _with_key(socket: WebSocket, key: str) -> HTTPConnection:
    """The same request with `key` as its bearer token."""
    if not key:
        return socket
    kept = [header for header in socket.scope["headers"] if header[0].lower() != b"authorization"]
    told = (b"authorization", f"Bearer {key}".encode("latin-1", "replace"))
    return HTTPConnection({**socket.scope, "headers": [*kept, told]})
