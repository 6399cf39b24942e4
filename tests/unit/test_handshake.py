"""The media link lets nobody in who does not know the application's secret, and over TLS shows nobody what
is said."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import ssl
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from mutation import mutants

from deployments import keysync
from deployments.fleet import Fleet
from deployments.wire import messages
from deployments.wire.handshake import SECRET_BYTES, GatewayHandshake, Handshake, Keyring, ReplicaHandshake
from deployments.wire.link import Link, connect, listen
from deployments.wire.messages import MessageKind
from deployments.wire.tls import gateway_context, replica_context
from personaplex.config import FRAME_SIZE
from personaplex.errors import ConfigError, ProtocolError, SessionLost

OLD, NEW, OTHER = (bytes([number]) * SECRET_BYTES for number in (1, 2, 3))


def shake(replica: Handshake, gateway: Handshake, binding: tuple[bytes, bytes] = (b"", b"")) -> list[bytes]:
    """Lets the two talk, a byte at a time, until neither says more; returns what was said."""
    said = [replica.begin(binding[0])]
    gateway.begin(binding[1])
    ends = (gateway, replica)
    for turn in range(4):
        received, answer = bytearray(), b""
        for byte in said[-1]:
            received.append(byte)
            answer += ends[turn % 2].receive(received)
        if not answer:
            break
        said.append(answer)
    return said


@pytest.mark.parametrize("known", [((OLD,), (OLD,)), ((NEW, OLD), (OLD,)), ((OLD,), (NEW, OLD))])
def test_two_ends_that_share_a_secret_trust_each_other(known: tuple[Any, Any]) -> None:
    replica, gateway = (
        ReplicaHandshake(Keyring(*known[0]), "r#1"),
        GatewayHandshake(Keyring(*known[1]), "r#1"),
    )
    said = shake(replica, gateway, (b"certificate", b"certificate"))
    assert replica.done
    assert gateway.done
    assert not any(secret in b"".join(said) for secret in (OLD, NEW))


@pytest.mark.parametrize(
    ("secrets", "names", "bindings"),
    [
        ((OLD, OTHER), ("r", "r"), (b"", b"")),  # no secret in common
        ((OLD, OLD), ("r", "s"), (b"", b"")),  # another replica than was meant
        ((OLD, OLD), ("r", "r"), (b"mine", b"theirs")),  # somebody's certificate in between
        ((OLD, OLD), ("r", "r"), (b"mine", b"")),
    ],
)
def test_no_two_others_do(secrets: Any, names: Any, bindings: Any) -> None:
    replica = ReplicaHandshake(Keyring(secrets[0]), names[0])
    gateway = GatewayHandshake(Keyring(secrets[1]), names[1])
    with pytest.raises(ProtocolError, match="does not belong"):
        shake(replica, gateway, bindings)
    assert not replica.done
    assert not gateway.done


def test_a_replayed_handshake_opens_nothing() -> None:
    """What a gateway once said is of no use with another replica's nonce, nor with its own role swapped."""
    _, answer, confirmation = shake(ReplicaHandshake(Keyring(OLD), "r"), GatewayHandshake(Keyring(OLD), "r"))
    replica = ReplicaHandshake(Keyring(OLD), "r")
    replica.begin(b"")
    with pytest.raises(ProtocolError):
        replica.receive(bytearray(answer))
    gateway = GatewayHandshake(Keyring(OLD), "r")
    gateway.begin(b"")
    gateway.receive(bytearray(ReplicaHandshake(Keyring(OLD), "r").begin(b"")))
    with pytest.raises(ProtocolError):
        gateway.receive(bytearray(confirmation))


def test_a_reflected_handshake_opens_nothing() -> None:
    """A stranger between two replicas cannot let one answer for the other: each only asks."""
    one, other = ReplicaHandshake(Keyring(OLD), "r"), ReplicaHandshake(Keyring(OLD), "r")
    asked = one.begin(b"")
    other.begin(b"")
    with pytest.raises(ProtocolError):
        other.receive(bytearray(asked + bytes(100)))


