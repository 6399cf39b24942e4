"""What a gateway's HTTP routes share: errors as answers, and bodies within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

from deployments.gateway.admission import refusal
from personaplex.errors import PersonaplexError

BODY_TIMEOUT_S = 30.0  # for a whole recording
PRIVATE = {"cache-control": "no-store"}

Handler = Callable[[Request], Awaitable[Response]]


class Refused(Exception):
    """An answer that is no error of the project's tree."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.answer = PlainTextResponse(words + "\n", status, {**PRIVATE, "connection": "close"})


def answering(handler: Handler) -> Handler:
    """`handler` with its errors as answers."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except PersonaplexError as error:
            return refusal(error)
        except Refused as refused:
            return refused.answer
        except ClientDisconnect:
            return Response(status_code=400)

    return answer


async def read_body(request: Request, limit: int) -> bytes:
    """All of a request's body, of at most `limit` bytes. Raises Refused, ClientDisconnect."""
    too_large = Refused(413, f"the body has more than {limit:,} bytes")
    said = request.headers.get("content-length", "0")
    if said.isdecimal() and int(said) > limit:
        raise too_large

    async def read() -> bytes:
        found = bytearray()
        async for piece in request.stream():
            found += piece
            if len(found) > limit:
                raise too_large
        return bytes(found)

    try:
        return await asyncio.wait_for(read(), BODY_TIMEOUT_S)
    except asyncio.TimeoutError as error:
        raise Refused(408, "the request did not come whole") from error
