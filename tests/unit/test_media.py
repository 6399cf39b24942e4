"""The media link: bytes out equal bytes in, queues are bounded, and nonsense ends the connection."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import random
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import pytest
from mutation import mutants

from deployments.wire import messages
from deployments.wire.handshake import GatewayHandshake, Keyring, ReplicaHandshake
from deployments.wire.link import MESSAGE_LIMIT, Link, connect, listen
from deployments.wire.messages import MessageKind, SlotReady
from deployments.wire.transfer import LOG_LIMIT, PIECE_BYTES, LogReceiver, pieces
from personaplex.config import FRAME_SIZE, Sampling
from personaplex.errors import (
    LogRefused,
    NoCapacity,
    PersonaplexError,
    PromptTooLong,
    ProtocolError,
    SessionLost,
    UnknownVersion,
)
from personaplex.persona import Persona

T = TypeVar("T")
OUTBOX = 25  # frames
KEYRING = Keyring(bytes(range(32)))
STALL_S = 10.0


def _noise(seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(FRAME_SIZE).astype(np.float32)


def _opposed() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Sound but for two samples, whose sum is no number."""
    pcm = _noise()
    pcm[[3, 1_900]] = np.inf, -np.inf
    return pcm


def test_a_frame_arrives_bit_for_bit() -> None:
    pcm = _noise()
    pcm[:3] = (-0.0, 1e-42, np.finfo(np.float32).max)
    mark, heard = messages.unpack_frame(messages.pack_frame(2**32 - 1, pcm))
    assert mark == 2**32 - 1
    np.testing.assert_array_equal(heard.view(np.uint32), pcm.view(np.uint32))
    assert heard.flags.writeable


def test_a_reply_arrives_whole() -> None:
    tokens = np.array([70_000, *range(2_032, 2_048)], np.int64)
    sent = messages.Reply(7, _noise(), tokens, " été 你", 123_456)
    got = messages.unpack_reply(messages.pack_reply(sent))
    assert (got.frame, got.text, got.timestamp) == (sent.frame, sent.text, sent.timestamp)
    np.testing.assert_array_equal(got.tokens, tokens)
    np.testing.assert_array_equal(got.pcm.view(np.uint32), sent.pcm.view(np.uint32))


def test_a_persona_arrives_as_it_was() -> None:
    persona = Persona("VARM4", 'Quotes " and 你好\n', Sampling(0.1, 2, 0.3, 4, 2**63 - 1, 6))
    token = bytes(range(16))
    opening = messages.unpack_opening(messages.pack_open(token, persona, 3))
    assert (opening.token, opening.generation) == (token, 3)
    assert messages.unpack_open(opening.rest) == persona


def test_a_rebuild_says_how_long_the_log_is() -> None:
    opening = messages.unpack_opening(messages.pack_rebuild(bytes(range(16)), 2**31, 2**32 - 1))
    assert (opening.token, opening.generation) == (bytes(range(16)), 2**32 - 1)
    assert messages.unpack_rebuild(opening.rest) == 2**31


def test_another_version_of_the_link_is_refused_by_type() -> None:
    payload = bytearray(messages.pack_open(bytes(16), Persona()))
    for other in (1, messages.VERSION + 1):
        payload[16:18] = other.to_bytes(2, "little")
        with pytest.raises(UnknownVersion, match=f"version {other}, this process {messages.VERSION}"):
            messages.unpack_opening(bytes(payload))


# By version of the link: what one message of each kind is, as bytes. One that changes needs a new version.
SHAPES = {3: "187e884559d86843"}


