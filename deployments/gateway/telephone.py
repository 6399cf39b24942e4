"""The addresses of the telephone: Twilio's webhook and media stream, Telnyx's, Asterisk's.

    /twilio/voice    POST, the webhook of a number: answers TwiML that connects the call to the stream
    /twilio/media    WebSocket: a call
    /telnyx/media    WebSocket: a call
    /asterisk/media  WebSocket: a call

Twilio shows no key. Its webhook and its upgrade are signed; the webhook's query says who the agent is, and
goes with a ticket that is good for one call within TICKET_S to the stream and back. Telnyx and Asterisk show
a key and say in the query who the agent is, as clients of /api/chat do.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping
from urllib.parse import parse_qsl, urlsplit

from starlette.requests import HTTPConnection, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from deployments.gateway.admission import refusal
from deployments.gateway.keys import Key
from deployments.gateway.openai import Host
from deployments.gateway.protocols import twilio
from deployments.gateway.protocols.asterisk import SUBPROTOCOL, AsteriskTranslator
from deployments.gateway.protocols.carriers import TELNYX, TWILIO, CarrierTranslator
from deployments.gateway.protocols.tickets import Tickets
from deployments.gateway.protocols.translator import Begin, Translator
from deployments.gateway.query import persona_from, read_query
from deployments.parts import GatewaySettings
from personaplex.errors import BadParameter, NoCapacity, PersonaplexError, Unauthorized
from personaplex.files import key_lines
from personaplex.persona import Persona

TICKET_S = 60.0  # from the webhook to the start of the stream
FORM_LIMIT = 64  # fields of a webhook


class TelephoneEndpoints:
    """Made with its gateway. Raises ConfigError for a token file that cannot be read."""

    def __init__(self, host: Host, settings: GatewaySettings) -> None:
        self._host, self._settings = host, settings
        if "twilio" in settings.protocols:
            assert settings.twilio_token_file is not None
            self._signatures = twilio.Signatures(key_lines(settings.twilio_token_file))
            secrets = [secret.encode() for secret in self._signatures.secrets]
            self._tickets = Tickets("telephone call", secrets)

    def routes(self) -> list[BaseRoute]:
        routes: list[BaseRoute] = []
        if "twilio" in self._settings.protocols:
            routes += [
                Route("/twilio/voice", self.twilio_voice, methods=["POST"]),
                WebSocketRoute("/twilio/media", self.twilio_media),
            ]
        if "telnyx" in self._settings.protocols:
            routes.append(WebSocketRoute("/telnyx/media", self.telnyx_media))
        if "asterisk" in self._settings.protocols:
            routes.append(WebSocketRoute("/asterisk/media", self.asterisk_media))
        return routes

    async def twilio_voice(self, request: Request) -> Response:
        try:
            form = _form(await request.body())
            query = read_query(request.scope["query_string"], self._settings.query_limit_bytes)
            self._check(request, self._url(request), form)
            persona_from(query)  # raises what the operator has to mend
            ticket = self._tickets.make(query, time.time() + TICKET_S)
            await self._host.check_room()
        except NoCapacity:
            return _twiml(twilio.busy())
        except PersonaplexError as error:
            return refusal(error)
        except ValueError:
            return refusal(BadParameter("the query is too long"))
        path = request.url.path.removesuffix("/voice") + "/media"
        url = urlsplit(self._settings.public_url)._replace(scheme="wss", path=path).geturl()
        return _twiml(twilio.connect_stream(url, ticket))

    async def twilio_media(self, socket: WebSocket) -> None:
        @contextlib.contextmanager
        def admit(connection: HTTPConnection) -> Iterator[tuple[Persona, str, Key | None]]:
            self._check(connection, self._url(connection), ())
            yield Persona(), uuid.uuid4().hex, None  # no caller that could come back too soon

        def begin(parameters: Mapping[str, str]) -> Begin:
            nonce, query = self._tickets.read(twilio.ticket_of(parameters), time.time())
            return Begin(persona_from(query), ticket=nonce)

        def make(session: str, persona: Persona) -> Translator:
            return CarrierTranslator(TWILIO, begin, clock=time.monotonic, burst_s=self._settings.burst_s)

        await self._host.talk(socket, TWILIO.name, make, refusal, admit=admit)

    async def telnyx_media(self, socket: WebSocket) -> None:
        def make(session: str, persona: Persona) -> Translator:
            return CarrierTranslator(
                TELNYX,
                lambda parameters: Begin(persona),
                clock=time.monotonic,
                burst_s=self._settings.burst_s,
            )

        await self._host.talk(socket, TELNYX.name, make, refusal)

    async def asterisk_media(self, socket: WebSocket) -> None:
        def make(session: str, persona: Persona) -> Translator:
            return AsteriskTranslator(persona, clock=time.monotonic, burst_s=self._settings.burst_s)

        offered = socket.scope.get("subprotocols", ())
        subprotocol = SUBPROTOCOL if SUBPROTOCOL in offered else None
        await self._host.talk(socket, AsteriskTranslator.name, make, refusal, subprotocol=subprotocol)

    def _url(self, connection: HTTPConnection) -> str:
        """As Twilio sees it: the public address, whatever proxies are between."""
        query = connection.scope["query_string"].decode("latin-1")
        return self._settings.public_url + connection.url.path + (f"?{query}" if query else "")

    def _check(self, connection: HTTPConnection, url: str, form: tuple[tuple[str, str], ...]) -> None:
        """Raises Unauthorized for a request without Twilio's signature."""
        urls = [url]
        if connection.scope["type"] == "websocket":
            socket_url = urlsplit(url)._replace(scheme="wss").geturl()
            urls += [socket_url, socket_url + "/", url + "/"]
        headers = {name.lower(): value for name, value in connection.headers.items()}
        if not self._signatures.match(headers, urls, form):
            raise Unauthorized("the request has no signature of Twilio's")


def _form(body: bytes) -> tuple[tuple[str, str], ...]:
    """Names and values. Raises BadParameter for what is no form."""
    try:
        pairs = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=FORM_LIMIT
        )
    except ValueError as error:  # UnicodeDecodeError is one
        raise BadParameter("the form cannot be read") from error
    return tuple(pairs)


def _twiml(text: str) -> Response:
    return PlainTextResponse(text, media_type="text/xml", headers={"cache-control": "no-store"})
