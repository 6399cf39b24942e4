"""One call by somebody else's agent framework, unmodified: `python framework.py CLIENT BASE KEY RESULT`.

Runs in the client's own environment, where nothing of ours is installed. BASE is HOST:PORT. The user is
silent but for a murmur while the agent first speaks. What was heard goes to RESULT as JSON: version of the
client, audio (hexadecimal, 16 bits at 24 kHz), one transcript for each message, whether one was interrupted.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.metadata
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np

FRAME_SECONDS, FRAME_SIZE, RATE = 0.08, 1_920, 24_000
FRAMES = 110
MURMUR = range(22, 30)
INSTRUCTIONS = "You are a baker."


class Heard:
    def __init__(self) -> None:
        self.audio = b""
        self.messages: list[str] = []
        self.interrupted = False


async def user() -> AsyncIterator[bytes]:
    """Frames of 80 ms in real time."""
    dice, began = np.random.default_rng(0), time.monotonic()
    for number in range(FRAMES):
        await asyncio.sleep(max(0.0, began + number * FRAME_SECONDS - time.monotonic()))
        loud = number in MURMUR
        yield dice.normal(0, 4_000, FRAME_SIZE).astype("<i2").tobytes() if loud else bytes(2 * FRAME_SIZE)


async def live(base: str, key: str) -> Heard:
    """`client.live` of the openai package."""
    import openai

    heard = Heard()
    client = openai.AsyncOpenAI(
        api_key=key, base_url=f"http://{base}/v1", websocket_base_url=f"ws://{base}/v1"
    )
    async with client.live.connect() as connection:

        async def listen() -> None:
            ended = 0
            async for event in connection:
                if event.type == "session.output_audio.delta":
                    heard.audio += base64.b64decode(event.delta)
                elif event.type == "session.output_transcript.delta":
                    if not heard.messages or event.start_ms - ended > 800:
                        heard.messages.append("")
                    heard.messages[-1] += event.delta
                    ended = event.end_ms

        await connection.send(
            {"type": "session.start", "session": {"model": "m", "instructions": INSTRUCTIONS}}
        )
        listening = asyncio.ensure_future(listen())
        async for frame in user():
            audio = base64.b64encode(frame).decode()
            await connection.send({"type": "session.input_audio.append", "audio": audio})
        await connection.send({"type": "session.close"})
        await asyncio.wait_for(listening, 10)
    return heard


def realtime(beta: bool) -> Callable[[str, str], Any]:
    async def call(base: str, key: str) -> Heard:
        """`client.realtime` of the openai package."""
        import openai

        heard = Heard()
        url = f"http://{base}/v1"
        client: Any = openai.AsyncOpenAI(api_key=key, base_url=url, websocket_base_url=f"ws://{base}/v1")
        client = client.beta if beta else client
        async with client.realtime.connect(model="gpt-realtime") as connection:

            async def listen() -> None:
                async for event in connection:
                    name = event.type.replace("output_audio", "audio")
                    if name == "response.audio.delta":
                        heard.audio += base64.b64decode(event.delta)
                    elif name == "response.audio_transcript.done":
                        heard.messages.append(event.transcript)
                    elif event.type == "input_audio_buffer.speech_started":
                        heard.interrupted = True

            session = {"instructions": INSTRUCTIONS, **({} if beta else {"type": "realtime"})}
            await connection.session.update(session=session)
            listening = asyncio.ensure_future(listen())
            async for frame in user():
                await connection.input_audio_buffer.append(audio=base64.b64encode(frame).decode())
            await connection.close()
            await asyncio.gather(listening, return_exceptions=True)
        return heard

    return call


async def agents(base: str, key: str) -> Heard:
    """A RealtimeRunner of the OpenAI Agents SDK."""
    from agents.realtime import RealtimeAgent, RealtimeRunner

    heard = Heard()
    runner = RealtimeRunner(RealtimeAgent(name="baker", instructions=INSTRUCTIONS))
    config: Any = {"url": f"ws://{base}/v1/realtime?model=personaplex", "api_key": key}
    async with await runner.run(model_config=config) as session:

        async def listen() -> None:
            async for event in session:
                if event.type == "audio":
                    heard.audio += event.audio.data
                elif event.type == "audio_interrupted":
                    heard.interrupted = True
                elif event.type == "error":
                    raise RuntimeError(str(event.error))
                elif event.type in ("history_updated", "history_added"):
                    history = session._history
                    heard.messages = [
                        part.transcript or ""
                        for item in history
                        if getattr(item, "role", "") == "assistant"
                        for part in item.content
                    ]

        listening = asyncio.ensure_future(listen())
        async for frame in user():
            await session.send_audio(frame)
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening
    return heard


def livekit(kind: str) -> Callable[[str, str], Any]:
    async def call(base: str, key: str) -> Heard:
        """An AgentSession with the model in the place of OpenAI's, and a microphone and a speaker of ours."""
        from livekit import rtc
        from livekit.agents import Agent, AgentSession
        from livekit.agents.voice import io
        from livekit.plugins import openai

        heard = Heard()

        class Microphone(io.AudioInput):
            def __init__(self) -> None:
                super().__init__(label="microphone")
                self._frames = user()

            async def __anext__(self) -> Any:
                frame = await self._frames.__anext__()
                return rtc.AudioFrame(frame, RATE, 1, FRAME_SIZE)

        class Speaker(io.AudioOutput):
            def __init__(self) -> None:
                capabilities = io.AudioOutputCapabilities(pause=False)
                super().__init__(label="speaker", capabilities=capabilities, sample_rate=RATE)
                self._seconds = 0.0

            async def capture_frame(self, frame: Any) -> None:
                await super().capture_frame(frame)
                if not self._seconds:
                    self.on_playback_started(created_at=time.time())
                self._seconds += frame.duration
                heard.audio += bytes(frame.data)

            def flush(self) -> None:
                super().flush()
                self._end(interrupted=False)

            def clear_buffer(self) -> None:
                heard.interrupted = True
                self._end(interrupted=True)

            def _end(self, *, interrupted: bool) -> None:
                if self._seconds:
                    self.on_playback_finished(playback_position=self._seconds, interrupted=interrupted)
                self._seconds = 0.0

        model = getattr(openai.realtime, kind)(model="personaplex", base_url=f"http://{base}/v1", api_key=key)
        session: Any = AgentSession(llm=model)

        def on_item(event: Any) -> None:
            if event.item.role == "assistant":
                heard.messages.append(event.item.text_content or "")
                heard.interrupted |= bool(event.item.interrupted)

        session.on("conversation_item_added", on_item)
        session.input.audio, session.output.audio = Microphone(), Speaker()
        await session.start(Agent(instructions=INSTRUCTIONS))
        await asyncio.sleep(FRAMES * FRAME_SECONDS + 1.0)
        await session.aclose()
        return heard

    return call


