"""Pipecat's end of a telephone call, unmodified, in an environment of its own without anything of ours.

    python phone.py serve DIALECT PORT RESULT          a bot that says back what it hears, for one call
    python phone.py call DIALECT ENCODING URL HEADERS PARAMETERS SPEECH RESULT

Pipecat's serializers are the server's side of a carrier's protocol. `serve` is a whole server of Pipecat's
for the simulated carrier to call: that shows that the carrier sends what a server written for the real one
reads, and takes what it sends. `call` is that carrier calling ours, with Pipecat's code for the sound at its
end: what the caller says was coded by `serialize`, and what came is decoded by `deserialize`. The carrier
adds the numbers and stamps that only carriers send. HEADERS and PARAMETERS are JSON, SPEECH is float32 at
24 kHz, raw.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import carrier
import numpy as np
import uvicorn
import websockets
from fastapi import FastAPI, WebSocket
from pipecat.frames import frames
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.runner import PipelineRunner
from pipecat.pipeline.task import PipelineParams, PipelineTask
from pipecat.processors.frame_processor import FrameProcessor
from pipecat.runner.utils import parse_telephony_websocket
from pipecat.serializers.telnyx import TelnyxFrameSerializer
from pipecat.serializers.twilio import TwilioFrameSerializer
from pipecat.transports.websocket.fastapi import FastAPIWebsocketParams, FastAPIWebsocketTransport
from soundcard import SAMPLE_RATE, Pcm, likeness

LINE_RATE = 8_000


def serializer(dialect: str, stream: str, encoding: str, rate: int) -> Any:
    """`encoding`: PCMU or PCMA; `rate` of the sound that is not coded."""
    options = {"sample_rate": rate, "auto_hang_up": False}
    if dialect == "twilio":
        return TwilioFrameSerializer(stream, params=TwilioFrameSerializer.InputParams(**options))
    params = TelnyxFrameSerializer.InputParams(**options)
    return TelnyxFrameSerializer(stream, encoding, encoding, params=params)


class Echo(FrameProcessor):
    def __init__(self) -> None:
        super().__init__()
        self.digits = ""

    async def process_frame(self, frame: Any, direction: Any) -> None:
        await super().process_frame(frame, direction)
        if isinstance(frame, frames.InputAudioRawFrame):
            frame = frames.OutputAudioRawFrame(frame.audio, frame.sample_rate, frame.num_channels)
        elif isinstance(frame, frames.InputDTMFFrame):
            self.digits += frame.button.value
        await self.push_frame(frame, direction)


async def serve(dialect: str, port: str) -> dict[str, Any]:
    app = FastAPI()
    told: dict[str, Any] = {"version": importlib.metadata.version("pipecat-ai")}

    @app.websocket("/")
    async def bot(socket: WebSocket) -> None:
        await socket.accept()
        kind, call = await parse_telephony_websocket(socket)
        encoding = getattr(call, "outbound_encoding", None) or "PCMU"
        params = FastAPIWebsocketParams(
            audio_in_enabled=True,
            audio_out_enabled=True,
            serializer=serializer(dialect, call.stream_id or "", encoding, LINE_RATE),
        )
        transport, echo = FastAPIWebsocketTransport(socket, params), Echo()
        rates = PipelineParams(audio_in_sample_rate=LINE_RATE, audio_out_sample_rate=LINE_RATE)
        task = PipelineTask(Pipeline([transport.input(), echo, transport.output()]), params=rates)

        @transport.event_handler("on_client_disconnected")
        async def hang_up(*_: object) -> None:
            await task.cancel()

        await PipelineRunner(handle_sigint=False).run(task)
        told.update(kind=kind, stream=call.stream_id, body=call.body, digits=echo.digits)
        server.should_exit = True

    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=int(port), log_level="error"))
    await server.serve()
    return told


async def call(
    dialect: str, encoding: str, url: str, headers: str, parameters: str, speech: str
) -> dict[str, Any]:
    said = np.fromfile(speech, np.float32)
    talk = carrier.Call(carrier.DIALECTS[dialect], encoding)
    sound = await coded(serializer(dialect, talk.stream, encoding, SAMPLE_RATE), said)
    async with websockets.connect(url, additional_headers=json.loads(headers)) as socket:
        await carrier.talk(
            socket, talk, carrier.pieces(sound), parameters=json.loads(parameters), digits="1", stay_s=1.0
        )
        code = socket.close_code
    heard = await decoded(serializer(dialect, talk.stream, encoding, SAMPLE_RATE), talk.line.messages)
    line = carrier.Call(carrier.DIALECTS[dialect], encoding)
    direct = [line.media(piece) for piece in carrier.pieces(sound)]
    alone = await decoded(serializer(dialect, talk.stream, encoding, SAMPLE_RATE), direct)
    return {
        "version": importlib.metadata.version("pipecat-ai"),
        "heard_s": len(heard) / SAMPLE_RATE,
        "like": likeness(alone, heard) if len(heard) > SAMPLE_RATE else 0.0,
        "buffered_s": talk.line.buffered_s,
        "code": code,
    }


async def coded(line: Any, said: Pcm) -> bytes:
    """As `serialize` codes it, 80 ms at a time; bytes at 8 kHz."""
    await line.setup(None)  # what it asks of a pipeline is the rate, which it has
    sound = b""
    for frame in (said * 32_767).astype("<i2").reshape(-1, 1_920):
        message = await line.serialize(frames.OutputAudioRawFrame(frame.tobytes(), SAMPLE_RATE, 1))
        if message is not None:
            sound += base64.b64decode(json.loads(message)["media"]["payload"])
    return sound


async def decoded(line: Any, messages: list[str]) -> Pcm:
    """As `deserialize` decodes it; float32 [samples] at 24 kHz."""
    await line.setup(None)
    found = [await line.deserialize(message) for message in messages]
    data = b"".join(frame.audio for frame in found if frame is not None)
    return np.frombuffer(data, "<i2").astype(np.float32) / 32_768


def main() -> None:
    command, *words, result = sys.argv[1:]
    told = asyncio.run({"serve": serve, "call": call}[command](*words))
    Path(result).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
