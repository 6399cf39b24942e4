"""Access on a running service: two gateways that count one key together, keys that change under load, an own
voice from its upload to its session, and a link that is nobody else's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import websockets
from golden import GOLDEN
from serving import Client, Service, connect, running, speech
from websockets.exceptions import InvalidStatus

from deployments.wire.handshake import CHALLENGE_BYTES
from personaplex.session.moshi import Audio, Metadata

KEYS = "two label=two sessions=2 own_voices=yes\nneighbour label=neighbour\nkept label=kept\n"


class Secret:
    """A Secret as Kubernetes mounts it: every change is a new folder and one rename."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self.path = folder / "keys"
        self.swap(KEYS)
        self.path.symlink_to("..data/keys")

    def swap(self, content: str) -> None:
        self._number += 1
        place = self._folder / f"..{self._number}"
        place.mkdir()
        (place / "keys").write_text(content)
        (self._folder / "..tmp").symlink_to(place.name)
        os.replace(self._folder / "..tmp", self._folder / "..data")


@pytest.fixture(scope="module")
def secret(tmp_path_factory: pytest.TempPathFactory) -> Secret:
    return Secret(tmp_path_factory.mktemp("secret"))


@pytest.fixture(scope="module")
def service(cluster: str, secret: Secret) -> Iterator[Service]:
    with running(
        cluster,
        model="echo",
        slots=6,
        gateways_min=2,
        gateways_max=2,
        api_keys_file=secret.path,
        media_tls="own",
        session_limit_s=120.0,
    ) as running_:
        yield running_


def _key(name: str) -> dict[str, str]:
    return {"X-API-Key": name}


async def _live(stack: contextlib.AsyncExitStack, service: Service, key: str, **query: Any) -> Client:
    client = await stack.enter_async_context(connect(service, _key(key), **query))
    await client.headers()
    await client.until(lambda heard: heard.live)
    return client


async def _refused(service: Service, key: str) -> tuple[int, str]:
    """Status and X-Limit of an upgrade that is refused."""
    with pytest.raises(InvalidStatus) as caught:
        async with websockets.connect(service.chat, additional_headers=_key(key)):
            pass
    response = caught.value.response
    return response.status_code, response.headers.get("x-limit", "")


def test_a_third_session_of_a_key_with_two_is_refused_wherever_it_comes(service: Service) -> None:
    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            first, second = [await _live(stack, service, "two") for _ in range(2)]
            for _ in range(8):  # Serve's proxy spreads them over both gateways
                assert await _refused(service, "two") == (429, "sessions")
            await _live(stack, service, "neighbour")
            await first.socket.close()
            deadline = time.monotonic() + 5
            while True:
                with contextlib.suppress(InvalidStatus):
                    await _live(stack, service, "two")
                    break
                assert time.monotonic() < deadline
            assert second.heard.code is None

    asyncio.run(run())
    service.wait_idle()


def test_a_key_is_told_what_it_holds_and_a_role_text_how_long_it_is(service: Service) -> None:
    base = f"http://{service.base}/api"
    shown = requests.get(f"{base}/key", headers=_key("two"), timeout=10).json()
    assert (shown["label"], shown["sessions"]["limit"], shown["own_voices"]) == ("two", 2, True)
    asked = {"text_prompt": "x" * 9}
    counted = requests.post(f"{base}/tokens", json=asked, headers=_key("two"), timeout=20)
    assert counted.json() == {"tokens": 3, "limit": 1_000, "left": 997}
    assert requests.post(f"{base}/tokens", json=asked, timeout=10).status_code == 401
    assert service.info()["own_voices"]["allowed"] == "keys"


def test_an_uploaded_voice_speaks_at_whichever_gateway_its_session_comes(service: Service) -> None:
    url = f"http://{service.base}/api/voices"
    data = (GOLDEN / "voice.wav").read_bytes()
    answer = requests.post(f"{url}?consent=1", data, headers=_key("two"), timeout=60)
    assert answer.status_code == 200, answer.text
    name = answer.json()["voice"]

    async def run() -> None:
        for _ in range(4):  # over both gateways
            async with contextlib.AsyncExitStack() as stack:
                client = await _live(stack, service, "two", voice_prompt=name)
                told = [m.data for m in client.heard.of(Metadata) if m.data.get("type") == "session"]
                assert [details["voice"] for details in told] == [name]
                with pytest.raises(InvalidStatus, match="403"):
                    await _live(stack, service, "neighbour", voice_prompt=name)

    asyncio.run(run())
    assert requests.post(f"{url}?consent=1", data, headers=_key("neighbour"), timeout=10).status_code == 403
    large = requests.post(f"{url}?consent=1", bytes(1_900_000), headers=_key("two"), timeout=60)
    assert large.status_code == 422, "it came through, and is no recording"
    assert requests.delete(f"{url}/{name}", headers=_key("two"), timeout=10).status_code == 204


def test_keys_change_fifty_times_under_load_and_no_call_is_hurt(service: Service, secret: Secret) -> None:
    """A key that was taken out is refused within 5 s; a session that talks through all of it hears no gap."""

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            talker = await _live(stack, service, "kept")
            speaking = asyncio.ensure_future(talker.speak(np.concatenate([speech(8.0)] * 2)))
            for number in range(50):
                secret.swap(f"{KEYS}key-{number}\n")
                await asyncio.sleep(0.2)
            gone = time.monotonic()
            secret.swap("kept label=kept\n")
            await asyncio.sleep(max(0.0, gone + 5.0 - time.monotonic()))
            for revoked in ("neighbour", "two") * 4:  # by now at both gateways
                assert (await _refused(service, revoked))[0] == 401
            await speaking
            assert talker.heard.code is None
            arrivals = [at for at, message in talker.heard.messages if isinstance(message, Audio)][2:]
            assert len(arrivals) > 150
            assert np.max(np.diff(arrivals)) < 0.5

    asyncio.run(run())
    secret.swap(KEYS)


def test_a_process_on_loopback_gets_nothing_from_the_link(service: Service) -> None:
    host, port = service.replicas()[0].media
    assert port
    for said in (
        b"",
        b"\x16\x03\x01" + bytes(100),
        b"PPL1" + bytes(200),
        b"\x15\x00\x00\x00\x01" + bytes(20),
    ):
        with socket.create_connection((host, port)) as stranger:
            stranger.settimeout(12.0)
            stranger.sendall(said)
            heard = b""
            with contextlib.suppress(ConnectionResetError):
                while piece := stranger.recv(4_096):
                    heard += piece
            assert len(heard) < CHALLENGE_BYTES, "at most an alert of TLS"
