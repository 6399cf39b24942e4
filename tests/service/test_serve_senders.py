"""Whoever sends legal Ogg Opus in real time is heard whole, whatever its packets, pages and bursts.

All shapes talk at once, as sessions of one service with the echo engine. Each says tones that change with
every frame, so that what comes back shows by itself whether any is missing, twice or out of order.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import websockets
from numpy.typing import NDArray
from serving import Service, running

from personaplex.audio.ogg import OggMuxer
from personaplex.audio.opus import OpusEncoder
from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SECONDS, FRAME_SIZE, SAMPLE_RATE

Pcm = NDArray[np.float32]
Post = tuple[float, bytes]  # seconds since the handshake, a piece of the sender's Ogg stream

TONES = 16  # told apart easily; 200 Hz from one to the next
LATE_S = 3.0  # beyond a burst: a busy machine
SLEEP_S = 20.0


def tones(seconds: float, start: float = 0.0) -> Pcm:
    """Frame n of it is tone n, over and over; float32 [samples]."""
    samples = np.arange(round(start * SAMPLE_RATE), round((start + seconds) * SAMPLE_RATE))
    hertz = 400 + 200 * (samples // FRAME_SIZE % TONES)
    return np.asarray(0.3 * np.sin(2 * np.pi * hertz * samples / SAMPLE_RATE), np.float32)


def ogg(pcm: Pcm, packet_s: float, page_s: float, serial: int = 1) -> list[bytes]:
    """Head, tags, and pages of `page_s` with packets of `packet_s`."""
    encoder, muxer = OpusEncoder(), OggMuxer(serial)
    size, count = round(packet_s * SAMPLE_RATE), round(page_s / packet_s)
    pcm = np.pad(pcm, (0, -len(pcm) % size))
    packets = [encoder.encode(pcm[start : start + size]) for start in range(0, len(pcm), size)]
    pages = [packets[start : start + count] for start in range(0, len(packets), count)]
    return [*muxer.headers(2 * encoder.lookahead), *(muxer.page(page, 0) for page in pages)]


def paged(packet_s: float, page_s: float, seconds: float = 10.0) -> list[Post]:
    """A page as soon as it is full."""
    head, tags, *pages = ogg(tones(seconds), packet_s, page_s)
    return [
        (0.0, head),
        (0.0, tags),
        *((number * page_s, page) for number, page in enumerate(pages, start=1)),
    ]


def bursts(seconds: float) -> list[Post]:
    """Pages of 20 ms that leave only every `seconds`, all at once: a stalled uplink."""
    return [(math.ceil(at / seconds - 1e-9) * seconds, data) for at, data in paged(0.02, 0.02, 2.5 * seconds)]


def scattered() -> list[Post]:
    """Pages of a second cut into messages anywhere."""
    pieces: list[Post] = []
    for at, data in paged(0.02, 1.0):
        cuts = [0, *range(1, len(data), 977), len(data)]
        pieces += [(at, data[a:b]) for a, b in itertools.pairwise(cuts)]
    return pieces


def restarted(times: int, said_s: float, muted_s: float) -> list[Post]:
    """A recorder that is ended at each mute and begins a new stream at each unmute."""
    posts: list[Post] = []
    for turn in range(times):
        began, start = turn * (said_s + muted_s), turn * said_s
        head, tags, *pages = ogg(tones(said_s, start), 0.02, 0.04, serial=turn)
        posts += [(began, head), (began, tags)]
        posts += [(began + 0.04 * number, page) for number, page in enumerate(pages, start=1)]
    return posts


def files(each_s: float) -> list[Post]:
    """A whole file in each message."""
    posts = restarted(round(10 / each_s), each_s, 0.0)
    heads = [number for number, (_, data) in enumerate(posts) if b"OpusHead" in data]
    spans = itertools.pairwise([*heads, len(posts)])
    return [(posts[end - 1][0], b"".join(data for _, data in posts[start:end])) for start, end in spans]


def asleep() -> list[Post]:
    """A machine that sleeps and goes on where it was."""
    posts = paged(0.02, 0.08, 4.0)
    return [(at + SLEEP_S * (at > 2.0), data) for at, data in posts]


@dataclasses.dataclass(frozen=True)
class Shape:
    posts: Callable[[], list[Post]]
    share: float = 0.97  # of answers, at least
    early: bool = False  # talks without waiting for the handshake


SHAPES = {
    **{
        f"packets of {1e3 * packet:g} ms, pages of {1e3 * page:g} ms": Shape(
            lambda packet=packet, page=page: paged(packet, page)
        )
        for packet, page in (
            *((0.0025, 0.0025), (0.0025, 0.02), (0.005, 0.02), (0.01, 0.04), (0.02, 0.02), (0.02, 0.04)),
            *((0.04, 0.08), (0.06, 0.06), (0.08, 0.08), (0.1, 0.1), (0.12, 0.12)),
            *((0.02, 0.5), (0.02, 0.8), (0.02, 1.0), (0.06, 1.2), (0.02, 2.0), (0.12, 1.92)),
        )
    },
    "pages of 5 s": Shape(lambda: paged(0.02, 5.0, 15.0), share=0.9),
    "bursts of 3 s": Shape(lambda: bursts(3.0)),
    "bursts of 6 s": Shape(lambda: bursts(6.0)),
    "pages cut anywhere": Shape(scattered),
    "a file for each second": Shape(lambda: files(1.0)),
    "a file for each 80 ms": Shape(lambda: files(0.08)),
    "mute by restart, 12 times": Shape(lambda: restarted(12, 0.8, 0.4)),
    "a sleep of 20 s": Shape(asleep),
    "talks first": Shape(lambda: paged(0.02, 0.08), early=True),
    "talks first, pages of 2 s": Shape(lambda: paged(0.02, 2.0), early=True),
}


@dataclasses.dataclass
class Heard:
    """What came of one sender; `code` is None while the session lasted to its end."""

    expected: int
    pages: list[tuple[float, bytes]] = dataclasses.field(default_factory=list)
    code: int | None = None
    reason: str = ""

    @property
    def numbers(self) -> list[int]:
        return [int.from_bytes(page[18:22], "little") for _, page in self.pages[2:]]


async def converse(url: str, posts: list[Post], early: bool) -> Heard:
    """Holds the conversation; returns when it was answered or nothing has come for LATE_S after a burst."""
    ear = Transcoder()
    heard = Heard(sum(len(ear.receive(data)) for _, data in posts))
    live, news = asyncio.Event(), asyncio.Event()

    async def listen(socket: websockets.ClientConnection) -> None:
        async for message in socket:
            assert isinstance(message, bytes)
            if message[0] == 0:
                live.set()
            elif message[0] == 1:
                heard.pages.append((time.monotonic(), message[1:]))
                news.set()

    async with websockets.connect(url, max_size=None, compression=None) as socket:
        listening = asyncio.ensure_future(listen(socket))
        try:
            if not early:
                await asyncio.wait_for(live.wait(), 20)
            began = time.monotonic()
            for at, data in posts:
                await asyncio.sleep(max(0.0, began + at - time.monotonic()))
                await socket.send(b"\x01" + data)
            while len(heard.pages) - 2 < heard.expected:
                news.clear()
                await asyncio.wait_for(news.wait(), LATE_S)
        except (TimeoutError, asyncio.TimeoutError):
            pass
        except websockets.ConnectionClosed:
            heard.code, heard.reason = socket.close_code, socket.close_reason or ""
        await socket.close()
        await asyncio.gather(listening, return_exceptions=True)
    return heard


@pytest.fixture(scope="module")
def service(cluster: str) -> Iterator[Service]:
    with running(cluster, model="echo", slots=len(SHAPES), session_limit_s=90.0) as service:
        yield service


@pytest.fixture(scope="module")
def conversations(service: Service) -> dict[str, Heard]:
    posts = {name: shape.posts() for name, shape in SHAPES.items()}

    async def run() -> list[Heard]:
        return await asyncio.gather(
            *(converse(service.chat, posts[name], shape.early) for name, shape in SHAPES.items())
        )

    return dict(zip(SHAPES, asyncio.run(run()), strict=True))


@pytest.mark.parametrize("name", SHAPES)
def test_a_legal_sender_is_heard_whole(conversations: dict[str, Heard], name: str) -> None:
    heard, shape = conversations[name], SHAPES[name]
    assert heard.code is None, heard.reason
    assert len(heard.numbers) >= shape.share * heard.expected
    assert heard.numbers == sorted(set(heard.numbers)), "in order, none twice"
    steps = np.diff(said(heard)) % TONES
    assert set(steps) <= {0, 1, 2, 3}, "two in a row may be left out; nothing of before comes again"
    assert np.mean(steps == 1) > 0.9


@pytest.mark.parametrize("name", SHAPES)
def test_answers_come_one_by_one(conversations: dict[str, Heard], name: str) -> None:
    moments = np.array([moment for moment, _ in conversations[name].pages[2:]])
    within = np.searchsorted(moments, moments + 2.0) - np.arange(len(moments))
    assert within.max() <= 2.0 / FRAME_SECONDS + 4, "what a busy machine may join"


def said(heard: Heard) -> NDArray[np.int64]:
    """Which tone each whole frame is, by its strongest frequency."""
    ear = Transcoder()
    frames = np.stack([frame for _, page in heard.pages for frame in ear.receive(page)])
    loud = frames[np.abs(frames).max(axis=1) > 0.05]
    spectrum = np.abs(np.fft.rfft(loud * np.hanning(FRAME_SIZE)))
    hertz = spectrum.argmax(axis=1) * SAMPLE_RATE / FRAME_SIZE
    return np.asarray(np.round((hertz - 400) / 200), np.int64) % TONES
