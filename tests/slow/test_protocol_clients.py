"""OpenAI's own client, unmodified, against the real gateway over a real socket; the agent speaks by
script."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import openai
import pytest
import requests
import websockets
from protocol_service import ProtocolService, ScriptedReplica, talker, utterance
from websockets.exceptions import InvalidStatus

from personaplex.config import FRAME_SIZE
from personaplex.errors import NoCapacity
from personaplex.session.events import Failed

KEY = "sk-test-1234567890"
SILENT = base64.b64encode(bytes(3_840)).decode()
WORDS = (" Hello", " how can I", " help you?")
SPOKEN = b"".join(
    (utterance(n) * 32_768).astype("<i2").tobytes() for start in (5, 11, 17) for n in range(start, start + 3)
)


@pytest.fixture(scope="module")
def service() -> Iterator[ProtocolService]:
    with ProtocolService(talker(*WORDS), slots=3, queue_limit=1, api_keys=KEY) as running:
        yield running


@pytest.fixture(autouse=True)
def idle(service: ProtocolService) -> Iterator[None]:
    """Every session of a test is gone before the next."""
    ScriptedReplica.fail = None
    ScriptedReplica.personas.clear()
    yield
    deadline = time.monotonic() + 10
    while ScriptedReplica.held and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not ScriptedReplica.held


def client(service: ProtocolService, key: str = KEY, **options: Any) -> openai.AsyncOpenAI:
    base = f"http://{service.base}/v1"
    return openai.AsyncOpenAI(
        api_key=key, base_url=base, websocket_base_url=base.replace("http", "ws"), **options
    )


async def speak(send: Any, kind: str, count: int) -> None:
    """Silence in real time, as a microphone sends it."""
    for _ in range(count):
        await send({"type": kind, "audio": SILENT})
        await asyncio.sleep(0.08)


async def collect(connection: Any, until: str, timeout_s: float = 15.0) -> list[Any]:
    """Events until the first of type `until`, each valid in the package's types."""
    events = []

    async def read() -> None:
        async for event in connection:
            type(event).model_validate(event.model_dump(mode="json"))
            events.append(event)
            if event.type == until:
                return

    await asyncio.wait_for(read(), timeout_s)
    return events


@contextlib.asynccontextmanager
async def speaking(connection: Any, kind: str, count: int = 60) -> AsyncIterator[None]:
    task = asyncio.ensure_future(speak(connection.send, kind, count))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_live_from_start_to_close(service: ProtocolService) -> None:
    async def run() -> None:
        async with client(service).live.connect() as connection:
            session = {
                "model": "personaplex",
                "instructions": "You are a baker.",
                "audio": {"output": {"voice": "cedar"}},
            }
            await connection.send({"type": "session.start", "session": session, "event_id": "one"})
            started = await connection.recv()
            assert (started.type, started.client_event_id) == ("session.started", "one")
            async with speaking(connection, "session.input_audio.append"):
                audio, text, at = b"", "", 0
                async for event in connection:
                    if event.type == "session.output_audio.delta":
                        audio += base64.b64decode(event.delta)
                        assert event.start_ms == at
                        at += 80
                    elif event.type == "session.output_transcript.delta":
                        text += event.delta
                    if at >= 25 * 80:
                        break
            frames = [audio[n : n + 3_840] for n in range(0, len(audio), 3_840)]
            assert b"".join(frame for frame in frames if any(frame)) == SPOKEN
            assert text == "".join(WORDS)
            await connection.send({"type": "session.close"})
            assert (await collect(connection, "session.closed"))[-1].reason == "close_requested"

    asyncio.run(run())
    (persona,) = ScriptedReplica.personas
    assert (persona.voice, persona.text_prompt) == ("NATM1", "You are a baker.")
    assert service.metrics.totals["personaplex_sessions_ended", "left", "live"] == 1


@pytest.mark.parametrize("dialect", ["ga", "beta"])
def test_realtime_hears_each_utterance_whole(service: ProtocolService, dialect: str) -> None:
    async def run() -> list[Any]:
        openai_client = client(service)
        root: Any = openai_client if dialect == "ga" else openai_client.beta
        async with root.realtime.connect(model="gpt-realtime") as connection:
            assert (await connection.recv()).type == "session.created"
            voice = (
                {"audio": {"output": {"voice": "ash"}}, "type": "realtime"}
                if dialect == "ga"
                else {"voice": "ash"}
            )
            await connection.session.update(session={**voice, "instructions": "You are a baker."})
            assert (await connection.recv()).session.instructions == "You are a baker."
            async with speaking(connection, "input_audio_buffer.append"):
                return await collect(connection, "rate_limits.updated")

    events = asyncio.run(run())
    name = "response.output_audio.delta" if dialect == "ga" else "response.audio.delta"
    audio = b"".join(base64.b64decode(event.delta) for event in events if event.type == name)
    frames = [audio[n : n + 3_840] for n in range(0, len(audio), 3_840)]
    assert b"".join(frame for frame in frames if any(frame)) == SPOKEN
    done = next(event for event in events if event.type == "response.done").response
    assert [item.content[0].transcript for item in done.output] == ["".join(WORDS)]
    assert ScriptedReplica.personas[0].voice == "NATM1"


