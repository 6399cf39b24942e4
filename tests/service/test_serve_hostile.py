"""Hostile clients: each is told what is wrong, nobody else notices, and nothing is left of them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import websockets
from exported import HELD, gauges
from serving import Client, Heard, Service, connect, running, speech

from deployments import metrics
from personaplex.audio.ogg import OggMuxer
from personaplex.config import FRAME_SECONDS
from personaplex.session.core import BYTE_BURST, MESSAGE_BURST
from personaplex.session.moshi import MESSAGE_LIMIT, Audio

SLOTS = 8
SESSIONS = 500
AT_ONCE = 25


@pytest.fixture(scope="module")
def service(cluster: str) -> Iterator[Service]:
    with running(
        cluster, model="echo", slots=SLOTS, queue_limit=SESSIONS, queue_timeout_s=20.0, metrics_page=True
    ) as service:
        yield service


QUERIES = {
    "text_temperature=nan": 400,
    "text_temperature=inf": 400,
    "text_temperature=1e999": 400,
    "text_temperature=-0.1": 400,
    "audio_temperature=0x1": 400,
    "audio_temperature=1_0": 400,
    "audio_temperature=%D9%A3": 400,  # a digit, but not one of ours
    "audio_topk=2.5": 400,
    "audio_topk=99999999": 400,
    "text_topk=-1": 400,
    "text_seed=-2": 400,
    f"audio_seed={2**63}": 400,
    "seed=" + "9" * 5_000: 400,
    "voice_prompt=../../../../etc/passwd": 400,
    "voice_prompt=%2Fetc%2Fpasswd": 400,
    "voice_prompt=NATF2%00.pt": 400,
    "voice_prompt=..%2Fvoices%2FNATF2.pt": 400,
    "voice_prompt=NOBODY": 1008,
    "text_prompt=" + "a" * 4_100: 1008,  # more tokens than the service takes
    "text_prompt=" + "a" * 17_000: 400,  # a longer query than it takes
    "text_prompt=%FF%FE": 400,
    "text_prompt=%ED%A0%80": 400,
    "&".join(f"a{number}=1" for number in range(100)): 400,
}


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query[:40])
def test_a_query_that_cannot_be_served_is_answered(service: Service, query: str) -> None:
    """Before the upgrade where a gateway can tell, else, by a replica, with a close code."""

    async def run() -> tuple[int | None, str]:
        try:
            async with websockets.connect(f"{service.chat}?{query}") as socket:
                client = Client(socket)
                heard = await client.until_closed(5.0)
                await client._reader
        except websockets.InvalidStatus as refused:
            return refused.response.status_code, refused.response.body.decode()
        assert heard.complaint.startswith(heard.reason)
        assert heard.reason
        assert not heard.live
        return heard.code, heard.complaint

    code, words = asyncio.run(run())
    assert code == QUERIES[query]
    assert words
    assert "passwd" not in words


Attack = Callable[[Client], Awaitable[None]]


def _message(data: bytes | str) -> Attack:
    async def attack(client: Client) -> None:
        await client.socket.send(data)

    return attack


def _flood(message: bytes | str, budget: float) -> Attack:
    async def attack(client: Client) -> None:
        for _ in range(int(1.25 * budget)):
            await client.socket.send(message)

    return attack


async def _flood_audio(client: Client) -> None:
    """A file of 20 s all at once: half a minute of it would be, too."""
    await client.headers()
    await client.speak(np.tile(speech(8.0), 3), pace_s=0.0)


async def _endless_junk(client: Client) -> None:
    for _ in range(40):
        await client.socket.send(b"\x01" + random.Random(1).randbytes(60_000))


async def _hostile_lacing(client: Client) -> None:
    """Packets that never end, page after page."""
    await client.headers()
    muxer = OggMuxer(1)
    muxer.headers(24_000, 0)
    page = bytearray(muxer.page([bytes(255)], 0))
    for _ in range(400):
        await client.socket.send(b"\x01" + bytes(page[:26]) + b"\xff" + b"\xff" * 255 + bytes(255 * 255))


ATTACKS: dict[str, tuple[Attack, int]] = {
    "a huge message": (_message(b"\x01" + bytes(MESSAGE_LIMIT)), 1009),
    "a flood of messages": (_flood(b"\x06", MESSAGE_BURST), 1002),
    "a flood of empty messages": (_flood(b"", MESSAGE_BURST), 1002),
    "a flood of text": (_flood("a" * 100_000, BYTE_BURST / 100_000), 1002),
    "a WebM recorder": (_message(b"\x01\x1aE\xdf\xa3\x9fB\x86\x81\x01"), 1007),
    "a sip of raw audio": (_message(b"\x01" + bytes(1_920)), 1007),
    "audio faster than time": (_flood_audio, 1002),
    "junk without a page": (_endless_junk, 1002),
    "packets without an end": (_hostile_lacing, 1002),
}


async def _attack(service: Service, attack: Attack) -> Heard:
    async with connect(service, voice_prompt="NATM1") as client:
        with contextlib.suppress(websockets.ConnectionClosed):
            await client.headers()
            await client.until(lambda heard: heard.live)
            await attack(client)
        return await client.until_closed(20.0)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_answered(service: Service, name: str) -> None:
    attack, code = ATTACKS[name]
    heard = asyncio.run(_attack(service, attack))
    assert heard.code == code
    assert heard.complaint or (code == 1009 and heard.reason), "the proxy speaks no protocol of ours"


def test_messages_of_no_use_end_nothing(service: Service) -> None:
    """Text frames, empty messages, unknown kinds, long ones of known kinds: stock servers ignore them all."""
    useless: list[bytes | str] = [
        "hello",
        b"",
        b"\x07abc",
        b"\xff",
        b"\x04" + b"[" * 60_000,
        b"\x02" + b"a" * 9_000,
    ]

    async def run() -> Heard:
        async with connect(service) as client:
            for message in useless:
                await client.socket.send(message)
            await client.until(lambda heard: heard.live)
            for message in useless:
                await client.socket.send(message)
            return await client.talk(speech(0.8))

    assert asyncio.run(run()).last_frame == 8, "all but what the encoder keeps back"


def test_a_query_of_nine_kilobytes_is_served(service: Service) -> None:
    """1000 Chinese characters, the longest prompt stock web clients let people write."""

    async def run() -> None:
        async with connect(service, text_prompt="你" * 1_000) as client:
            assert len(quote("你" * 1_000)) == 9_000
            await client.headers()
            await client.until(lambda heard: heard.live)

    asyncio.run(run())


async def _random_bytes(service: Service, seed: int) -> None:
    draw = random.Random(seed)
    with contextlib.suppress(websockets.ConnectionClosed):
        async with connect(service) as client:
            for _ in range(draw.randrange(20)):
                await client.socket.send(
                    bytes([draw.choice((0, 1, 1, 1, 2, 3, 4, 6, 9))]) + draw.randbytes(200)
                )
            if draw.random() < 0.5:
                client.socket.transport.abort()


async def _leave_early(service: Service, seed: int) -> None:
    """Goes away at any point of the opening, with or without a word."""
    draw = random.Random(seed)
    async with connect(service) as client:
        if draw.random() < 0.7:
            await client.headers()
        await asyncio.sleep(draw.random() * 0.1)
        if draw.random() < 0.5:
            client.socket.transport.abort()


async def _half_a_handshake(service: Service, seed: int) -> None:
    host, _, port = service.base.partition("/")[0].partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"GET /{service.name}/api/chat HTTP/1.1\r\nUpgrade: webs".encode())
    await writer.drain()
    await asyncio.sleep(random.Random(seed).random() * 0.05)
    writer.close()


async def _wrong_query(service: Service, seed: int) -> None:
    query = random.Random(seed).choice(list(QUERIES))
    with contextlib.suppress(websockets.ConnectionClosed, websockets.InvalidStatus):
        async with websockets.connect(f"{service.chat}?{query}") as socket:
            while True:
                await socket.recv()


async def _quick_attack(service: Service, seed: int) -> None:
    quick = [attack for name, (attack, _) in ATTACKS.items() if "flood" not in name and "without" not in name]
    with contextlib.suppress(websockets.ConnectionClosed):
        async with connect(service) as client:
            await random.Random(seed).choice(quick)(client)
            await client.until_closed(20.0)


CROWD = (_random_bytes, _leave_early, _half_a_handshake, _wrong_query, _quick_attack)


def _process(service: Service, deployment: str) -> int:
    wanted = f"ray::ServeReplica:{service.name}:{deployment}"
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and (entry / "cmdline").read_bytes().decode().startswith(wanted):
                return int(entry.name)
    raise AssertionError(f"no process {wanted}")


def _descriptors(service: Service) -> dict[str, int]:
    return {
        deployment: len(os.listdir(f"/proc/{_process(service, deployment)}/fd"))
        for deployment in ("gateway", "replica")
    }


def _crowd(service: Service, first: int, count: int) -> None:
    """`count` hostile clients, AT_ONCE of them at any time."""

    async def run() -> None:
        numbers = iter(range(first, first + count))

        async def worker() -> None:
            for number in numbers:
                with contextlib.suppress(OSError, websockets.InvalidHandshake):
                    await CROWD[number % len(CROWD)](service, number)

        await asyncio.gather(*(worker() for _ in range(AT_ONCE)))

    asyncio.run(run())


def test_five_hundred_hostile_sessions_leave_nothing_behind(service: Service) -> None:
    _crowd(service, 0, 50)  # pools and caches are filled by the first ones
    service.wait_idle()
    before, tasks = _descriptors(service), _settled(service)
    _crowd(service, 50, SESSIONS)
    service.wait_idle(15.0)
    assert _settled(service) <= tasks + 3  # Ray's own come and go
    assert gauges(service, *HELD) == {one.name: 0 for one in HELD}
    for name, count in _descriptors(service).items():
        assert count <= before[name] + 5, (name, before)


def _settled(service: Service) -> float:
    """The gateway's tasks once no session is left: clients end before their servers notice."""
    deadline = time.monotonic() + 15
    while any((found := gauges(service, metrics.SESSIONS_OPEN)).values()):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    time.sleep(2.5)  # for timers of closed sockets
    return gauges(service, metrics.TASKS)[metrics.TASKS.name]


def test_a_bystander_notices_nothing(service: Service) -> None:
    """A real session talks through attacks of every kind, one after the other, and hears its answers in time.
    A few frames may be missing where the machine itself stood still: the pacer leaves them out."""

    async def run() -> tuple[Client, list[float]]:
        async with connect(service) as client:
            talking = asyncio.ensure_future(client.talk(speech(8.0)))
            for attack, _ in itertools.cycle(ATTACKS.values()):
                if talking.done():
                    break
                with contextlib.suppress(AssertionError, asyncio.TimeoutError):
                    await asyncio.wait(
                        {asyncio.ensure_future(_attack(service, attack)), talking}, timeout=1.0
                    )
            await talking
            return client, [at for at, message in client.heard.messages if isinstance(message, Audio)][2:]

    client, times = asyncio.run(run())
    gaps = np.diff(times)
    assert client.heard.last_frame == len(client.decoded()) - 1
    assert len(client.heard.pages) >= 0.9 * len(client.decoded())
    assert np.median(gaps) == pytest.approx(FRAME_SECONDS, abs=0.01)
    assert np.percentile(gaps, 90) < 2.5 * FRAME_SECONDS
    service.wait_idle(25.0)
