"""One slot that a session holds: the lease, the link to its replica, and what is sent there.

A session has a new one, with a generation one higher, each time it goes on at another replica. `join` gets
lease and link; `open` or `rebuild` says what the slot is for; once it is `ready` it takes frames. Frames that
waited are sent no faster than the replica may hold them, so none of those is lost on the way. What the
replica says comes to `on_message`; `on_end` is called once, when the slot is of no use any more.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from deployments.gateway.lease import Lease
from deployments.gateway.leases import Claim
from deployments.wire import messages, transfer
from deployments.wire.link import Link, OnLost, OnMessage
from deployments.wire.messages import NOTHING_HELD, Address, Grant, Held, MessageKind
from personaplex.config import Pcm
from personaplex.errors import PersonaplexError, ProtocolError
from personaplex.persona import Persona

Connect = Callable[[Grant, OnMessage, OnLost], Awaitable[Link]]


@dataclass(frozen=True)
class UserFrame:
    """One frame of the user. `timestamp`: as on the link; no other frame that waits has it. `arrived`:
    seconds of the monotonic clock."""

    timestamp: int
    arrived: float
    pcm: Pcm


class Slot:
    """Made before its lease. `frame`: number of the first reply that is expected of it."""

    def __init__(
        self,
        generation: int,
        connect: Connect,
        connect_timeout_s: float,
        window: int,
        on_message: Callable[[Slot, MessageKind, bytes], None],
        on_end: Callable[[Slot, PersonaplexError | None], None],
        held: Held = NOTHING_HELD,
    ) -> None:
        """`window`: frames that may be under way at once while others wait to be sent. `held`: what the
        session's client comes back with."""
        self.generation, self.frame = generation, 0
        self.replica = ""
        self.ready = False
        self.ended = False
        self.dropped = 0  # frames that the link had no room for
        self._held = held
        self._connect, self._connect_timeout_s, self._window = connect, connect_timeout_s, window
        self._on_message, self._on_end = on_message, on_end
        self._lease: Lease | None = None
        self._link: Link | None = None
        self._waiting: deque[UserFrame] = deque()
        self._under_way = 0
        self._connected = False

    async def join(self, claim: Claim, on_position: Callable[[int], None]) -> Grant:
        """Gets the lease, then the link. Raises NoCapacity, OSError once the lease is given back."""
        self._lease = await claim.lease(on_position)
        self.replica = self._lease.grant.replica
        return self._lease.grant

    async def connect(self) -> None:
        """Gets the link. Raises OSError, TimeoutError among them, once the lease is given back."""
        assert self._lease is not None, "join first"
        # asyncio.wait_for may swallow the cancellation of a session that ends just when the link is there.
        connecting = asyncio.ensure_future(self._keep_link(self._lease.grant))
        try:
            if not (await asyncio.wait({connecting}, timeout=self._connect_timeout_s))[0]:
                raise TimeoutError("the replica did not answer in time")
            connecting.result()
            if self.ended:
                raise ConnectionError("the replica hung up at once")
            self._connected = True
        except OSError:
            self.ended = True  # it may be there just too late; what it says next is of no account
            self._lease.release()
            raise
        finally:
            connecting.cancel()
            await asyncio.wait({connecting})
            if self.ended:
                self.close()

    def open(self, persona: Persona) -> None:
        """A new session."""
        self._send(MessageKind.OPEN, messages.pack_open(self._token, persona, self.generation, self._held))

    def rebuild(self, log: bytes, frame: int) -> None:
        """A session that goes on at `frame`, from its packed log. Raises LogRefused for one too large."""
        transfer.check_size(len(log))
        self.frame = frame
        opening = messages.pack_rebuild(self._token, len(log), self.generation, self._held)
        self._send(MessageKind.REBUILD, opening)
        for piece in transfer.pieces(log):
            self._send(MessageKind.LOG, piece)

    def begin(self, waiting: Iterable[UserFrame]) -> None:
        """The slot is ready: takes the frames that waited for it, and later ones."""
        self.ready = True
        self._waiting.extend(waiting)
        self._pump()

    def send_frame(self, frame: UserFrame) -> None:
        """Sends one frame, or keeps it behind those that wait. Without effect once the slot has ended."""
        if self._waiting:
            self._waiting.append(frame)
        elif not self.ended:
            self._transmit(frame)

    def replied(self) -> None:
        """A frame was answered."""
        self._under_way = max(0, self._under_way - 1)
        self._pump()

    def detach(self) -> None:
        """As `close`, but the client may come back: the replica keeps the session's log."""
        if self._link is not None and not self.ended:
            self._send(MessageKind.DETACH, b"")
        self.close()

    def close(self) -> None:
        """Closes the link, if there is one. Idempotent."""
        self.ended = True
        self._waiting.clear()
        if self._link is not None:
            self._link.close()

    async def release(self, timeout_s: float) -> None:
        """Closes the link and gives the lease back, once the replica says that the slot is free or did not
        for `timeout_s`."""
        self.close()  # it may have been connecting until just now
        if self._lease is not None:
            if self._link is not None:
                await self._lease.wait_freed(timeout_s)
            self._lease.release()

    @property
    def address(self) -> Address | None:
        """Its replica's; None before the lease."""
        if self._lease is None:
            return None
        grant = self._lease.grant
        return grant.replica, grant.host, grant.port

    @property
    def _token(self) -> bytes:
        assert self._lease is not None, "join first"
        return self._lease.grant.token

    async def _keep_link(self, grant: Grant) -> None:
        self._link = await self._connect(grant, self._receive, self._lost)

    def _send(self, kind: MessageKind, payload: bytes) -> None:
        assert self._link is not None, "connect first"
        self._link.send(kind, payload)

    def _pump(self) -> None:
        while self._waiting and self._under_way < self._window and not self.ended:
            self._transmit(self._waiting.popleft())

    def _transmit(self, frame: UserFrame) -> None:
        assert self._link is not None, "connect first"
        dropped = self._link.dropped
        self._link.send_frame(MessageKind.FRAME, messages.pack_frame(frame.timestamp, frame.pcm))
        self.dropped += self._link.dropped - dropped
        self._under_way += 1

    def _receive(self, link: Link, kind: MessageKind, payload: bytes) -> None:
        if self.ended:
            return
        if kind is MessageKind.CLOSE:
            self._end(messages.unpack_error(payload))
        elif kind in (MessageKind.READY, MessageKind.REPLY):
            self._on_message(self, kind, payload)
        else:
            raise ProtocolError("a message that does not belong here")

    def _lost(self, link: Link) -> None:
        if not self.ended:
            self._end(None)

    def _end(self, error: PersonaplexError | None) -> None:
        self.ended = True
        self._waiting.clear()
        if self._connected:  # else `connect` says so
            self._on_end(self, error)
