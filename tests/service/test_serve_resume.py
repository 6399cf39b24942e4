"""Clients that come back to the live service: nothing is lost that is not told, and strangers get nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from serving import Client, Service, come_back, connect, running, speech, token_log
from websockets.exceptions import InvalidStatus

from personaplex.config import EngineConfig
from personaplex.engine.engine import Engine
from personaplex.loading import ModelSpec, load_parts, resolve
from personaplex.persona import Persona
from personaplex.session.moshi import Metadata

PATIENT = {"burst_s": 20.0}
SOUND = speech(4.8)
HALF = len(SOUND) // 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens")


@pytest.fixture(scope="module")
def service(cluster: str, folder: Path) -> Iterator[Service]:
    settings = {"model": "tiny", "slots": 2, "replicas_min": 2, "replicas_max": 2, "metrics_page": True}
    with running(cluster, **settings, **PATIENT, token_log_dir=folder) as service:
        yield service


def details(client: Client) -> dict[str, Any]:
    told = [dict(m.data) for m in client.heard.of(Metadata) if m.data.get("type") == "session"]
    assert len(told) == 1
    return told[0]


def cut(client: Client) -> None:
    """The network is gone: no close, nothing."""
    client.socket.transport.abort()


async def finish(service: Service, first: Client, token: str, start: int) -> tuple[Client, dict[str, Any]]:
    """The rest of the sound over a new connection."""
    heard = first.heard.last_frame + 1
    context, second = await come_back(service, token, heard)
    try:
        await second.headers()
        await second.until(lambda heard: heard.live)
        told = details(second)
        await second.speak(SOUND[start:])
        frames = told["resumed"]["frame"] + len(second.decoded())
        await second.until(lambda heard: heard.last_frame >= frames - 1)
    finally:
        await context.__aexit__(None, None, None)
    resumed = told["resumed"]
    assert resumed["lost_frames"] == resumed["frame"] - heard
    numbers = [int.from_bytes(page[18:22], "little") - 2 for page in second.heard.pages]
    assert numbers[0] >= resumed["frame"], "nothing is played twice"
    return second, told


def tokens_of(parts: list[list[np.ndarray]], persona: Persona) -> np.ndarray:
    engine = load_parts(resolve(ModelSpec("tiny", device="cpu")), EngineConfig()).engine(EngineConfig())
    return talk_alone(engine, [frame for part in parts for frame in part], persona)


def talk_alone(engine: Engine, frames: list[np.ndarray], persona: Persona) -> np.ndarray:
    slot = engine.open(persona)
    rows = []
    for frame in frames:
        engine.feed(slot, frame)
        rows.append(engine.step()[0].tokens)
    return np.stack(rows)


def persona_of(told: dict[str, Any], text_prompt: str) -> Persona:
    import dataclasses

    sampling = dataclasses.replace(
        Persona().sampling, text_seed=told["text_seed"], audio_seed=told["audio_seed"]
    )
    return Persona(told["voice"], text_prompt, sampling)


def test_a_cut_connection_costs_nothing_that_is_not_told(service: Service, folder: Path) -> None:
    async def run() -> tuple[Client, Client, dict[str, Any]]:
        async with connect(service, text_prompt="You are brief.") as first:
            await first.talk(SOUND[:HALF])
            told = details(first)
            assert told["grace_s"] == 30
            cut(first)
            await first.until_closed()
        second, again = await finish(service, first, told["resume"], HALF)
        assert again["resume"] != told["resume"]
        return first, second, again

    first, second, told = asyncio.run(run())
    service.wait_idle()
    answered = told["resumed"]["frame"]
    fed = [first.decoded()[:answered], second.decoded()]
    rows = tokens_of(fed, persona_of(told, "You are brief."))
    deadline = time.monotonic() + 5
    while len((log := token_log(folder, told["session"]))["text"]) < len(rows):  # the first half was kept too
        assert time.monotonic() < deadline
        time.sleep(0.05)
    np.testing.assert_array_equal(log["agent_codes"], rows[:, 1:9].T)
    np.testing.assert_array_equal(log["user_codes"], rows[:, 9:].T)
    assert 'personaplex_resumes_total{outcome="continued"} 1.0' in service.get("metrics").text


def test_who_hangs_up_is_gone_at_once(service: Service) -> None:
    async def run() -> None:
        async with connect(service) as client:
            await client.talk(SOUND[: HALF // 2])
            token = details(client)["resume"]
        await asyncio.to_thread(service.wait_idle)
        for bad in (token, token[:-4] + "AAAA", "x", ""):
            with pytest.raises(InvalidStatus) as caught:
                async with connect(service, resume=bad):
                    pass
            assert caught.value.response.status_code == 410
            assert caught.value.response.body == b"expired\n"

    asyncio.run(run())


def test_stock_clients_hold_no_slot_and_get_no_token(service: Service) -> None:
    async def run() -> None:
        async with connect(service, status=0) as client:
            await client.talk(SOUND[: HALF // 2])
            assert "resume" not in details(client)
            cut(client)
            await client.until_closed()
        await asyncio.to_thread(service.wait_idle)
        assert not any(one.detached for one in await asyncio.to_thread(service.replicas))

    asyncio.run(run())


def test_a_gateway_that_is_killed_ends_no_conversation(service: Service) -> None:
    async def run() -> None:
        async with connect(service) as first:
            await first.talk(SOUND[:HALF])
            token = details(first)["resume"]
            os.kill(process(service, "gateway"), signal.SIGKILL)
            await first.until_closed()
        await finish(service, first, token, HALF)

    asyncio.run(run())
    service.wait_idle()


def process(service: Service, deployment: str) -> int:
    wanted = f"ray::ServeReplica:{service.name}:{deployment}".encode()
    for entry in Path("/proc").iterdir():
        command = entry / "cmdline"
        if entry.name.isdigit() and command.exists() and command.read_bytes().startswith(wanted):
            return int(entry.name)
    raise AssertionError(f"no {deployment} process")


def test_no_log_holds_a_token(service: Service) -> None:
    """Of the whole cluster, and of requests that were refused."""

    async def run() -> str:
        async with connect(service) as client:
            await client.talk(SOUND[: HALF // 4])
            token = str(details(client)["resume"])
            cut(client)
            await client.until_closed()
        context, _ = await come_back(service, token, 0)
        await context.__aexit__(None, None, None)
        return token

    token = asyncio.run(run())
    requests.get(f"http://{service.base}/api/chat", params={"resume": token}, timeout=10)
    folder = Path("/tmp/ray/session_latest/logs")
    assert folder.is_dir()
    for path in folder.rglob("*"):
        if path.is_file():
            assert token.encode() not in path.read_bytes(), path.name
