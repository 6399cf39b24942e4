"""Slots and who gets them: queueing, pinning, failover, autoscaling, and clients that go without a word."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator

import numpy as np
import pytest
import websockets
from serving import Client, Heard, Service, connect, running, speech
from websockets.http11 import Response

from deployments.replica.unauthenticated import SPARE
from deployments.wire import messages
from deployments.wire.handshake import CHALLENGE_BYTES, GatewayHandshake, Keyring
from deployments.wire.messages import Grant, LeaseRequest, MessageKind
from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SECONDS
from personaplex.persona import Persona
from personaplex.session.moshi import Audio


async def _join(stack: contextlib.AsyncExitStack, service: Service) -> Client:
    """A client that is live when this returns: it says something, so nobody waits for its decoder."""
    client = await stack.enter_async_context(connect(service))
    await client.headers()
    await client.until(lambda heard: heard.live)
    return client


@pytest.fixture(scope="module")
def pair(cluster: str) -> Iterator[Service]:
    """Two replicas of two slots, filled one after the other."""
    with running(
        cluster, model="echo", slots=2, replicas_min=2, replicas_max=2, queue_timeout_s=2.0, queue_limit=2
    ) as service:
        yield service


def test_a_full_service_queues_tells_and_admits_in_order(pair: Service) -> None:
    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            first, *_ = [await _join(stack, pair) for _ in range(4)]
            waiting = []
            for place in (1, 2):
                client = await stack.enter_async_context(connect(pair))
                await client.headers()
                await client.until(lambda heard, place=place: heard.queue == [place])
                waiting.append(client)
            assert pair.info()["queued"] == 2
            await first.socket.close()
            left = time.monotonic()
            await waiting[0].until(lambda heard: heard.live)
            assert time.monotonic() - left < 2.0
            await waiting[1].until(lambda heard: heard.queue == [2, 1])
            assert not waiting[1].heard.live
            assert waiting[0].heard.queue == [1, 0]

    asyncio.run(run())
    pair.wait_idle()


def test_a_wait_is_bounded_and_so_is_the_queue(pair: Service) -> None:
    async def run() -> tuple[Response, list[Heard]]:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(4):
                await _join(stack, pair)
            patient = [await stack.enter_async_context(connect(pair)) for _ in range(2)]
            for client in patient:
                await client.until(lambda heard: heard.queue)
            began = time.monotonic()
            with pytest.raises(websockets.InvalidStatus) as caught:
                await stack.enter_async_context(connect(pair))
            assert time.monotonic() - began < 1.0
            assert (await asyncio.to_thread(pair.get, "api/admission")).status_code == 503
            return caught.value.response, [await client.until_closed() for client in patient]

    refused, expired = asyncio.run(run())
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    assert b"full" in refused.body
    for heard in expired:
        assert heard.code == 1013
        assert heard.complaint == heard.reason
        assert "in time" in heard.reason
    pair.wait_idle()


def test_pack_fills_one_replica_before_the_next_and_sessions_stay(pair: Service) -> None:
    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            seen = []
            for _ in range(4):
                await _join(stack, pair)
                await asyncio.sleep(0.1)  # for the replica's report
                seen.append(sorted(await asyncio.to_thread(pair.used)))
            assert seen == [[0, 1], [0, 2], [1, 2], [2, 2]]

    asyncio.run(run())
    pair.wait_idle()


def test_a_client_that_vanishes_frees_its_slot(pair: Service) -> None:
    """No close frame: the process is gone, as after a crash or a pulled plug of the tab."""

    async def run() -> None:
        async with connect(pair) as client:
            await client.headers()
            await client.until(lambda heard: heard.live)
            await asyncio.to_thread(pair.wait, lambda seen: sum(one.used for one in seen) == 1)
            client.socket.transport.abort()
            assert await asyncio.to_thread(pair.wait_idle, 2.0) < 2.0
            assert await asyncio.to_thread(pair.used) == [0, 0]

    asyncio.run(run())


def test_a_client_that_leaves_the_queue_leaves_no_trace(pair: Service) -> None:
    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            holders = [await _join(stack, pair) for _ in range(4)]
            async with connect(pair) as impatient:
                await impatient.until(lambda heard: heard.queue)
            async with connect(pair) as patient:
                await patient.headers()
                await patient.until(lambda heard: heard.queue == [1])
                await holders[0].socket.close()
                await patient.until(lambda heard: heard.live)

    asyncio.run(run())
    pair.wait_idle()
    assert pair.info()["queued"] == 0


def test_a_lease_nobody_claims_expires(pair: Service) -> None:
    call = pair.handle("replica").options(method_name="lease", stream=True)
    response = call.remote(LeaseRequest("none", ""))
    grant = next(iter(response))
    assert isinstance(grant, Grant)
    with socket.create_connection((grant.host, grant.port)) as stranger:
        _shake_hands(pair, grant, stranger)
        opening = messages.pack_open(bytes(messages.TOKEN_BYTES), Persona())
        stranger.sendall(struct.pack("<IB", 1 + len(opening), MessageKind.OPEN) + opening)
        assert _farewell(stranger) == ("SessionLost", "the lease ran out; please connect again")
    pair.wait(lambda seen: sum(one.used for one in seen) == 1)
    assert 3.0 < pair.wait_idle(7.0) < 6.0


def test_connections_without_a_lease_are_bounded(pair: Service) -> None:
    """The oldest goes first, and a gateway still comes through."""
    call = pair.handle("replica").options(method_name="lease", stream=True)
    response = call.remote(LeaseRequest("none", ""))
    grant = next(iter(response))
    with contextlib.ExitStack() as stack:
        strangers = [
            stack.enter_context(socket.create_connection((grant.host, grant.port)))
            for _ in range(2 * 2 + SPARE + 1)
        ]
        assert _challenged(strangers[0]) == b"", "closed, and told nothing"
        strangers[1].settimeout(0.2)
        with pytest.raises(TimeoutError):
            _challenged(strangers[1])
        _shake_hands(pair, grant, strangers[-1])
        opening = messages.pack_open(grant.token, Persona())
        strangers[-1].sendall(struct.pack("<IB", 1 + len(opening), MessageKind.OPEN) + opening)
        strangers[-1].settimeout(5.0)
        assert strangers[-1].recv(5)[4] == MessageKind.READY
    pair.wait_idle()


def _shake_hands(service: Service, grant: Grant, stranger: socket.socket) -> None:
    """As a gateway of this application."""
    secret = service.handle("fleet").link_secret.remote(b"").result(timeout_s=10)
    handshake, received = GatewayHandshake(Keyring(secret), grant.replica), bytearray()
    handshake.begin(b"")
    stranger.settimeout(5.0)
    while not handshake.done:
        received += stranger.recv(1_024)
        stranger.sendall(handshake.receive(received))


def _challenged(stranger: socket.socket) -> bytes:
    """What a replica says after its challenge to one that says nothing; b"" at the end of the connection."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while len(said) <= CHALLENGE_BYTES and (piece := stranger.recv(1_024)):
            said += piece
    return said[CHALLENGE_BYTES:]


