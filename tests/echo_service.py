"""A service for client tests: the real session core and transcoder around an echo, on a real socket.

`EchoService` runs in a thread of its own until the `with` block ends; with another `handler` it behaves as
another server does.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import threading
import time
from collections.abc import Awaitable, Callable
from types import TracebackType

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from personaplex.audio.transcoder import Transcoder
from personaplex.errors import PersonaplexError
from personaplex.session.core import CLOSED, HANDSHAKE_DELAY_S, LIVE, Limits, SessionCore
from personaplex.session.events import (
    AgentAudio,
    AgentText,
    AudioHeard,
    Close,
    Event,
    Failed,
    FeedAudio,
    LeaseGranted,
    PeerClosed,
    Queued,
    Ready,
    Tick,
)
from personaplex.session.moshi import bytes_of, close_reason, event_of, event_of_text

Handler = Callable[[ServerConnection], Awaitable[None]]
LIMITS = Limits(session_s=60.0, idle_s=math.inf)


async def echo(
    socket: ServerConnection,
    limits: Limits = LIMITS,
    *,
    status: bool = True,
    frames_before: int = 0,
    handshake_delay_s: float = HANDSHAKE_DELAY_S,
    after: Callable[[int], Event | None] = lambda frame: None,
    **details: object,
) -> None:
    """Says back what it hears and one word per frame, as a gateway would: queued, then live.

    `status`: whether its client asked to be told so. `frames_before`: see Transcoder. `after(n)` is asked for
    something to happen after the n-th frame here. `details`: more of the session's.
    """
    transcoder = Transcoder(clock=time.monotonic, frames_before=frames_before)
    began = time.monotonic()
    core = SessionCore(
        transcoder.headers(), limits, began, status=status, handshake_delay_s=handshake_delay_s
    )

    async def tell(event: Event) -> None:
        for command in core.receive(event, time.monotonic()):
            match command:
                case FeedAudio(data):
                    try:
                        frames = transcoder.receive(data)
                    except PersonaplexError as error:
                        await tell(Failed(error))
                        return
                    if frames and core.state is LIVE:
                        await tell(AudioHeard())
                    for frame in frames:
                        if core.state is LIVE:
                            await tell(AgentText(" é"))
                            await tell(AgentAudio(transcoder.send(frame)))
                            if (event := after(transcoder.counters.frames_out)) is not None:
                                await tell(event)
                case Close(code, reason):
                    await socket.close(code, close_reason(reason))
                case _:
                    await socket.send(bytes_of(command))

    for event in (Queued(2), LeaseGranted(), Ready({"voice": "NATF2", **details})):
        await tell(event)
    while core.state is not CLOSED:
        due = core.deadline()
        wait = None if due is None else max(0.0, due - time.monotonic())
        try:
            message = await asyncio.wait_for(socket.recv(), wait)
        except asyncio.TimeoutError:
            await tell(Tick())
        except ConnectionClosed:
            await tell(PeerClosed())
        else:
            await tell(event_of(message) if isinstance(message, bytes) else event_of_text(message))


class EchoService:
    """Serves `handler` on a free loopback port; `url` is its address, `requests` what was asked for."""

    def __init__(self, handler: Handler = echo, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self._handler, self._tls = handler, tls
        self._started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> EchoService:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        async def handle(socket: ServerConnection) -> None:
            assert socket.request is not None
            self.requests.append(socket.request.path)
            self.headers.append({name.lower(): value for name, value in socket.request.headers.raw_items()})
            await self._handler(socket)

        async with serve(handle, "127.0.0.1", 0, ssl=self._tls, compression=None) as server:
            port = server.sockets[0].getsockname()[1]
            self.url = f"{'wss' if self._tls else 'ws'}://127.0.0.1:{port}/api/chat"
            self._started.set()
            await self._stop.wait()
