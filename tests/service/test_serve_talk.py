"""The embedded model answers a person over the stock protocol: it says the name that its role text gives."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from urllib.parse import urlencode

import numpy as np
import pytest
import websockets
from serving import Client, Service, running
from talk.record import read

from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SIZE
from personaplex.training.behaviour import World, intent_of
from personaplex.training.score import transcript
from personaplex.training.unseen import Caller

BEFORE, AFTER = 6, 75  # frames of silence


@pytest.fixture(scope="module")
def service(cluster: str) -> Iterator[Service]:
    with running(cluster, model="talk", slots=4) as service:
        yield service


def callers() -> list[tuple[Caller, World]]:
    """Who ask for the name, in wordings that training knows, and in others."""
    return [(caller, world) for caller, world in read() if caller.intent == "name"][:4]


async def ask(service: Service, caller: Caller, world: World) -> tuple[str, np.ndarray]:
    """What the agent writes and says to one caller, who is a stock client: it asks for no status."""
    query = {"text_prompt": world.role, "voice_prompt": f"{world.voice}.pt", "text_seed": 3, "audio_seed": 4}
    async with websockets.connect(f"{service.chat}?{urlencode(query)}", max_size=None) as socket:
        client = Client(socket)
        await client.headers()
        await client.until(lambda heard: heard.live)
        length = -(-len(caller.wave) // FRAME_SIZE) * FRAME_SIZE
        wave = np.pad(caller.wave, (0, length - len(caller.wave)))
        await client.speak(np.pad(wave, (BEFORE * FRAME_SIZE, AFTER * FRAME_SIZE)).astype(np.float32))
        await client.until(lambda heard: heard.last_frame >= len(client.decoded()) - 1)
        player = Transcoder()
        pages = [*client.headers_heard(), *client.heard.pages]
        said = np.concatenate([frame for page in pages for frame in player.receive(page)])
        text = client.heard.text
        await socket.close()
    return text, said


def test_who_asks_for_the_name_is_told_it(service: Service) -> None:
    """Four at a time, on two cores: what it writes, and that it says so aloud."""

    async def run() -> list[tuple[str, np.ndarray]]:
        return await asyncio.gather(*(ask(service, *one) for one in callers()))

    names = [world.known.name for _, world in callers()]
    answers = list(zip(asyncio.run(run()), names, strict=True))
    written = [intent_of(text) == "name" and name in text for (text, _), name in answers]
    assert sum(written) >= 3, answers
    heard = [transcript(said) for (_, said), _ in answers]
    assert sum("my name is" in text.lower() for text in heard) >= 3, heard