def test_messages_of_another_shape_have_another_version() -> None:
    token, held = bytes(range(16)), messages.Held(3, 1)
    sent = (
        messages.pack_open(token, Persona("NATF2", "a", Sampling(0.1, 2, 0.3, 4, 5, 6)), 4, held),
        messages.pack_rebuild(token, 5, 4, held),
        messages.pack_frame(6, np.zeros(FRAME_SIZE, np.float32)),
        messages.pack_reply(messages.Reply(7, np.zeros(FRAME_SIZE, np.float32), np.arange(17), " é", 8)),
        messages.pack_ready(messages.SlotReady(0.5, 9, "digest", 10)),
        messages.pack_taken(messages.TakenSession(11, 12, ((13, "a"),))),
        messages.pack_error(SessionLost("gone")),
        repr([(kind.name, kind.value) for kind in MessageKind]).encode(),
    )
    digest = hashlib.sha256(b"|".join(sent)).hexdigest()[:16]
    assert SHAPES.get(messages.VERSION) == digest, "a new shape of a message under the old version"


@pytest.mark.parametrize("size", [1, PIECE_BYTES - 1, PIECE_BYTES, 3 * PIECE_BYTES + 7])
def test_a_log_arrives_whole(size: int) -> None:
    log = np.random.default_rng(size).bytes(size)
    receiver = LogReceiver(size)
    *first, last = pieces(log)
    assert all(receiver.add(piece) is None for piece in first)
    assert receiver.add(last) == log
    assert max(map(len, (*first, last))) <= MESSAGE_LIMIT - 1


def test_a_log_of_another_length_is_refused() -> None:
    with pytest.raises(ProtocolError):
        LogReceiver(0)
    with pytest.raises(LogRefused):
        LogReceiver(LOG_LIMIT + 1)
    for given in (b"1234", b""):
        receiver = LogReceiver(6)
        receiver.add(b"123")
        with pytest.raises(ProtocolError):
            receiver.add(given)


@pytest.mark.parametrize("error", [PromptTooLong("too long"), SessionLost("gone"), NoCapacity("full", 3.0)])
def test_an_error_keeps_its_class_and_words(error: PersonaplexError) -> None:
    got = messages.unpack_error(messages.pack_error(error))
    assert type(got) is type(error)
    assert str(got) == str(error)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{}",
        b"null",
        b'{"error": "os", "message": ""}',
        b'{"error": "annotations"}',
        b"\xff",
        b"[" * 60_000,
        b"[]",
        b'{"error": "SessionLost", "message": ["deep", {}]}',
        b'{"error": "NoCapacity", "message": "\\ud800"}',  # which no socket could be told
        b'{"error": ["NoCapacity"], "message": ""}',
    ],
)
def test_an_error_that_cannot_be_read_is_a_lost_session(payload: bytes) -> None:
    assert type(messages.unpack_error(payload)) is SessionLost


def opening(**changes: Any) -> bytes:
    fields = {"voice": "NATF2", "text_prompt": "Hello.", "sampling": dataclasses.asdict(Sampling())}
    return json.dumps({**fields, **changes}).encode()


# Each of these once reached the engine as it was, and there ended everybody's session.
OPENINGS = [
    opening(voice=7),
    opening(voice=None),
    opening(voice="../NATF2"),
    opening(text_prompt=["Hello."]),
    opening(text_prompt="\ud800"),
    opening(more=1),
    opening(sampling=[]),
    opening(sampling={"text_temperature": "0.7"}),
    opening(sampling={"text_temperature": None}),
    opening(sampling={"text_temperature": 10**400}),
    opening(sampling={"text_topk": 2.5}),
    opening(sampling={"audio_topk": True}),
    opening(sampling={"audio_seed": [1]}),
    b'["voice"]',
    b"null",
]


def test_whole_numbers_are_temperatures_too() -> None:
    persona = messages.unpack_open(opening(sampling={"text_temperature": 0}))
    assert repr(persona.sampling) == repr(Sampling(text_temperature=0.0))


def _open(payload: bytes) -> Persona:
    return messages.unpack_open(messages.unpack_opening(payload).rest)


def _rebuild(payload: bytes) -> int:
    return messages.unpack_rebuild(messages.unpack_opening(payload).rest)


