"""The routes of docs/access.md: what a key may do, own voices, and the length of a role text."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from deployments.gateway.accounts import Accounts
from deployments.gateway.admission import AccessControl, ClientInfo, Entrant
from deployments.gateway.answers import PRIVATE, Refused, answering, read_body
from deployments.gateway.asking import Asking
from deployments.gateway.ownvoices import OwnVoices
from deployments.gateway.query import read_query
from deployments.gateway.recording import UPLOAD_LIMIT
from personaplex.errors import BadParameter
from personaplex.persona import own_digest, voice_name


class AccessRoutes:
    """One gateway's."""

    def __init__(
        self,
        access: AccessControl,
        accounts: Accounts,
        voices: OwnVoices,
        asking: Asking,
        *,
        query_limit: int,
    ) -> None:
        self._access, self._accounts, self._voices, self._asking = access, accounts, voices, asking
        self._query_limit = query_limit

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/api/key", answering(self._key)),
            Route("/api/tokens", answering(self._tokens), methods=["POST"]),
            Route("/api/voices", answering(self._upload), methods=["POST"]),
            Route("/api/voices/{voice}", answering(self._forget), methods=["DELETE"]),
        ]

    def _identify(self, request: Request) -> tuple[Entrant, dict[str, str]]:
        query = read_query(request.scope["query_string"], self._query_limit)
        return self._access.identify(ClientInfo.of(request, query)), query

    async def _key(self, request: Request) -> Response:
        key = self._identify(request)[0].key
        if key is None:
            raise Refused(404, "no key is needed here")
        shown = {**self._accounts.describe(key), "own_voices": self._voices.allowed(key)}
        return JSONResponse(shown, headers=PRIVATE)

    async def _tokens(self, request: Request) -> Response:
        self._identify(request)
        text = _text_prompt(await read_body(request, self._query_limit))
        tokens, limit = await self._asking.count_tokens(text)
        return JSONResponse({"tokens": tokens, "limit": limit, "left": limit - tokens}, headers=PRIVATE)

    async def _upload(self, request: Request) -> Response:
        entrant, query = self._identify(request)
        if query.get("consent") != "1":
            raise BadParameter("consent=1 must say that the speaker agreed to the use of their voice")
        kind = request.headers.get("content-type", "")
        if kind.startswith(("multipart/", "application/x-www-form-urlencoded")):
            raise Refused(415, "send the recording itself as the body, not a form")
        if request.headers.get("content-encoding", "identity") != "identity":
            raise Refused(415, "send the recording as it is, without a Content-Encoding")
        self._voices.check(entrant.key, entrant.caller)
        data = await read_body(request, UPLOAD_LIMIT)
        if not data:
            raise BadParameter("the body is empty: send the recording as the body")
        return JSONResponse(await self._voices.make(data, entrant.key), headers=PRIVATE)

    async def _forget(self, request: Request) -> Response:
        entrant, _ = self._identify(request)
        digest = own_digest(voice_name(request.path_params["voice"]))
        if not digest:
            raise BadParameter("only an own voice can be forgotten")
        await self._voices.forget(digest, entrant.key)
        return Response(status_code=204, headers=PRIVATE)


def _text_prompt(body: bytes) -> str:
    """The role text in the body of a request. Raises BadParameter."""
    wrong = BadParameter('the body must be JSON of the form {"text_prompt": "..."}')
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise wrong from error
    if not isinstance(fields, dict) or set(fields) != {"text_prompt"}:
        raise wrong
    text = fields["text_prompt"]
    if not isinstance(text, str):
        raise wrong
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise wrong from error
    return text
