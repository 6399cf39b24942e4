"""Clients that others wrote, unmodified, against a service that says back what it hears.

- Kyutai's Python client (`moshi.client` on PyPI, installed without its dependencies), with our sound card;
- a client made of `sphn`, Kyutai's own Opus and Ogg, by the book;
- what browsers really sent: recordings of opus-recorder (NVIDIA's web client) and of WebCodecs, page by page;
- opus-recorder's decoder, which NVIDIA's page plays with, under node, if `make test` could fetch it.

`make test-clients` runs more of them, each in an environment of its own.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import sys
import time
import types
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import sphn
import websockets
from clients.matrix import decoded, decoder_worker
from clients.soundcard import SoundCard, likeness
from numpy.typing import NDArray
from serving import Client, Service, connect, speech

from personaplex.audio.ogg import OggDemuxer
from personaplex.audio.opus import packet_samples
from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SECONDS, FRAME_SIZE, SAMPLE_RATE

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def service(echo_app: Service) -> Service:
    return echo_app


def _moshi_client(card: SoundCard, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `moshi.client`, without the package around it, which wants the model's dependencies."""
    found = importlib.util.find_spec("moshi")
    assert found is not None, "pip install --no-deps moshi"
    assert found.submodule_search_locations is not None
    package = types.ModuleType("stock_moshi")
    package.__path__ = list(found.submodule_search_locations)
    monkeypatch.setitem(sys.modules, "stock_moshi", package)
    monkeypatch.setitem(sys.modules, "sounddevice", card.module)
    for name in ("client", "client_utils"):
        monkeypatch.delitem(sys.modules, f"stock_moshi.{name}", raising=False)
    return importlib.import_module("stock_moshi.client")


def test_kyutais_python_client_holds_a_conversation(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It sends its stream at once, waits for no handshake and needs both header pages."""
    said = speech(4.0)
    card = SoundCard(said)
    client = _moshi_client(card, monkeypatch)

    async def run() -> None:
        async with aiohttp.ClientSession() as session, session.ws_connect(service.chat) as socket:
            printer = client.RawPrinter()
            connection = client.Connection(printer, socket, event_loop=asyncio.get_running_loop())
            running = asyncio.ensure_future(connection.run())
            await asyncio.sleep(5.5)
            await socket.close()
            await running

    asyncio.run(run())
    assert likeness(said, np.concatenate(card.played)) > 0.6
    assert "Lost connection" not in capsys.readouterr().out


def test_a_client_made_of_sphn_hears_itself(service: Service) -> None:
    said = speech(4.0)

    async def run() -> NDArray[np.float32]:
        writer, reader = sphn.OpusStreamWriter(SAMPLE_RATE), sphn.OpusStreamReader(SAMPLE_RATE)
        heard: list[NDArray[np.float32]] = []

        async def listen(socket: Any) -> None:
            async for message in socket:
                if message[:1] == b"\x01":
                    heard.append(reader.append_bytes(message[1:]))

        async with websockets.connect(service.chat) as socket:
            assert (await socket.recv())[:1] == b"\x00", "the handshake is the first message"
            listening = asyncio.ensure_future(listen(socket))
            began = time.monotonic()
            for number, frame in enumerate(said.reshape(-1, FRAME_SIZE)):
                await asyncio.sleep(began + number * FRAME_SECONDS - time.monotonic())
                await socket.send(b"\x01" + writer.append_pcm(frame))
            await asyncio.sleep(1.0)
            await socket.close()
            await listening
        return np.concatenate(heard)

    heard = asyncio.run(run())
    assert len(heard) >= len(said) - 4 * FRAME_SIZE
    assert likeness(said, heard) > 0.6


def _pages(data: bytes) -> list[bytes]:
    starts = [0]
    while (found := data.find(b"OggS", starts[-1] + 4)) >= 0:
        starts.append(found)
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


@pytest.mark.parametrize("recording", ["web.ogg", "webcodecs.ogg"])
def test_what_browsers_send_is_understood(service: Service, recording: str) -> None:
    """Head and tags as two messages once the handshake is there, then each page when its time has come."""
    pages = _pages((DATA / recording).read_bytes())
    said = np.concatenate(Transcoder().receive(b"".join(pages)))[: 4 * SAMPLE_RATE]

    async def run() -> Client:
        async with connect(service) as client:
            began = time.monotonic()
            heard = await client.until(lambda heard: heard.live)
            assert heard.messages[-1][0] - began > 1.0  # no earlier: their decoder takes a second to start
            clock = Transcoder()
            began, sent = time.monotonic(), 0
            for page in pages:
                await asyncio.sleep(began + sent * FRAME_SECONDS - time.monotonic())
                await client.send(page)
                sent += len(clock.receive(page))
                if sent * FRAME_SIZE >= len(said):
                    break
            await client.until(lambda heard: heard.last_frame >= sent - 1)
        return client

    client = asyncio.run(run())
    listener = Transcoder()
    heard = np.concatenate(
        [frame for page in [*client.headers_heard(), *client.heard.pages] for frame in listener.receive(page)]
    )
    assert likeness(said, heard) > 0.6


def test_the_decoder_of_nvidias_page_plays_it(service: Service) -> None:
    worker = decoder_worker(fetch=False)
    if worker is None:
        pytest.skip("opus-recorder is not there: make test fetches it where node and npm are")
    said = speech(4.0)

    async def run() -> Client:
        async with connect(service) as client:
            await client.talk(said)
        return client

    client = asyncio.run(run())
    heard = decoded(worker, [*client.headers_heard(), *client.heard.pages])
    assert len(heard) >= len(said) - 4 * FRAME_SIZE
    assert likeness(said, heard) > 0.6


def test_pages_are_what_stock_decoders_accept(service: Service) -> None:
    """Whole pages, one a message; OpusHead is 0, OpusTags 1, audio from 2 on, one packet of 80 ms in each."""

    async def run() -> Client:
        async with connect(service) as client:
            await client.talk(speech(1.6))
        return client

    client = asyncio.run(run())
    head, tags = client.headers_heard()
    assert [page[18:22] for page in (head, tags)] == [bytes(4), b"\x01\x00\x00\x00"]
    assert (head[5], head[26], head[28:36]) == (2, 1, b"OpusHead")
    assert tags.find(b"OpusTags") > 0
    serials = {page[14:18] for page in (head, tags, *client.heard.pages)}
    assert len(serials) == 1
    numbers = [int.from_bytes(page[18:22], "little") for page in client.heard.pages]
    assert numbers[0] == 2
    assert numbers == sorted(set(numbers)), "a busy gateway leaves one out, none comes twice"
    for page in client.heard.pages:
        assert page.count(b"OggS") == 1
        _, packet = OggDemuxer().feed(head + tags + page)
        assert isinstance(packet, bytes)
        assert packet_samples(packet) == FRAME_SIZE