@pytest.mark.parametrize(
    ("unpack", "payload"),
    [
        (messages.unpack_frame, messages.pack_frame(7, _noise())),
        (messages.unpack_reply, messages.pack_reply(messages.Reply(1, _noise(), np.arange(17), "text", 2))),
        (_open, messages.pack_open(bytes(16), Persona())),
        (_rebuild, messages.pack_rebuild(bytes(16), 2**20, 1)),
        (messages.unpack_open, opening(sampling={"text_topk": 2})),
        (messages.unpack_ready, messages.pack_ready(SlotReady(1.25, 7, "d"))),
        (messages.unpack_error, messages.pack_error(NoCapacity("come again"))),
    ],
)
def test_damaged_messages_raise_nothing_else(unpack: Callable[[bytes], Any], payload: bytes) -> None:
    refused = 0
    for damaged in mutants(payload, 2_000, random.Random(11)):
        try:
            if isinstance(heard := unpack(damaged), PersonaplexError):
                str(heard).encode()
                refused += isinstance(heard, SessionLost)
        except (ProtocolError, UnknownVersion):
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    ("unpack", "payload"),
    [
        (messages.unpack_frame, b""),
        (messages.unpack_frame, bytes(4 * FRAME_SIZE)),
        (messages.unpack_frame, bytes(4 * FRAME_SIZE + 5)),
        (messages.unpack_frame, messages.pack_frame(0, np.full(FRAME_SIZE, np.nan, np.float32))),
        (messages.unpack_frame, messages.pack_frame(0, np.full(FRAME_SIZE, np.inf, np.float32))),
        (messages.unpack_reply, b""),
        (messages.unpack_reply, bytes(4 * FRAME_SIZE)),
        (
            messages.unpack_reply,
            messages.pack_reply(messages.Reply(0, _noise(), np.zeros(17, int), "", 0)) + b"\xff",
        ),
        (messages.unpack_opening, bytes(21)),
        (messages.unpack_rebuild, bytes(3)),
        (messages.unpack_rebuild, bytes(5)),
        (messages.unpack_open, b""),
        (messages.unpack_open, b"[" * 60_000),
        (messages.unpack_open, b"{}"),
        (messages.unpack_open, b'{"voice": "NATF2", "sampling": {"top_p": 1}}'),
        *((messages.unpack_open, payload) for payload in OPENINGS),
        (
            messages.unpack_reply,
            messages.pack_reply(messages.Reply(0, _noise() * np.nan, np.zeros(17, int), "", 0)),
        ),
        (messages.unpack_reply, messages.pack_reply(messages.Reply(0, _opposed(), np.zeros(17, int), "", 0))),
        (messages.unpack_ready, b"{}"),
        (messages.unpack_ready, b"[]"),
        (messages.unpack_ready, b"[" * 60_000),
        (messages.unpack_ready, b'{"prefill_s": NaN}'),
        (messages.unpack_ready, b'{"prefill_s": -1}'),
        (messages.unpack_ready, b'{"prefill_s": true}'),
        (messages.unpack_ready, b'{"prefill_s": "1"}'),
        (messages.unpack_ready, b'{"prefill_s": 1%s}' % (b"0" * 400)),
        (messages.unpack_ready, b'{"prefill_s": 1, "frame": -1}'),
        (messages.unpack_ready, b'{"prefill_s": 1, "frame": 1.0}'),
        (messages.unpack_ready, b'{"prefill_s": 1, "voice_digest": 3}'),
        (messages.unpack_ready, b'{"prefill_s": 1, "more": 3}'),
    ],
)
def test_other_shapes_are_refused(unpack: Callable[[bytes], Any], payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(payload)


# links


class End:
    """One end of a connection, and what it heard; the replica's unless `gateway`."""

    def __init__(self, gateway: bool = False) -> None:
        self.messages: list[tuple[MessageKind, bytes]] = []
        self.news = asyncio.Event()
        self.lost = asyncio.Event()
        handshake = GatewayHandshake(KEYRING, "r") if gateway else ReplicaHandshake(KEYRING, "r")
        self.link = Link(
            self._message, lambda _: self.lost.set(), handshake=handshake, outbox=OUTBOX, stall_s=STALL_S
        )

    def _message(self, link: Link, kind: MessageKind, payload: bytes) -> None:
        if payload == b"refuse":
            raise ProtocolError("no")
        self.messages.append((kind, payload))
        self.news.set()

    async def until(self, count: int) -> None:
        async def wait() -> None:
            while len(self.messages) < count:
                self.news.clear()
                await self.news.wait()

        await asyncio.wait_for(wait(), 5)


def _with_server(run: Callable[[End, int], Awaitable[T]]) -> T:
    """Runs `run(server's end of the first connection, port)`."""

    async def main() -> T:
        end = End()
        server, port = await listen(lambda: end.link, "127.0.0.1")
        try:
            return await run(end, port)
        finally:
            end.link.close()
            server.close()
            await server.wait_closed()

    return asyncio.run(main())


async def _connect(port: int) -> End:
    end = End(gateway=True)
    await asyncio.get_running_loop().create_connection(lambda: end.link, "127.0.0.1", port)
    await asyncio.wait_for(end.link.settled.wait(), 5)
    return end


async def _streams(
    port: int, sock: socket.socket | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A gateway's end as bare streams, once the replica's end trusts it."""
    where: dict[str, Any] = {"host": "127.0.0.1", "port": port} if sock is None else {"sock": sock}
    reader, writer = await asyncio.open_connection(**where)
    handshake, received = GatewayHandshake(KEYRING, "r"), bytearray()
    handshake.begin(b"")
    while not handshake.done:
        received += await asyncio.wait_for(reader.read(52 if not received else 36), 5)
        writer.write(handshake.receive(received))
    return reader, writer


async def _silent(port: int) -> socket.socket:
    """A gateway's end that is trusted and from then on reads nothing."""
    silent, received = socket.create_connection(("127.0.0.1", port)), bytearray()
    silent.setblocking(False)
    loop, handshake = asyncio.get_running_loop(), GatewayHandshake(KEYRING, "r")
    handshake.begin(b"")
    while not handshake.done:
        received += await asyncio.wait_for(loop.sock_recv(silent, 1_024), 5)
        await loop.sock_sendall(silent, handshake.receive(received))
    return silent


def test_messages_arrive_in_order_and_a_close_says_why() -> None:
    async def run(server: End, port: int) -> None:
        client = await _connect(port)
        for number in range(50):
            client.link.send(MessageKind.FRAME, str(number).encode())
        client.link.close(SessionLost("so long"))
        await asyncio.wait_for(server.lost.wait(), 5)
        assert server.messages[:50] == [(MessageKind.FRAME, str(number).encode()) for number in range(50)]
        kind, payload = server.messages[50]
        assert kind is MessageKind.CLOSE
        assert str(messages.unpack_error(payload)) == "so long"
        client.link.send(MessageKind.FRAME, b"")  # after the end: nothing happens
        client.link.close()

    _with_server(run)


def test_messages_may_come_in_any_pieces() -> None:
    async def run(server: End, port: int) -> None:
        _, writer = await _streams(port)
        stream = b"".join(
            struct.pack("<IB", 1 + len(body), MessageKind.FRAME) + body
            for body in (b"", b"a", b"b" * 9_000, b"c")
        )
        for start in range(0, len(stream), 997):
            writer.write(stream[start : start + 997])
            await writer.drain()
            await asyncio.sleep(0)
        await server.until(4)
        assert [payload for _, payload in server.messages] == [b"", b"a", b"b" * 9_000, b"c"]
        writer.close()
        await asyncio.wait_for(server.lost.wait(), 5)

    _with_server(run)


@pytest.mark.parametrize(
    "nonsense",
    [
        struct.pack("<I", 0),
        struct.pack("<I", MESSAGE_LIMIT + 1),
        struct.pack("<IB", 1, 99),
        struct.pack("<IB", 7, MessageKind.FRAME) + b"refuse",
        b"GET / HTTP/1.1\r\n\r\n",
    ],
)
def test_nonsense_ends_the_connection(nonsense: bytes) -> None:
    async def run(server: End, port: int) -> None:
        reader, writer = await _streams(port)
        writer.write(nonsense)
        answer = await asyncio.wait_for(reader.read(), 5)
        assert MessageKind(answer[4]) is MessageKind.CLOSE
        assert isinstance(messages.unpack_error(answer[5:]), ProtocolError)
        await asyncio.wait_for(server.lost.wait(), 5)
        assert not server.messages
        writer.close()

    _with_server(run)


def test_a_peer_that_does_not_read_costs_a_bounded_queue() -> None:
    async def run(server: End, port: int) -> None:
        silent = await _silent(port)
        for number in range(2_000):
            server.link.send_frame(MessageKind.REPLY, struct.pack("<I", number) + bytes(7_700))
        assert len(server.link._outbox) == OUTBOX
        assert server.link.dropped > 1_000
        # When it reads again it gets the newest, in order, and what was dropped is missing in one place.
        reader, writer = await asyncio.open_connection(sock=silent)
        numbers = []
        while not numbers or numbers[-1] != 1_999:
            head = await asyncio.wait_for(reader.readexactly(9), 5)
            numbers.append(struct.unpack_from("<I", head, 5)[0])
            await reader.readexactly(7_700)
        assert numbers == sorted(set(numbers))
        assert numbers[-OUTBOX:] == list(range(2_000 - OUTBOX, 2_000))
        assert len(numbers) + server.link.dropped == 2_000
        writer.close()

    _with_server(run)


def test_a_link_closed_before_it_is_connected_never_is() -> None:
    async def run() -> None:
        closed, heard = End(), End(gateway=True)
        closed.link.close()
        server, port = await listen(lambda: closed.link, "127.0.0.1")
        async with server:
            await asyncio.get_running_loop().create_connection(lambda: heard.link, "127.0.0.1", port)
            await asyncio.wait_for(asyncio.gather(closed.lost.wait(), heard.lost.wait()), 5)
        assert not closed.link.open

    asyncio.run(run())


def test_a_peer_that_does_not_read_is_cut_off_on_close() -> None:
    async def run(server: End, port: int) -> None:
        silent = await _silent(port)
        for _ in range(2_000):
            server.link.send_frame(MessageKind.REPLY, bytes(7_700))
        server.link.close()
        assert server.link.dropped > 1_000, "frames nobody reads are not kept"
        await asyncio.wait_for(server.lost.wait(), 1)
        assert not server.link.open
        silent.settimeout(1.0)
        heard = 0
        with silent:
            while piece := silent.recv(1 << 20):
                heard += len(piece)
        assert heard < 2_000 * 7_700 / 2, "what the kernel held, and no more"

    _with_server(run)


@pytest.mark.parametrize("stall_s", [3.5, STALL_S])
def test_the_kernel_gives_up_just_after_the_longest_stall(stall_s: float) -> None:
    """A dead machine's packets just stop coming; a process that stands still takes nothing. It was 2 s once
    whatever the setting said, and a replica that stood still for 4 s lost its sessions."""

    async def run(server: End, port: int) -> None:
        client = End()
        client.link = await connect(
            "127.0.0.1",
            port,
            client._message,
            lambda _: None,
            handshake=GatewayHandshake(KEYRING, "r"),
            outbox=OUTBOX,
            stall_s=stall_s,
        )
        assert client.link._transport is not None
        sock = client.link._transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1_000 * (stall_s + 1)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
        every = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
        count = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT)
        assert stall_s <= idle + every * count <= stall_s + 2
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        client.link.close()

    _with_server(run)


def test_listening_takes_the_first_free_port_of_a_range() -> None:
    async def run(server: End, port: int) -> None:
        second, found = await listen(lambda: End().link, "127.0.0.1", port, port + 20)
        assert port < found <= port + 20
        second.close()
        with pytest.raises(OSError, match="in use"):
            await listen(lambda: End().link, "127.0.0.1", port, port)

    _with_server(run)