def pipecat(kind: str) -> Callable[[str, str], Any]:
    async def call(base: str, key: str) -> Heard:
        """A pipeline with the service in the place of OpenAI's."""
        from pipecat.frames import frames as types
        from pipecat.pipeline.pipeline import Pipeline
        from pipecat.pipeline.runner import PipelineRunner
        from pipecat.pipeline.task import PipelineParams, PipelineTask
        from pipecat.processors.aggregators.llm_context import LLMContext
        from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair
        from pipecat.processors.frame_processor import FrameProcessor

        heard = Heard()

        class Tap(FrameProcessor):
            async def process_frame(self, frame: Any, direction: Any) -> None:
                await super().process_frame(frame, direction)
                if isinstance(frame, (types.TTSAudioRawFrame, types.SpeechOutputAudioRawFrame)):
                    heard.audio += frame.audio
                elif isinstance(frame, types.LLMFullResponseStartFrame):
                    heard.messages.append("")
                elif isinstance(frame, types.TTSTextFrame):
                    if not heard.messages:
                        heard.messages.append("")
                    heard.messages[-1] += frame.text
                elif isinstance(frame, types.InterruptionFrame):
                    heard.interrupted = True
                await self.push_frame(frame, direction)

        service: Any
        if kind == "live":
            from pipecat.services.openai.live.llm import OpenAILiveLLMService as Live

            settings: Any = Live.Settings(model="personaplex", system_instruction=INSTRUCTIONS)
            service = Live(api_key=key, base_url=f"ws://{base}/v1/live/sessions", settings=settings)
        else:
            from pipecat.services.openai.realtime.llm import OpenAIRealtimeLLMService as Realtime

            settings = Realtime.Settings(model="personaplex", system_instruction=INSTRUCTIONS)
            service = Realtime(api_key=key, base_url=f"ws://{base}/v1/realtime", settings=settings)
        pair = LLMContextAggregatorPair(LLMContext())
        pipeline = Pipeline([pair.user(), service, Tap(), pair.assistant()])
        params = PipelineParams(audio_in_sample_rate=RATE, audio_out_sample_rate=RATE)
        task = PipelineTask(pipeline, params=params)
        running = asyncio.ensure_future(PipelineRunner(handle_sigint=False).run(task))
        await task.queue_frame(types.LLMRunFrame())
        await asyncio.sleep(0.5)
        async for frame in user():
            await task.queue_frame(types.InputAudioRawFrame(frame, RATE, 1))
        await task.cancel()
        await asyncio.wait({running}, timeout=10)
        heard.messages = [text for text in heard.messages if text]
        return heard

    return call


CLIENTS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "openai-live": ("openai", live),
    "openai-realtime": ("openai", realtime(beta=False)),
    "openai-beta": ("openai", realtime(beta=True)),
    "openai-agents": ("openai-agents", agents),
    "livekit-live": ("livekit-plugins-openai", livekit("GPTLiveModel")),
    "livekit-realtime": ("livekit-plugins-openai", livekit("RealtimeModel")),
    "pipecat-live": ("pipecat-ai", pipecat("live")),
    "pipecat-realtime": ("pipecat-ai", pipecat("realtime")),
}


def main() -> None:
    name, base, key, result = sys.argv[1:]
    distribution, call = CLIENTS[name]
    heard = asyncio.run(call(base, key))
    told = {
        "version": importlib.metadata.version(distribution),
        "audio": heard.audio.hex(),
        "messages": heard.messages,
        "interrupted": heard.interrupted,
    }
    Path(result).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
