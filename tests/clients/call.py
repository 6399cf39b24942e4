"""One call by somebody else's client, unmodified: `python call.py CLIENT URL SPEECH HEARD`.

Runs in the client's own environment, where nothing of ours is installed. SPEECH is what to say and HEARD what
came back, float32 at 24 kHz, raw. Prints the version of the client.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import importlib.util
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from soundcard import FRAME_SECONDS, FRAME_SIZE, SAMPLE_RATE, Pcm, SoundCard

TAIL_S = 1.5  # for the last answers


async def moshi(url: str, said: Pcm) -> Pcm:
    """`moshi.client`, without the package around it, which wants the model's dependencies."""
    import aiohttp

    card = SoundCard(said)
    found = importlib.util.find_spec("moshi")
    assert found is not None
    assert found.submodule_search_locations is not None
    package = types.ModuleType("stock_moshi")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules.update(stock_moshi=package, sounddevice=card.module)
    client = importlib.import_module("stock_moshi.client")
    async with aiohttp.ClientSession() as session, session.ws_connect(url) as socket:
        loop = asyncio.get_running_loop()
        connection = client.Connection(client.RawPrinter(stream=sys.stderr), socket, event_loop=loop)
        running = asyncio.ensure_future(connection.run())
        await asyncio.sleep(len(said) / SAMPLE_RATE + TAIL_S)
        await socket.close()
        await running
    return np.concatenate(card.played)


async def sphn(url: str, said: Pcm) -> Pcm:
    """Kyutai's own Ogg and Opus, by the book: the first message is the handshake, what follows has kinds."""
    import sphn as codec
    import websockets

    writer, reader = codec.OpusStreamWriter(SAMPLE_RATE), codec.OpusStreamReader(SAMPLE_RATE)
    heard: list[Pcm] = []

    async def listen(socket: Any) -> None:
        async for message in socket:
            if message[0] == 1:
                heard.append(reader.append_bytes(message[1:]))

    async with websockets.connect(url) as socket:
        assert await socket.recv() == b"\x00", "the handshake is the first message"
        listening = asyncio.ensure_future(listen(socket))
        began = time.monotonic()
        for number, frame in enumerate(said.reshape(-1, FRAME_SIZE)):
            await asyncio.sleep(max(0.0, began + number * FRAME_SECONDS - time.monotonic()))
            await socket.send(b"\x01" + writer.append_pcm(frame))
        await asyncio.sleep(TAIL_S)
        await socket.close()
        await asyncio.gather(listening, return_exceptions=True)
    return np.concatenate(heard)


async def fujielab(url: str, said: Pcm) -> Pcm:
    """Its library, as its own example uses it."""
    from fujielab.moshi.moshi_client_lib import MoshiClient

    def call() -> Pcm:
        client, heard = MoshiClient(), []
        client.connect(url)
        began = time.monotonic()
        for number, frame in enumerate(said.reshape(-1, FRAME_SIZE)):
            while (rest := began + number * FRAME_SECONDS - time.monotonic()) > 0:
                heard.append(client.get_audio_output(timeout=rest))
            client.add_audio_input(frame)
        while (rest := began + len(said) / SAMPLE_RATE + TAIL_S - time.monotonic()) > 0:
            heard.append(client.get_audio_output(timeout=rest))
        client.disconnect()
        return np.concatenate([frame for frame in heard if frame is not None])

    return await asyncio.to_thread(call)


async def livekit(url: str, said: Pcm) -> Pcm:
    """The plugin's realtime session, fed and heard as LiveKit's agents do."""
    import aiohttp
    from livekit import rtc
    from livekit.plugins.nvidia.experimental.realtime import RealtimeModel

    heard: list[Pcm] = []
    listeners: list[asyncio.Task[None]] = []

    async def listen(generation: Any) -> None:
        async for message in generation.message_stream:
            async for frame in message.audio_stream:
                heard.append(np.frombuffer(frame.data, np.int16).astype(np.float32) / 32_768)

    async with aiohttp.ClientSession() as http:
        model = RealtimeModel(base_url=f"ws://{urlsplit(url).netloc}", http_session=http)
        session = model.session()
        session.on("generation_created", lambda event: listeners.append(asyncio.create_task(listen(event))))
        await asyncio.wait_for(session._handshake_event.wait(), 20)
        began = time.monotonic()
        for number, frame in enumerate((said * 32_767).astype(np.int16).reshape(-1, FRAME_SIZE)):
            await asyncio.sleep(max(0.0, began + number * FRAME_SECONDS - time.monotonic()))
            session.push_audio(rtc.AudioFrame(frame.tobytes(), SAMPLE_RATE, 1, FRAME_SIZE))
        await asyncio.sleep(TAIL_S)
        await session.aclose()
        await model.aclose()
        await asyncio.gather(*listeners, return_exceptions=True)
    return np.concatenate(heard)


CLIENTS: dict[str, tuple[str, Callable[[str, Pcm], Any]]] = {
    "moshi": ("moshi", moshi),
    "sphn": ("sphn", sphn),
    "fujielab": ("fujielab-moshi-client", fujielab),
    "livekit": ("livekit-plugins-nvidia", livekit),
}


def main() -> None:
    name, url, speech, output = sys.argv[1:]
    distribution, call = CLIENTS[name]
    heard = asyncio.run(call(url, np.fromfile(speech, np.float32)))
    Path(output).write_bytes(heard.astype(np.float32).tobytes())
    print(importlib.metadata.version(distribution))


if __name__ == "__main__":
    main()