@pytest.mark.parametrize("order", [(1,), (2,), (2, 1), (0,), (0, 1)])
def test_reordered_messages_end_it(order: tuple[int, ...]) -> None:
    said = shake(ReplicaHandshake(Keyring(OLD), "r"), GatewayHandshake(Keyring(OLD), "r"))
    replica = ReplicaHandshake(Keyring(OLD), "r")
    replica.begin(b"")
    with pytest.raises(ProtocolError):
        replica.receive(bytearray(b"".join(said[number] for number in order) + bytes(100)))
    assert not replica.done


def test_damaged_handshakes_raise_nothing_else_and_never_succeed() -> None:
    class Fixed(ReplicaHandshake):
        def __init__(self) -> None:
            super().__init__(Keyring(OLD), "r")
            self._nonce = bytes(32)

    def first() -> Fixed:
        made = Fixed()
        made.begin(b"")
        return made

    gateway = GatewayHandshake(Keyring(OLD), "r")
    gateway.begin(b"")
    answer = gateway.receive(bytearray(first().begin(b"")))
    assert first().receive(bytearray(answer))
    for damaged in mutants(answer, 2_000, random.Random(3)):
        replica = first()
        try:
            replica.receive(bytearray(damaged))
        except ProtocolError:
            continue
        assert replica.done == damaged.startswith(answer)


def test_secrets_are_replaced_one_by_one() -> None:
    keyring = Keyring()
    assert not keyring
    for secret in (OLD, NEW, NEW, OTHER):
        keyring.adopt(secret)
    assert keyring.newest == OTHER
    assert len(set(keyring.ids())) == 2
    assert all(
        secret.hex() not in repr(keyring) and str(secret) not in repr(keyring) for secret in (NEW, OTHER)
    )
    with pytest.raises(ValueError, match="length"):
        keyring.adopt(b"short")


def test_a_new_fleet_takes_over_the_secret_that_is_in_use() -> None:
    async def run() -> None:
        fleet = Fleet()
        made = await fleet.link_secret(b"")
        assert len(made) == SECRET_BYTES
        assert await fleet.link_secret(b"") == made
        successor = Fleet()
        assert await successor.link_secret(made) == made
        assert await successor.link_secret(b"") == made
        assert await Fleet().link_secret(b"") != made

    asyncio.run(run())


class Answering:
    """A fleet's handle."""

    def __init__(self) -> None:
        self.link_secret, self.secret, self.asked = self, OLD, asyncio.Event()

    async def _answer(self) -> bytes:
        self.asked.set()
        return self.secret

    def remote(self, known: bytes) -> Any:
        return self._answer()

    async def asked_again(self) -> None:
        """Until it has been asked once more, and its answer taken."""
        self.asked.clear()
        await asyncio.wait_for(self.asked.wait(), 10.0)
        for _ in range(3):
            await asyncio.sleep(0)


def test_who_meets_an_unknown_secret_asks_for_the_newest_at_once() -> None:
    async def run() -> None:
        fleet = Answering()
        keys = keysync.KeySync(fleet)  # type: ignore[arg-type]
        ours, strange = await keys.known(), Keyring(OTHER)
        fleet.secret = NEW
        with pytest.raises(ProtocolError):
            shake(ReplicaHandshake(Keyring(NEW), "r"), GatewayHandshake(ours, "r"))
        await fleet.asked_again()
        assert ours.newest == NEW
        challenged = ReplicaHandshake(ours, "r")
        challenged.begin(b"")
        (_, answer, *_) = shake(ReplicaHandshake(strange, "r"), GatewayHandshake(strange, "r"))
        with pytest.raises(ProtocolError):
            challenged.receive(bytearray(answer))
        await fleet.asked_again()
        keys.close()

    asyncio.run(run())


# On sockets


