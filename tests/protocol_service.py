"""A gateway without Ray, on a real socket, for tests of protocols: everything but the replica is real.

In place of a replica there is an agent by script: for each frame of the user it answers one frame and a piece
of text. `slots` of them can be held at once; `queue` says how many more may wait. `ProtocolService` runs in a
thread of its own until the `with` block ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np
import uvicorn
from ports import free_port

from deployments import ingress
from deployments.fleet import Fleet
from deployments.gateway import app as gateway_app
from deployments.gateway import conversation
from deployments.gateway.leases import Claim, Waiter
from deployments.parts import GatewaySettings
from deployments.settings import Settings
from personaplex.config import FRAME_SIZE, Pcm
from personaplex.errors import NoCapacity
from personaplex.persona import Persona
from personaplex.session.events import AgentText, Event, LeaseGranted, Queued, Ready

Agent = Callable[[int, Pcm], tuple[Pcm, str]]  # number and pcm of a user's frame to the answer
SILENCE: Pcm = np.zeros(FRAME_SIZE, np.float32)


def utterance(number: int, amplitude: float = 0.25) -> Pcm:
    """80 ms of a tone that is different in each frame, in whole 16-bit samples."""
    time_s = (np.arange(FRAME_SIZE) + number * FRAME_SIZE) / 24_000
    pcm = amplitude * np.sin(2 * np.pi * (200 + 7 * (number % 50)) * time_s)
    return (np.rint(pcm * 32_768) / 32_768).astype(np.float32)


def talker(*words: str, begin: int = 5, gap: int = 3) -> Agent:
    """Says each word over three frames, `gap` frames apart, from frame `begin` on; is silent otherwise."""

    def answer(number: int, heard: Pcm) -> tuple[Pcm, str]:
        place, phase = divmod(number - begin, 3 + gap)
        if 0 <= place < len(words) and phase < 3:
            return utterance(number), words[place] if phase == 0 else ""
        return SILENCE, ""

    return answer


def echo(number: int, heard: Pcm) -> tuple[Pcm, str]:
    return heard, ""


class ScriptedReplica:
    """In the place of `Upstream`."""

    agent: Agent = staticmethod(echo)
    personas: list[Persona] = []  # noqa: RUF012  of the sessions that began, newest last
    held: set[ScriptedReplica] = set()  # noqa: RUF012
    fail: Event | None = None  # emitted instead of the next answer

    def __init__(
        self,
        session: str,
        services: Any,
        stats: Any,
        emit: Callable[[Event], None],
        on_frame: Callable[[int, Pcm, bool], None],
        **_: Any,
    ) -> None:
        self.log = SimpleNamespace()
        self._services, self._emit, self._on_frame = services, emit, on_frame
        self._number, self._stopped, self._ready = 0, False, False
        self._early: list[Pcm] = []

    async def open(self, persona: Persona, claim: Claim) -> None:
        await claim.lease(lambda place: self._emit(Queued(place)))
        self._emit(LeaseGranted())
        type(self).personas.append(persona)
        type(self).held.add(self)
        await asyncio.sleep(0.02)  # the prefill
        self._emit(Ready({"session": "s"}))
        self._ready = True
        for frame in self._early:
            self.send_frame(frame)

    def record(self, recording: Any) -> None:
        pass

    def send_frame(self, frame: Pcm) -> None:
        if not self._ready:
            self._early.append(frame)
            return
        asyncio.get_running_loop().call_soon(self._answer, self._number, frame)
        self._number += 1

    def _answer(self, number: int, frame: Pcm) -> None:
        if self._stopped:
            return
        if self.fail is not None:
            self._emit(self.fail)
            return
        pcm, text = type(self).agent(number, frame)
        if text:
            self._emit(AgentText(text))
        if not self._stopped:
            self._on_frame(number, pcm, False)

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        type(self).held.discard(self)

    async def release(self, *_: Any) -> None:
        pass


class FakeLeases:
    """Slots that are free or not."""

    def __init__(self, slots: int) -> None:
        self.slots, self.queued, self.changes = slots, 0, 0

    @property
    def queue_full(self) -> bool:
        return len(ScriptedReplica.held) >= self.slots

    def waiting(self) -> list[Any]:
        return []

    def held(self) -> list[Any]:
        return []

    async def claim(self, request: Any, *_: Any, **__: Any) -> Claim:
        if self.queue_full:
            raise NoCapacity("every slot is taken and the queue is full")
        turn: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        turn.set_result(SimpleNamespace(release=lambda: None))
        return Claim(Waiter(request, asyncio.get_running_loop().create_future()), turn, time.monotonic())

    def close(self) -> None:
        pass


class Published:
    """Metrics; counts what was added, by name and labels."""

    def __init__(self) -> None:
        self.totals: dict[tuple[str, ...], float] = {}

    def add(self, series: Any, amount: float = 1.0, **labels: str) -> None:
        key = (series.name, *(labels[name] for name in series.labels))
        self.totals[key] = self.totals.get(key, 0.0) + amount

    def set(self, series: Any, value: float) -> None:
        pass

    def observe(self, series: Any, value: float, **labels: str) -> None:
        assert set(labels) == set(series.labels)

    async def keep(self, *_: Any) -> None:
        await asyncio.Event().wait()


class _Handle:
    """A fleet and replicas that never say anything."""

    def __getattr__(self, name: str) -> _Handle:
        return self

    def __call__(self, *_: Any, **__: Any) -> _Handle:
        return self

    def __await__(self) -> Iterator[Any]:
        return asyncio.get_running_loop().create_future().__await__()


class _Fleet:
    """The real one, called as Serve's handles are."""

    def __init__(self) -> None:
        self._fleet = Fleet()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._fleet, name))


