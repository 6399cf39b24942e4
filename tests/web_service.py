"""The web page on a service of its own: static files, the small JSON pages and an echo on /api/chat.

    python tests/web_service.py [--port 8998]

serves it for a look by hand.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
from echo_service import echo
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.exceptions import ConnectionClosed, ConnectionClosedOK

from deployments.gateway.headers import SecurityHeaders
from deployments.gateway.info import prompt_list, voice_list
from deployments.settings import Settings
from personaplex.persona import VOICES

PAGE = Path(__file__).parent.parent / "deployments" / "gateway" / "web"
INFO = {
    "version": "0.1.0",
    "model": "7b",
    "replicas": 1,
    "slots": 4,
    "used": 1,
    "queued": 0,
    "session_limit_s": 1_800.0,
    "key_needed": False,
    "record": "off",
}
OWN_VOICE = "own:9f86d081884c7d65"


class Socket:
    """A Starlette WebSocket with the methods that `echo_service.echo` uses; `left` is the close code of
    the client."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket
        self.query = dict(socket.query_params)
        self.left: int | None = None

    async def send(self, data: bytes) -> None:
        try:
            await self._socket.send_bytes(data)
        except (WebSocketDisconnect, RuntimeError) as error:
            raise ConnectionClosedOK(None, None) from error

    async def recv(self) -> bytes | str:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            self.left = message["code"]
            raise ConnectionClosedOK(None, None)
        data: bytes | str | None = message.get("bytes")
        return message["text"] if data is None else data

    async def close(self, code: int = 1000, reason: str = "") -> None:
        await self._socket.close(code, reason)


class WebService:
    """Serves the page on a free port; `chats` are the queries of the conversations there were, `uploads` the
    recordings that were sent as voices, `seen` the paths that were asked for."""

    def __init__(
        self,
        chat: Callable[[Any], Awaitable[None]] = echo,
        *,
        info: dict[str, Any] = INFO,
        refusal: str = "",
        status: int = 503,
        port: int = 0,
        voices: tuple[str, ...] = VOICES,
    ) -> None:
        """With a `refusal` every upgrade is refused in these words, with `status`."""
        self.chats: list[dict[str, str]] = []
        self.uploads: list[bytes] = []
        self.forgotten: list[str] = []
        self.seen: list[str] = []
        self.chat, self.info, self.refusal, self.status = chat, info, refusal, status
        self._voices = voices
        self._listener = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        routes = [
            WebSocketRoute("/api/chat", self._serve_chat),
            Route("/api/admission", self._serve_admission),
            Route("/api/info", self._serve_info),
            Route("/api/voices", self._serve_voices),
            Route("/api/voices", self._take_voice, methods=["POST"]),
            Route("/api/voices/{voice}", self._forget_voice, methods=["DELETE"]),
            Route("/api/prompts", self._serve_prompts),
            Route("/api/tokens", self._count_tokens, methods=["POST"]),
            Mount("/vendor", StaticFiles(directory=PAGE / "vendor")),
            Mount("/", GZipMiddleware(StaticFiles(directory=PAGE, html=True), compresslevel=6)),
        ]
        policy = Settings.model_fields["content_security_policy"].default
        headers = Middleware(SecurityHeaders, policy=policy, hsts_s=0)
        application = Starlette(routes=routes, middleware=[headers])
        config = uvicorn.Config(application, log_level="warning", ws="websockets-sansio")
        self._server = uvicorn.Server(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    def __enter__(self) -> WebService:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def call(self, function: Callable[[], object]) -> None:
        """Calls `function` in the service's own thread."""
        assert self._loop is not None, "use it in a with block"
        self._loop.call_soon_threadsafe(function)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve([self._listener])

    async def _serve_chat(self, socket: WebSocket) -> None:
        self.chats.append(dict(socket.query_params))
        if self.refusal:
            await socket.send_denial_response(PlainTextResponse(self.refusal, status_code=self.status))
            return
        await socket.accept()
        with contextlib.suppress(ConnectionClosed):
            await self.chat(Socket(socket))

    async def _serve_admission(self, request: Request) -> Response:
        if self.refusal:
            return PlainTextResponse(self.refusal, status_code=self.status)
        return Response(status_code=204)

    async def _serve_info(self, request: Request) -> Response:
        self.seen.append(request.url.path)
        return JSONResponse(self.info)

    async def _serve_voices(self, request: Request) -> Response:
        return JSONResponse(voice_list(self._voices))

    async def _take_voice(self, request: Request) -> Response:
        if request.query_params.get("consent") != "1":
            return PlainTextResponse("consent=1 is missing", status_code=400)
        self.uploads.append(await request.body())
        problems = [{"kind": "short", "text": "it is short"}]
        answer = {"voice": OWN_VOICE, "seconds": 2.0, "loudness": -27.3, "expires_s": 3600}
        return JSONResponse({**answer, "problems": problems})

    async def _forget_voice(self, request: Request) -> Response:
        self.forgotten.append(request.path_params["voice"])
        return Response(status_code=204)

    async def _serve_prompts(self, request: Request) -> Response:
        return JSONResponse(prompt_list())

    async def _count_tokens(self, request: Request) -> Response:
        tokens = len((await request.json())["text_prompt"].split())
        return JSONResponse({"tokens": tokens, "limit": 1_000, "left": 1_000 - tokens})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8998)
    with WebService(port=parser.parse_args().port) as service:
        print(service.url)  # noqa: T201
        threading.Event().wait()


if __name__ == "__main__":
    main()
