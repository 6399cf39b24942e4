"""The web page on a service of its own: static files, the small JSON pages and an echo on /api/chat.

    python tests/web_service.py [--port 8998]

serves it for a look by hand.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
from echo_service import echo
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect
from websockets.exceptions import ConnectionClosedOK

from deployments.gateway.info import prompt_list, voice_list
from personaplex.persona import VOICES

PAGE = Path(__file__).parent.parent / "deployments" / "gateway" / "web"
INFO = {"model": "echo", "slots": 4, "used": 1, "key_needed": False}


class Socket:
    """A Starlette WebSocket with the methods that `echo_service.echo` uses."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def send(self, data: bytes) -> None:
        try:
            await self._socket.send_bytes(data)
        except WebSocketDisconnect as error:
            raise ConnectionClosedOK(None, None) from error

    async def recv(self) -> bytes | str:
        message = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            raise ConnectionClosedOK(None, None)
        data: bytes | str | None = message.get("bytes")
        return message["text"] if data is None else data

    async def close(self, code: int = 1000, reason: str = "") -> None:
        await self._socket.close(code, reason)


class WebService:
    """Serves the page on a free port; `chats` are the queries of the conversations there were."""

    def __init__(
        self,
        chat: Callable[[Any], Awaitable[None]] = echo,
        *,
        info: dict[str, Any] = INFO,
        refusal: str = "",
        port: int = 0,
    ) -> None:
        """With a `refusal` every upgrade is refused in these words."""
        self.chats: list[dict[str, str]] = []
        self._chat, self._info, self._refusal = chat, info, refusal
        self._listener = socket.create_server(("127.0.0.1", port))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        routes = [
            WebSocketRoute("/api/chat", self._serve_chat),
            Route("/api/admission", self._serve_admission),
            Route("/api/info", self._serve_info),
            Route("/api/voices", self._serve_voices),
            Route("/api/prompts", self._serve_prompts),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ]
        config = uvicorn.Config(Starlette(routes=routes), log_level="warning", ws="websockets-sansio")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([self._listener])))

    def __enter__(self) -> WebService:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    async def _serve_chat(self, socket: WebSocket) -> None:
        self.chats.append(dict(socket.query_params))
        if self._refusal:
            await socket.send_denial_response(PlainTextResponse(self._refusal, status_code=503))
            return
        await socket.accept()
        await self._chat(Socket(socket))

    async def _serve_admission(self, request: Request) -> Response:
        return (
            PlainTextResponse(self._refusal, status_code=503) if self._refusal else Response(status_code=204)
        )

    async def _serve_info(self, request: Request) -> Response:
        return JSONResponse(self._info)

    async def _serve_voices(self, request: Request) -> Response:
        return JSONResponse(voice_list(VOICES))

    async def _serve_prompts(self, request: Request) -> Response:
        return JSONResponse(prompt_list())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8998)
    with WebService(port=parser.parse_args().port) as service:
        print(service.url)  # noqa: T201
        threading.Event().wait()


if __name__ == "__main__":
    main()