class Place:
    """A replica's end on a port, with what its connections said."""

    def __init__(self, tls: ssl.SSLContext | None = None, certificate: bytes = b"") -> None:
        self.messages: list[tuple[MessageKind, bytes]] = []
        self.links: list[Link] = []
        self.lost = 0
        self._tls, self._certificate = tls, certificate

    def _make(self) -> Link:
        link = Link(
            lambda link, kind, payload: self.messages.append((kind, payload)),
            lambda link: setattr(self, "lost", self.lost + 1),
            handshake=ReplicaHandshake(Keyring(OLD), "r"),
            certificate=self._certificate,
            outbox=25,
            stall_s=10.0,
        )
        self.links.append(link)
        return link

    def run(self, act: Callable[[int], Awaitable[None]]) -> None:
        async def main() -> None:
            server, port = await listen(self._make, "127.0.0.1", tls=self._tls)
            try:
                await asyncio.wait_for(act(port), 20)
            finally:
                for link in self.links:
                    link.close()
                server.close()

        asyncio.run(main())

    async def until(self, condition: Callable[[], Any]) -> None:
        while not condition():  # noqa: ASYNC110  of two ends in one loop, without a word between them
            await asyncio.sleep(0.005)


async def link_to(
    port: int, keyring: Keyring, tls: ssl.SSLContext | None = None, heard: list[Any] | None = None
) -> Link:
    def hear(link: Link, kind: MessageKind, payload: bytes) -> None:
        if heard is not None:
            heard.append((kind, payload))

    handshake = GatewayHandshake(keyring, "r")
    return await connect(
        "127.0.0.1", port, hear, lambda _: None, handshake=handshake, outbox=25, stall_s=10.0, tls=tls
    )


STRANGERS = {
    "an opening message": b"\x15\x00\x00\x00\x01" + bytes(20),
    "a frame": b"\x05\x1e\x00\x00\x02" + bytes(7_684),
    "an old gateway's close": b"\x03\x00\x00\x00\x03{}",
    "a web request": b"GET / HTTP/1.1\r\n\r\n",
    "the right magic and nothing else": b"PPL1" + bytes(1_000),
    "an id that is known, and a proof that is none": None,
}