def _farewell(stranger: socket.socket) -> tuple[str, str]:
    """Class and words of the error a replica closes a connection with."""
    stranger.settimeout(2.0)
    data = b""
    while piece := stranger.recv(4_096):
        data += piece
    assert data[4] == MessageKind.CLOSE
    error = messages.unpack_error(data[5:])
    return type(error).__name__, str(error)


def test_a_stalled_client_slows_nobody(pair: Service) -> None:
    """One client stops reading for good while another talks, both on one gateway and one replica."""

    async def run() -> list[float]:
        async with contextlib.AsyncExitStack() as stack:
            stalled = await stack.enter_async_context(
                websockets.connect(pair.chat, max_queue=1, compression=None)
            )
            client = await _join(stack, pair)
            stalled.transport.pause_reading()
            stream = Transcoder()
            for page in [
                *stream.headers(),
                *(stream.send(frame) for frame in speech(3.2).reshape(-1, 1_920)),
            ]:
                await stalled.send(b"\x01" + page)
            await client.speak(speech(3.2))
            await client.until(lambda heard: heard.last_frame >= 36)
            stalled.transport.abort()
            return [at for at, message in client.heard.messages if isinstance(message, Audio)]

    gaps = np.diff(asyncio.run(run())[2:])
    assert np.median(gaps) == pytest.approx(FRAME_SECONDS, abs=0.01)
    assert np.percentile(gaps, 90) < 2 * FRAME_SECONDS
    pair.wait_idle()


def test_a_session_whose_replica_was_killed_waits_for_a_slot_if_it_must(cluster: str) -> None:
    """SIGKILL while three sessions talk: the other replica has one slot, the next one comes when Serve has
    replaced the dead one. Nobody is ended."""

    async def run(service: Service) -> None:
        async with contextlib.AsyncExitStack() as stack:
            clients = [await _join(stack, service) for _ in range(3)]
            await asyncio.to_thread(service.wait, lambda seen: sum(one.used for one in seen) == 3)
            full = next(one for one in await asyncio.to_thread(service.replicas) if one.used == 2)
            talking = [asyncio.ensure_future(_talk_on(client)) for client in clients]
            await asyncio.sleep(0.5)
            os.kill(full.pid, signal.SIGKILL)
            for client in clients[:2]:
                await client.until(lambda heard: heard.told("continued") == 1, 30.0)
            assert clients[2].heard.told("interrupted") == 0
            frames = [client.heard.last_frame for client in clients]
            for client, frame in zip(clients, frames, strict=True):
                await client.until(lambda heard, frame=frame: heard.last_frame >= frame + 20)
            await asyncio.to_thread(service.wait, lambda seen: sorted(one.used for one in seen) == [1, 2])
            for task in talking:
                task.cancel()

    with running(
        cluster, model="echo", slots=2, replicas_min=2, replicas_max=2, queue_timeout_s=60.0
    ) as service:
        asyncio.run(run(service))


def test_autoscaling_follows_sessions_and_cuts_none_short(cluster: str) -> None:
    """1 -> 2 -> 1 replicas with a live session that sees it all, frame after frame."""

    async def run(service: Service) -> None:
        async with contextlib.AsyncExitStack() as stack:
            survivor = await _join(stack, service)
            keep_talking = asyncio.ensure_future(_talk_on(survivor))
            others = [await _join(stack, service)]
            await _replicas(service, 2)
            others.append(await _join(stack, service))
            for client in others:
                await client.socket.close()
            await _replicas(service, 1)
            pages = len(survivor.heard.pages)
            await survivor.until(lambda heard: len(heard.pages) >= pages + 25)
            keep_talking.cancel()
            assert survivor.heard.code is None

    with running(
        cluster,
        model="echo",
        slots=2,
        replicas_max=2,
        upscale_delay_s=0.5,
        downscale_delay_s=1.0,
        autoscaling_lookback_s=10.1,
        session_limit_s=120,
    ) as service:
        asyncio.run(run(service))


async def _talk_on(client: Client) -> None:
    while True:
        await client.speak(speech(8.0))


async def _replicas(service: Service, count: int) -> None:
    """Waits until Serve routes to exactly `count` replicas."""
    await asyncio.to_thread(service.wait, lambda seen: len(seen) == count, 40.0)
