"""What a replica makes of the messages that open or rebuild a session, well-formed or not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import loopback
import numpy as np
import pytest
from loopback import Fleet, LoopbackReplica, MemoryEngine, fleet_of

from deployments.wire import messages, transfer
from deployments.wire.link import Link
from deployments.wire.messages import LeaseRequest, MessageKind
from personaplex.config import FRAME_SIZE
from personaplex.engine.interface import Stepper
from personaplex.errors import LogRefused, PersonaplexError, ProtocolError, SessionLost, UnknownVersion
from personaplex.persona import Persona
from personaplex.sessionlog import SessionRecorder

SOUND = np.random.default_rng(0).standard_normal((12, FRAME_SIZE)).astype(np.float32)


class Gateway:
    """One link to a replica, and what came over it."""

    def __init__(self) -> None:
        self.heard: list[tuple[MessageKind, bytes]] = []
        self.lost = asyncio.Event()

    async def connect(self, replica: LoopbackReplica) -> Link:
        return await loopback.link(
            replica.name, "127.0.0.1", replica.port, self._hear, lambda _: self.lost.set()
        )

    def _hear(self, link: Link, kind: MessageKind, payload: bytes) -> None:
        self.heard.append((kind, payload))

    async def until(self, kind: MessageKind) -> bytes:
        for _ in range(1_000):
            for heard, payload in self.heard:
                if heard is kind:
                    return payload
            await asyncio.sleep(0.01)
        raise AssertionError(f"no {kind.name} in {self.heard}")

    async def refusal(self) -> PersonaplexError:
        error = messages.unpack_error(await self.until(MessageKind.CLOSE))
        await asyncio.wait_for(self.lost.wait(), 10)
        return error


def memory() -> Stepper:
    return MemoryEngine(2)


def run(test: Callable[[Fleet, LoopbackReplica], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        async with fleet_of(1, memory, slots=2, **settings) as fleet:
            await test(fleet, fleet.replicas[0])
            for _ in range(500):
                if not fleet.replicas[0].used:
                    return
                await asyncio.sleep(0.01)
            raise AssertionError("a slot was not given back")

    asyncio.run(asyncio.wait_for(main(), 30))


def packed_log(frames: int = 5) -> bytes:
    machine, recorder = MemoryEngine(1), SessionRecorder(Persona())
    slot = machine.admit(Persona())
    machine.prefill()
    for frame in SOUND[:frames]:
        machine.feed(slot, frame)
        recorder.answered(frame, machine.step()[0].tokens)
    return recorder.log().pack()


def test_a_log_becomes_a_slot_that_goes_on() -> None:
    async def test(fleet: Fleet, replica: LoopbackReplica) -> None:
        gateway, log = Gateway(), packed_log()
        token, _ = replica.sessions.holders.hold(LeaseRequest("s", ""))
        link = await gateway.connect(replica)
        link.send(MessageKind.REBUILD, messages.pack_rebuild(token, len(log), 3))
        for piece in transfer.pieces(log):
            link.send(MessageKind.LOG, piece)
        ready = messages.unpack_ready(await gateway.until(MessageKind.READY))
        assert ready.frame == 5
        (status,) = replica.sessions.holders.statuses()
        assert (status.session, status.generation) == ("s", 3)
        link.send(MessageKind.FRAME, messages.pack_frame(9, SOUND[5]))
        reply = messages.unpack_reply(await gateway.until(MessageKind.REPLY))
        assert (reply.frame, reply.timestamp) == (5, 9)
        np.testing.assert_array_equal(reply.pcm, SOUND[4])  # an echo is a frame late
        link.close()

    run(test)


FINE = messages.pack_open(bytes(16), Persona())
OTHER = bytearray(FINE)
OTHER[16:18] = (messages.VERSION + 1).to_bytes(2, "little")


def rebuild(log_bytes: int) -> tuple[MessageKind, bytes]:
    """Without its token."""
    return MessageKind.REBUILD, messages.pack_rebuild(bytes(16), log_bytes, 1)[16:]


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ([(MessageKind.OPEN, bytes(OTHER[16:]))], UnknownVersion),
        ([(MessageKind.REBUILD, bytes(OTHER[16:]))], UnknownVersion),
        ([rebuild(transfer.LOG_LIMIT + 1)], LogRefused),
        ([rebuild(0)], ProtocolError),
        ([(MessageKind.LOG, b"piece")], ProtocolError),
        ([rebuild(9), (MessageKind.LOG, bytes(9))], LogRefused),
        ([rebuild(9), (MessageKind.LOG, bytes(10))], ProtocolError),
        ([rebuild(9), (MessageKind.LOG, b"")], ProtocolError),
        ([rebuild(9), (MessageKind.FRAME, messages.pack_frame(1, SOUND[0]))], ProtocolError),
        ([(MessageKind.OPEN, FINE[16:]), (MessageKind.LOG, b"piece")], ProtocolError),
    ],
)
def test_what_cannot_be_opened_is_refused_by_type_and_holds_no_slot(
    said: list[tuple[MessageKind, bytes]], error: type[PersonaplexError]
) -> None:
    """The token goes in front of the first message."""

    async def test(fleet: Fleet, replica: LoopbackReplica) -> None:
        gateway = Gateway()
        token, _ = replica.sessions.holders.hold(LeaseRequest("s", ""))
        link = await gateway.connect(replica)
        for place, (kind, payload) in enumerate(said):
            link.send(kind, token + payload if place == 0 and kind is not MessageKind.LOG else payload)
        assert type(await gateway.refusal()) is error
        replica.sessions.holders.drop(token)  # as the end of its lease does

    run(test)


def test_a_token_is_for_one_session() -> None:
    async def test(fleet: Fleet, replica: LoopbackReplica) -> None:
        token, _ = replica.sessions.holders.hold(LeaseRequest("s", ""))
        first, second = Gateway(), Gateway()
        link = await first.connect(replica)
        link.send(MessageKind.OPEN, messages.pack_open(token, Persona()))
        await first.until(MessageKind.READY)
        thief = await second.connect(replica)
        thief.send(MessageKind.REBUILD, messages.pack_rebuild(token, 9, 1))
        assert type(await second.refusal()) is SessionLost
        link.close()

    run(test)


def test_a_log_that_does_not_come_holds_no_slot() -> None:
    async def test(fleet: Fleet, replica: LoopbackReplica) -> None:
        gateway, log = Gateway(), packed_log()
        token, holder = replica.sessions.holders.hold(LeaseRequest("s", ""))
        link = await gateway.connect(replica)
        link.send(MessageKind.REBUILD, messages.pack_rebuild(token, len(log), 1))
        link.send(MessageKind.LOG, log[:100])
        assert type(await gateway.refusal()) is LogRefused
        assert holder.freed.is_set()

    run(test, lease_timeout_s=0.3)


def test_a_gateway_that_leaves_before_its_log_is_whole_leaves_nothing() -> None:
    async def test(fleet: Fleet, replica: LoopbackReplica) -> None:
        gateway, log = Gateway(), packed_log()
        token, holder = replica.sessions.holders.hold(LeaseRequest("s", ""))
        link = await gateway.connect(replica)
        link.send(MessageKind.REBUILD, messages.pack_rebuild(token, len(log), 1))
        link.send(MessageKind.LOG, log[:100])
        await asyncio.sleep(0.05)
        assert replica.used == 1
        link.close()
        await asyncio.wait_for(holder.freed.wait(), 5)

    run(test)