@pytest.mark.parametrize("name", STRANGERS)
def test_a_stranger_is_told_nothing_and_heard_by_nobody(name: str) -> None:
    place = Place()

    async def act(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        challenge = await reader.readexactly(52)
        sent = STRANGERS[name]
        if sent is None:
            sent = challenge[:12] + bytes(64) + b"\x15\x00\x00\x00\x01" + bytes(20)
        writer.write(sent)
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b"", "not a byte beyond the challenge"
        await place.until(lambda: place.lost)
        assert not place.messages
        place.links[0].send(MessageKind.REPLY, b"audio")  # as a replica that thinks it talks to a gateway
        writer.close()

    place.run(act)


def test_a_stranger_that_waits_is_cut_off_without_a_word() -> None:
    place = Place()

    async def act(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await reader.readexactly(52)
        place.links[0].close(SessionLost("nothing was said in time"))  # as the replica does
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await reader.readexactly(1)
        writer.close()

    place.run(act)


def test_a_gateway_says_nothing_to_a_replica_without_the_secret() -> None:
    place = Place()

    async def act(port: int) -> None:
        with pytest.raises(OSError, match="none of this application"):
            await link_to(port, Keyring(OTHER))
        await place.until(lambda: place.lost)
        assert not place.messages

    place.run(act)


def test_a_gateway_that_gives_up_in_the_handshake_leaves_no_connection() -> None:
    async def run() -> None:
        closed = asyncio.Event()

        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            closed.set()
            writer.close()

        async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(link_to(port, Keyring(OLD)), 0.1)
            await asyncio.wait_for(closed.wait(), 5)

    asyncio.run(run())


# TLS


class Tap:
    """A process on the path: passes everything on and keeps it."""

    def __init__(self, port: int) -> None:
        self.captured = bytearray()
        self._port = port

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)

        async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            while data := await source.read(65_536):
                self.captured += data
                sink.write(data)
            sink.close()

        await asyncio.gather(pass_on(reader, back), pass_on(there, writer))


@pytest.mark.parametrize("secure", [True, False])
def test_captured_bytes_hold_speech_only_without_tls(secure: bool) -> None:
    """The plain link is the control: the capture sees what there is to see."""
    tls, certificate = replica_context(None) if secure else (None, b"")
    place, heard = Place(tls, certificate), []
    pcm = np.random.default_rng(1).standard_normal((20, FRAME_SIZE)).astype(np.float32)

    async def act(port: int) -> None:
        tap = Tap(port)
        async with await asyncio.start_server(tap, "127.0.0.1", 0) as server:
            through = server.sockets[0].getsockname()[1]
            context = gateway_context(None) if secure else None
            link = await link_to(through, Keyring(OLD), context, heard)
            if secure:
                assert link._transport is not None
                assert link._transport.get_extra_info("ssl_object").version() == "TLSv1.3"
            for number, frame in enumerate(pcm):
                link.send_frame(MessageKind.FRAME, messages.pack_frame(number, frame))
            await place.until(lambda: len(place.messages) == len(pcm))
            place.links[0].send(MessageKind.READY, messages.pack_ready(messages.SlotReady(1.0)))
            await place.until(lambda: heard)
            link.close()
            await place.until(lambda: place.lost)
        for number, (_, payload) in enumerate(place.messages[: len(pcm)]):
            np.testing.assert_array_equal(messages.unpack_frame(payload)[1], pcm[number])
        pieces = [frame[start : start + 4].tobytes() for frame in pcm for start in range(0, FRAME_SIZE, 64)]
        found = sum(piece in tap.captured for piece in pieces)
        assert found == (0 if secure else len(pieces))
        assert (b"prefill_s" in tap.captured) != secure

    place.run(act)


def test_somebody_elses_certificate_in_between_ends_it() -> None:
    """A process that ends TLS in the middle and speaks TLS to the replica sees both sides' bytes, and gets
    neither side to go on."""
    tls, certificate = replica_context(None)
    own, _ = replica_context(None)
    place = Place(tls, certificate)

    async def act(port: int) -> None:
        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", port, ssl=gateway_context(None))

            async def pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
                with contextlib.suppress(OSError):
                    while data := await source.read(65_536):
                        sink.write(data)
                sink.close()

            await asyncio.gather(pass_on(reader, back), pass_on(there, writer))

        async with await asyncio.start_server(between, "127.0.0.1", 0, ssl=own) as server:
            with pytest.raises(OSError, match="none of this application"):
                await link_to(server.sockets[0].getsockname()[1], Keyring(OLD), gateway_context(None))
        assert not place.messages

    place.run(act)


def test_files_are_a_certificate_of_an_authority(tmp_path: Path) -> None:
    good, other = issue(tmp_path / "good"), issue(tmp_path / "other")
    tls, certificate = replica_context(good)
    place = Place(tls, certificate)

    async def act(port: int) -> None:
        link = await link_to(port, Keyring(OLD), gateway_context(good))
        link.send(MessageKind.OPEN, b"")
        await place.until(lambda: place.messages)
        for stranger in (gateway_context(other), gateway_context(None)):
            with pytest.raises(OSError):  # noqa: PT011  of ssl, or a reset
                await link_to(port, Keyring(OLD), stranger)

    place.run(act)


def test_files_that_cannot_be_used_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"media_tls_dir: .*No such file"):
        replica_context(tmp_path)
    folder = issue(tmp_path / "good")
    (folder / "tls.key").write_text("nothing")
    with pytest.raises(ConfigError, match="media_tls_dir"):
        gateway_context(folder)


def test_the_chart_encrypts_if_it_costs_less_than_a_twentieth_of_a_core() -> None:
    root = Path(__file__).parents[2]
    measured = json.loads((root / "benchmarks/results/link.json").read_text())
    assert all(one["unanswered"] == 0 for found in measured["each"].values() for one in found)
    on = "\n  media_tls: own\n" in (root / "helm/personaplex/values.yaml").read_text()
    assert on == (measured["tls_core"] < 0.05)


def issue(folder: Path) -> Path:
    """A folder as cert-manager fills it: a certificate, its key, and the authority that signed it."""
    folder.mkdir()
    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"authority of {folder.name}")])

    def sign(subject: x509.Name, public: Any, is_authority: bool) -> bytes:
        now = datetime.now(timezone.utc)
        builder = x509.CertificateBuilder(issuer, subject, public, x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(is_authority, None), critical=True)
        return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    named = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "personaplex")])
    (folder / "ca.crt").write_bytes(sign(issuer, authority.public_key(), True))
    (folder / "tls.crt").write_bytes(sign(named, key.public_key(), False))
    (folder / "tls.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return folder
