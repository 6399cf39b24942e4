"""Access through a whole service in one process: real gateways, replica, fleet and media link over TLS, but
no Ray. Calls of handles are calls of methods here, all else is as it runs."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from golden import GOLDEN
from loopback import LeaseCall
from test_own_voices import in_a_loop, request

from deployments import metrics
from deployments.fleet import Fleet
from deployments.gateway.app import Gateway
from deployments.parts import GatewaySettings, ReplicaSettings
from deployments.replica import replica as replica_module
from deployments.settings import Settings
from deployments.wire.holdings import YOUNG_S

KEYS = "two label=two sessions=2 own_voices=yes\nneighbour label=neighbour\nkept label=kept\n"


class Quiet:
    """Metrics that nobody reads."""

    def __getattr__(self, name: str) -> Any:
        async def keep(*_: Any) -> None:
            await asyncio.Event().wait()

        return keep if name == "keep" else lambda *_, **__: None


class Handle:
    """A deployment's handle to an object of this process."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._target, name))


class Replica(replica_module.Replica):
    def __del__(self) -> None:  # type: ignore[override]
        """Serve awaits the one above; the interpreter calls this one."""


async def pour(answers: Any, items: asyncio.Queue[Any]) -> None:
    """What a replica's lease says, to its end."""
    async with contextlib.aclosing(answers):
        async for item in answers:
            items.put_nowait(item)
    items.put_nowait(StopAsyncIteration())


