"""A real Ray cluster for the tests, applications on it, and a small client that speaks the wire protocol.

The cluster is started once for all tests. `running` gives one application under its own route prefix, so
several with different settings live side by side. Clients use `personaplex.audio` for Opus and `websockets`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import ray
import requests
import websockets
from numpy.typing import NDArray
from ports import free_port
from ray import serve
from websockets.asyncio.client import ClientConnection

from deployments.application import build
from deployments.command import ENVIRONMENT
from deployments.metrics import EXPORT_MS
from deployments.settings import Settings
from deployments.wire.messages import ReplicaStatus
from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SECONDS, FRAME_SIZE
from personaplex.session.moshi import Audio, Error, Handshake, Message, Metadata, Text, decode

SMALL = {"replica_num_cpus": 0.1, "gateway_num_cpus": 0.1, "session_limit_s": 30.0, "queue_timeout_s": 10.0}
PLACES = {"place": 2}  # a resource that is taken where a replica and a gateway ask for one each
PATIENCE_S = 60.0  # for what is waited for, where the time is not what is tested: the machine may be busy
SPEECH = Path(__file__).parent / "data" / "mic.ogg"
CLUSTER_ENVIRONMENT = {
    **ENVIRONMENT,
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.1",  # applications come and go all the time
    EXPORT_MS: "2000",  # tests wait for metrics
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
}
_names = itertools.count()


@contextlib.contextmanager
def ray_cluster() -> Iterator[str]:
    """Ray and Serve on this machine; gives the base address, without a scheme."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, of which there are many
        for name, value in CLUSTER_ENVIRONMENT.items():
            patch.setenv(name, value)
        ray.init(
            num_cpus=4,
            resources=PLACES,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
        yield f"127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()


@dataclasses.dataclass(frozen=True)
class Service:
    """One running application."""

    name: str
    base: str

    @property
    def chat(self) -> str:
        return f"ws://{self.base}/api/chat"

    def get(self, path: str) -> requests.Response:
        return requests.get(f"http://{self.base}/{path}", timeout=10)

    def info(self) -> dict[str, Any]:
        return dict(self.get("api/info").json())

    def handle(self, deployment: str) -> Any:
        return serve.get_deployment_handle(deployment, self.name)

    def replicas(self) -> list[ReplicaStatus]:
        """What the replicas last said of themselves."""
        return list(self.handle("fleet").describe.remote().result(timeout_s=PATIENCE_S))

    def used(self) -> list[int]:
        """Slots in use, by replica."""
        return [replica.used for replica in self.replicas()]

    def wait(self, condition: Callable[[list[ReplicaStatus]], bool], timeout_s: float = PATIENCE_S) -> float:
        """Seconds until `condition(replicas)` holds; fails after `timeout_s`."""
        began = time.monotonic()
        while not condition(seen := self.replicas()):
            assert time.monotonic() - began < timeout_s, seen
            time.sleep(0.02)
        return time.monotonic() - began

    def wait_idle(self, timeout_s: float = PATIENCE_S) -> float:
        """Seconds until no slot is in use."""
        return self.wait(lambda seen: bool(seen) and not any(one.used for one in seen), timeout_s)


@contextlib.contextmanager
def running(cluster: str, **settings: Any) -> Iterator[Service]:
    """An application with `settings` over SMALL, ended with everything it holds."""
    name = f"test{next(_names)}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        application = build(Settings(**{**SMALL, **settings}))
        serve.run(application, name=name, route_prefix=f"/{name}")
    service = Service(name, f"{cluster}/{name}")
    try:
        service.wait(lambda seen: len(seen) >= settings.get("replicas_min", 1))
        yield service
    finally:
        serve.delete(name)


@dataclasses.dataclass
class Heard:
    """What one client got."""

    messages: list[tuple[float, Message]] = dataclasses.field(default_factory=list)  # with time of arrival
    code: int | None = None
    reason: str = ""

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for _, message in self.messages if isinstance(message, kind)]

    @property
    def pages(self) -> list[bytes]:
        """Ogg pages without the two of the header."""
        return [message.data for message in self.of(Audio)][2:]

    @property
    def last_frame(self) -> int:
        """Number of the last frame heard. A busy gateway leaves out pages rather than fall behind, and their
        sequence numbers show it."""
        return int.from_bytes(self.pages[-1][18:22], "little") - 2 if self.pages else -1

    @property
    def live(self) -> bool:
        return bool(self.of(Handshake))

    @property
    def summary(self) -> str:
        """For a test that failed."""
        told = [message.data.get("type") for message in self.of(Metadata)]
        last = f"{time.monotonic() - self.messages[-1][0]:.1f} s ago" if self.messages else "never"
        return f"frame {self.last_frame}, told {told}, code {self.code} {self.reason!r}, last message {last}"

    @property
    def text(self) -> str:
        return "".join(message.text for message in self.of(Text))

    @property
    def session(self) -> str:
        return str(next(m.data["session"] for m in self.of(Metadata) if m.data.get("type") == "session"))

    @property
    def queue(self) -> list[int]:
        return [m.data["position"] for m in self.of(Metadata) if m.data.get("type") == "queue"]

    def told(self, kind: str) -> int:
        """How often a metadata message of this type came."""
        return sum(message.data.get("type") == kind for message in self.of(Metadata))

    @property
    def complaint(self) -> str:
        return " ".join(message.message for message in self.of(Error))