def test_a_client_secret_opens_sessions_as_it_was_configured(service: ProtocolService) -> None:
    async def run() -> None:
        session = {
            "type": "realtime",
            "instructions": "You sell bread.",
            "audio": {"output": {"voice": "marin"}},
        }
        async with client(service) as one:
            secret = await one.realtime.client_secrets.create(session=session)
        assert secret.value.startswith("ek_")
        assert KEY not in secret.value
        assert 595 < secret.expires_at - time.time() <= 601
        assert secret.session.instructions == "You sell bread."
        for _ in range(2):
            async with client(service, secret.value).realtime.connect(model="m") as connection:
                created = await connection.recv()
                assert created.session.instructions == "You sell bread."
                assert created.session.model == "m"
        browsers = [f"openai-insecure-api-key.{secret.value}", "realtime"]
        async with websockets.connect(f"ws://{service.base}/v1/realtime", subprotocols=browsers) as socket:
            assert socket.subprotocol == "realtime"
            assert json.loads(await socket.recv())["session"]["instructions"] == "You sell bread."
        changed = secret.value[:-2] + ("AA" if secret.value[-2:] != "AA" else "BB")
        with pytest.raises(InvalidStatus, match="401"):
            async with client(service, changed).realtime.connect(model="m"):
                pass

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"expires_after": {"anchor": "created_at", "seconds": 9}}, "invalid_value"),
        ({"session": {"type": "realtime", "tools": [{}]}}, "tools_not_supported"),
        ({"session": {"type": "realtime", "instructions": "x" * 20_000}}, "session_too_long"),
        ([], "invalid_type"),
        ("{", "invalid_value"),
        ("[" * 100_000, "invalid_value"),
    ],
)
def test_secrets_that_cannot_be(service: ProtocolService, body: Any, code: str) -> None:
    data = body if isinstance(body, str) else json.dumps(body)
    url = f"http://{service.base}/v1/realtime/client_secrets"
    answer = requests.post(url, data=data, headers={"authorization": f"Bearer {KEY}"}, timeout=10)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


@pytest.mark.parametrize("path", ["realtime", "live/sessions"])
def test_no_key_is_refused_before_the_upgrade(
    service: ProtocolService, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        with pytest.raises(InvalidStatus) as refused:
            async with websockets.connect(f"ws://{service.base}/v1/{path}"):
                pass
        response = refused.value.response
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert json.loads(response.body)["error"]["code"] == "invalid_api_key"

    asyncio.run(run())
    answer = requests.post(f"http://{service.base}/v1/realtime/client_secrets", timeout=10)
    assert answer.status_code == 401
    assert not [one for one in caplog.records if one.levelname == "ERROR"], "a refusal is no fault of ours"


def test_a_full_service_is_503_with_a_time_and_the_client_does_not_loop(service: ProtocolService) -> None:
    async def run() -> None:
        holders = [client(service).realtime.connect(model="m") for _ in range(3)]
        async with contextlib.AsyncExitStack() as stack:
            for holder in holders:
                connection = await stack.enter_async_context(holder)
                await connection.response.create()
                await collect(connection, "response.created")
            while len(ScriptedReplica.held) < 3:  # noqa: ASYNC110  of another thread
                await asyncio.sleep(0.01)
            for root in ("realtime", "live"):
                began = time.monotonic()
                connect: Any = getattr(client(service), root).connect
                with pytest.raises(InvalidStatus) as refused:
                    await connect(**({"model": "m"} if root == "realtime" else {})).enter()
                assert time.monotonic() - began < 5
                assert refused.value.response.status_code == 503
                assert int(refused.value.response.headers["retry-after"]) >= 1
                assert json.loads(refused.value.response.body)["error"]["code"] == "no_capacity"

    asyncio.run(run())


def test_a_session_that_fails_closes_what_is_open(service: ProtocolService) -> None:
    async def run() -> None:
        async with client(service).realtime.connect(model="m") as connection:
            async with speaking(connection, "input_audio_buffer.append"):
                await collect(connection, "response.created")
                ScriptedReplica.fail = Failed(NoCapacity("gone"))
                events = await collect(connection, "error")
            assert events[-1].error.code == "no_capacity"
            done = [event.response for event in events if event.type == "response.done"]
            assert [response.status for response in done] == ["failed"]
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await connection.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1013

    asyncio.run(run())


def test_no_webrtc_is_said_so(service: ProtocolService) -> None:
    for path in ("v1/realtime/calls", "v1/live/sessions"):
        answer = requests.post(f"http://{service.base}/{path}", timeout=10)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_mu_law_is_heard_and_said_at_8_khz(service: ProtocolService) -> None:
    async def run() -> None:
        async with client(service).live.connect() as connection:
            audio = {"format": {"type": "audio/pcmu", "rate": 8_000}}
            await connection.send({"type": "session.start", "session": {"model": "m", "audio": audio}})
            await connection.recv()
            chunk = base64.b64encode(b"\xff" * 160).decode()
            for _ in range(12):
                await connection.send({"type": "session.input_audio.append", "audio": chunk})
            deltas = [await connection.recv() for _ in range(3)]
            assert {len(base64.b64decode(event.delta)) for event in deltas} == {640}

    asyncio.run(run())


def test_frames_are_whole_samples() -> None:
    assert np.abs(utterance(3)).max() <= 0.25
    assert len(SPOKEN) == 9 * 2 * FRAME_SIZE