class Replicas:
    """The replicas' handle; Serve lets in as many as there are slots."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica

    def options(self, **_: Any) -> Replicas:
        return self

    def remote(self, asked: Any) -> LeaseCall:
        return LeaseCall(functools.partial(pour, self._replica.lease(asked)))


class Call:
    """One WebSocket at a gateway: `status` is 101, or that of the refusal with `headers`."""

    def __init__(self, app: Any, key: str, query: str = "") -> None:
        self.status, self.headers, self.code = 0, dict[str, str](), 0
        self.heard: list[bytes] = []
        self._incoming: asyncio.Queue[Any] = asyncio.Queue()
        self._incoming.put_nowait({"type": "websocket.connect"})
        self._news = asyncio.Event()
        scope = {
            "type": "websocket",
            "path": "/api/chat",
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(b"x-api-key", key.encode())],
            "client": ("127.0.0.1", 1),
            "subprotocols": [],
            "extensions": {"websocket.http.response": {}},
        }
        self.task = asyncio.ensure_future(app(scope, self._incoming.get, self._send))

    async def _send(self, message: Any) -> None:
        match message["type"]:
            case "websocket.accept":
                self.status = 101
            case "websocket.http.response.start":
                self.status = message["status"]
                self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            case "websocket.send":
                self.heard.append(message["bytes"])
            case "websocket.close":
                self.code = message.get("code", 1000)
        self._news.set()

    async def until(self, condition: Any) -> Call:
        while not condition(self):
            self._news.clear()
            await asyncio.wait_for(self._news.wait(), 20)
        return self

    async def answered(self) -> Call:
        return await self.until(lambda call: call.status)

    async def live(self) -> Call:
        return await self.until(lambda call: b"\x00" in call.heard)

    async def hang_up(self) -> None:
        self._incoming.put_nowait({"type": "websocket.disconnect", "code": 1000})
        await asyncio.wait_for(asyncio.wait({self.task}), 10)


@contextlib.asynccontextmanager
async def service(
    monkeypatch: pytest.MonkeyPatch, keys: Path, gateways: int = 2, **settings: Any
) -> AsyncIterator[tuple[list[Any], list[Any]]]:
    """So many gateways, as objects and as ASGI applications, over one replica of six slots."""
    monkeypatch.setattr(replica_module.serve, "get_replica_context", lambda: SimpleNamespace(replica_tag="r"))
    monkeypatch.setattr(replica_module, "_node_address", lambda: "127.0.0.1")
    monkeypatch.setattr(metrics, "replica_metrics", Quiet)
    monkeypatch.setattr(metrics, "gateway_metrics", lambda page=False: Quiet())
    chosen = Settings(model="echo", slots=6, media_tls="own", api_keys_file=keys, **settings)
    fleet = Fleet()
    fleet._ledger._began = time.monotonic() - YOUNG_S
    replica: Any = Replica.__new__(Replica)
    await replica.__init__(ReplicaSettings.of(chosen), Handle(fleet))
    made: list[Any] = [
        Gateway(GatewaySettings.of(chosen), Replicas(replica), Handle(fleet))  # type: ignore[arg-type]
        for _ in range(gateways)
    ]
    try:
        yield made, [one.__serve_build_asgi_app__() for one in made]
    finally:
        for gateway in made:
            gateway._link_keys.close()
            gateway._voices._recordings.close()
            for task in gateway._tasks:
                task.cancel()
        await replica_module.Replica.__del__(replica)


def secret(folder: Path) -> Any:
    """A Secret as Kubernetes mounts it; the function returned swaps its content."""
    number = 0

    def swap(content: str) -> None:
        nonlocal number
        number += 1
        place = folder / f"..{number}"
        place.mkdir()
        (place / "keys").write_text(content)
        (folder / "..tmp").symlink_to(place.name)
        os.replace(folder / "..tmp", folder / "..data")

    swap(KEYS)
    (folder / "keys").symlink_to("..data/keys")
    return swap


def test_a_key_with_two_sessions_has_two_at_two_gateways(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret(tmp_path)

    async def run() -> None:
        async with service(monkeypatch, tmp_path / "keys") as (_, apps):
            first, second = [await Call(app, "two").live() for app in apps]
            for app in (*apps, *apps):
                refused = await Call(app, "two").answered()
                assert (refused.status, refused.headers["x-limit"]) == (429, "sessions")
                assert refused.headers["retry-after"] == "10"
            neighbour = await Call(apps[0], "neighbour").live()
            await first.hang_up()
            third = await Call(apps[1], "two").live()
            for call in (second, third, neighbour):
                assert not call.code
                await call.hang_up()

    in_a_loop(run)


@pytest.mark.parametrize("ends", [False, True])
def test_keys_change_fifty_times_under_sessions(
    ends: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    swap = secret(tmp_path)

    async def run() -> None:
        async with service(monkeypatch, tmp_path / "keys", revoke_ends_sessions=ends) as (_, apps):
            kept, revoked = await Call(apps[0], "kept").live(), await Call(apps[1], "neighbour").live()
            for number in range(50):
                swap(f"{KEYS}key-{number}\n")
                await asyncio.sleep(0.02)
            swap("kept label=kept\n")
            swapped = time.monotonic()
            for app in apps:
                while (call := await Call(app, "neighbour").answered()).status == 101:
                    await call.hang_up()
                    assert time.monotonic() - swapped < 5.0
                assert call.status == 401
            if ends:
                await revoked.until(lambda call: call.code)
                assert revoked.code == 1008
                assert any(b"revoked" in message for message in revoked.heard)
            else:
                await asyncio.sleep(1.5)
                assert not revoked.code
            assert not kept.code
            for call in (kept, revoked):
                await call.hang_up()

    in_a_loop(run)


def test_an_uploaded_voice_is_spoken_with_at_the_other_gateway(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret(tmp_path)

    async def run() -> None:
        async with service(monkeypatch, tmp_path / "keys") as (_, apps):
            data = (GOLDEN / "voice.wav").read_bytes()
            answer = await request(apps[0], "POST", "/api/voices?consent=1", data, "two")
            assert answer.status == 200, answer
            name = answer.json()["voice"]
            call = await Call(apps[1], "two", f"voice_prompt={name}").live()
            assert any(name.encode() in message for message in call.heard), "the session's details name it"
            await call.hang_up()
            stranger = await Call(apps[1], "neighbour", f"voice_prompt={name}").answered()
            assert stranger.status == 403
            unknown = await Call(apps[1], "two", f"voice_prompt=own:{'0' * 64}").answered()
            assert unknown.status == 400
            info = (await request(apps[1], "GET", "/api/info")).json()
            assert (info["own_voices"]["allowed"], info["wait_s"]) == ("keys", 0.0)

    in_a_loop(run)