class Client:
    """One conversation as a well-behaved client holds it."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.heard = socket, Heard()
        self.sent: list[bytes] = []  # pieces of our Ogg stream
        self.transcoder = Transcoder()
        self._changed = asyncio.Condition()
        self._reader = asyncio.ensure_future(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                message = decode(bytes(await self.socket.recv()))
                async with self._changed:
                    self.heard.messages.append((time.monotonic(), message))
                    self._changed.notify_all()
        self.heard.code, self.heard.reason = self.socket.close_code, self.socket.close_reason or ""
        async with self._changed:
            self._changed.notify_all()

    async def until(self, condition: Callable[[Heard], Any], timeout_s: float = PATIENCE_S) -> Heard:
        """Waits for `condition(heard)`; fails when the connection ends or time runs out before."""

        async def happens() -> None:
            async with self._changed:
                await self._changed.wait_for(
                    lambda: condition(self.heard) or self._reader.done() or self.ended
                )

        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(happens(), timeout_s)
        assert condition(self.heard), f"after {timeout_s} s: {self.heard.summary}, of {len(self.sent)} sent"
        return self.heard

    @property
    def ended(self) -> bool:
        return self.heard.code is not None

    async def until_closed(self, timeout_s: float = PATIENCE_S) -> Heard:
        return await self.until(lambda heard: heard.code is not None, timeout_s)

    async def send(self, data: bytes) -> None:
        self.sent.append(data)
        await self.socket.send(b"\x01" + data)

    async def headers(self) -> None:
        for page in self.transcoder.headers():
            await self.send(page)

    async def speak(self, pcm: NDArray[np.float32], pace_s: float = FRAME_SECONDS) -> None:
        """Sends whole frames of `pcm`, one every `pace_s` by the clock."""
        began = time.monotonic()
        for number in range(len(pcm) // FRAME_SIZE):
            await asyncio.sleep(began + number * pace_s - time.monotonic())
            await self.send(self.transcoder.send(pcm[number * FRAME_SIZE :][:FRAME_SIZE]))

    async def talk(self, pcm: NDArray[np.float32]) -> Heard:
        """Headers, all of `pcm`, and waiting for the last frame's answer. The session stays open."""
        await self.headers()
        await self.until(lambda heard: heard.live)
        await self.speak(pcm)
        frames = len(self.decoded())
        return await self.until(lambda heard: heard.last_frame >= frames - 1)

    def headers_heard(self) -> list[bytes]:
        """The two header pages of the agent's stream."""
        return [message.data for message in self.heard.of(Audio)[:2]]

    def decoded(self) -> list[NDArray[np.float32]]:
        """The frames the service makes of what was sent: decoding depends on nothing else."""
        transcoder = Transcoder()
        return [frame for data in self.sent for frame in transcoder.receive(data)]


@contextlib.asynccontextmanager
async def connect(
    service: Service, headers: dict[str, str] | None = None, **query: Any
) -> AsyncIterator[Client]:
    """A client connected to `service`, which asks for status as ours do; closed at the end."""
    url = f"{service.chat}?{urlencode({'status': 1, **query})}"
    async with websockets.connect(url, additional_headers=headers, max_size=None) as socket:
        client = Client(socket)
        try:
            yield client
        finally:
            await socket.close()
            await client._reader


async def come_back(service: Service, token: str, heard: int, timeout_s: float = 20.0) -> Any:
    """As our clients do: tries until it is let in."""
    deadline = time.monotonic() + timeout_s
    while True:
        context = connect(service, resume=token, heard=heard)
        try:
            return context, await context.__aenter__()
        except websockets.InvalidStatus as error:
            if error.response.status_code not in (429, 503) or time.monotonic() > deadline:
                raise
        except OSError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.1)


def speech(seconds: float, start: float = 0.0) -> NDArray[np.float32]:
    """float32 [samples] of recorded speech at 24 kHz, whole frames; at most about 11 s of it."""
    frames = Transcoder().receive(SPEECH.read_bytes())
    first, count = round(start / FRAME_SECONDS), round(seconds / FRAME_SECONDS)
    chosen = frames[first : first + count]
    assert len(chosen) == count, "the recording is too short"
    return np.concatenate(chosen)


def token_log(folder: Path, session: str) -> dict[str, Any]:
    """The tokens a gateway kept; waits for the session's end to have been written."""
    path = folder / f"{session}.npz"
    deadline = time.monotonic() + 5
    while not path.exists():
        assert time.monotonic() < deadline, "no token log was written"
        time.sleep(0.02)
    with np.load(path) as data:
        return {name: data[name] for name in data.files}