class ProtocolService:
    """`base` is HOST:PORT; `gateway` the real one; `metrics` what it counted."""

    def __init__(
        self, agent: Agent = echo, *, slots: int = 8, send_buffer: int | None = None, **settings: Any
    ) -> None:
        """`send_buffer`: bytes that the kernel keeps for each client, its own choice if None."""
        self._send_buffer = send_buffer
        self._settings = Settings(**{"model": "echo", "static": "none", "log_level": "error", **settings})
        self._slots = slots
        self.metrics = Published()
        self.port = free_port()
        self.base = f"127.0.0.1:{self.port}"
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.loop: asyncio.AbstractEventLoop
        ScriptedReplica.agent = staticmethod(agent)

    def __enter__(self) -> ProtocolService:
        ScriptedReplica.personas.clear()
        ScriptedReplica.held.clear()
        ScriptedReplica.fail = None
        self._undo = contextlib.ExitStack()
        for module, name, value in (
            (conversation, "Upstream", ScriptedReplica),
            (gateway_app, "Leases", lambda *_, **__: FakeLeases(self._slots)),
            (gateway_app.metrics, "gateway_metrics", lambda **_: self.metrics),
        ):
            self._undo.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        self._thread.start()
        assert self._started.wait(20)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(20)
        self._undo.close()
        assert not self._thread.is_alive()

    @property
    def connections(self) -> int:
        """Sockets that are open, with or without a session."""
        return len(self._server.server_state.connections)

    async def _run(self) -> None:
        self.loop = asyncio.get_running_loop()
        handle: Any = _Handle()
        fleet: Any = _Fleet()
        self.gateway = gateway_app.Gateway(GatewaySettings.of(self._settings), handle, fleet)
        application: Any = self.gateway.__serve_build_asgi_app__()
        for one in reversed(ingress.configure()):
            application = one.cls(application, *one.args, **one.kwargs)
        config = uvicorn.Config(application, log_level="error")
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None  # type: ignore[method-assign]
        listener = socket.create_server(("127.0.0.1", self.port))
        if self._send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._send_buffer)
        serving = asyncio.ensure_future(self._server.serve(sockets=[listener]))
        while not self._server.started:  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(0.01)
        self._started.set()
        await serving
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
