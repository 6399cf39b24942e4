"""Protocols beside /api/chat on a real service: through Serve's proxy, with a replica and its link."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import websockets
from serving import Service, running
from websockets.exceptions import InvalidStatus

from personaplex.config import FRAME_SIZE

KEY = "sk-serve"


@pytest.fixture(scope="module")
def service(cluster: str) -> Iterator[Service]:
    with running(cluster, model="echo", slots=1, queue_limit=0, api_keys=KEY) as service:
        yield service


def connect(service: Service, path: str, **options: Any) -> Any:
    headers = {"Authorization": f"Bearer {KEY}"}
    return websockets.connect(f"ws://{service.base}/v1/{path}", additional_headers=headers, **options)


def test_live_is_heard_sample_for_sample_through_a_replica(service: Service) -> None:
    frames = np.random.default_rng(1).integers(-9_000, 9_000, (8, FRAME_SIZE)).astype("<i2")

    async def run() -> None:
        async with connect(service, "live/sessions") as socket:
            await socket.send(json.dumps({"type": "session.start", "session": {"model": "m"}}))
            assert json.loads(await asyncio.wait_for(socket.recv(), 20))["type"] == "session.started"
            heard: list[bytes] = []
            for frame in frames:
                audio = base64.b64encode(frame.tobytes()).decode()
                await socket.send(json.dumps({"type": "session.input_audio.append", "audio": audio}))
            while len(heard) < len(frames):
                event = json.loads(await asyncio.wait_for(socket.recv(), 10))
                if event["type"] == "session.output_audio.delta":
                    heard.append(base64.b64decode(event["delta"]))
            assert b"".join(heard[1:]) == frames[:-1].tobytes()  # the engine answers one frame late

    asyncio.run(run())
    service.wait_idle()


async def refusal_of_a_full_service(service: Service) -> Any:
    """Once the gateway knows that the slot is taken: its view of the fleet is half a second old."""
    for _ in range(50):
        try:
            async with connect(service, "realtime"):
                await asyncio.sleep(0.1)
        except InvalidStatus as refused:
            return refused.response
    raise AssertionError("never refused")


def test_subprotocols_and_refusals_pass_the_proxy(service: Service) -> None:
    async def run() -> None:
        offered: Any = ["realtime", f"openai-insecure-api-key.{KEY}", "openai-beta.realtime-v1"]
        url = f"ws://{service.base}/v1/realtime?model=m"
        async with websockets.connect(url, subprotocols=offered) as socket:
            assert socket.subprotocol == "realtime"
            assert "modalities" in json.loads(await socket.recv())["session"]
            await socket.send('{"type": "response.create"}')
            assert json.loads(await socket.recv())["type"] == "response.created"
            response = await refusal_of_a_full_service(service)
            assert response.status_code == 503
            assert response.headers["retry-after"]
            assert json.loads(response.body)["error"]["code"] == "no_capacity"
        with pytest.raises(InvalidStatus) as refused:
            await websockets.connect(url)
        assert refused.value.response.status_code == 401

    asyncio.run(run())
    service.wait_idle()
