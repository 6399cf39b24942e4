"""Clients that come back: where their sessions are found, and how this gateway gets them.

A token names a session, not where it is. Replicas tell the fleet which sessions they hold or keep; those
that name this one are asked over the media link, the newest slot first, and judge the token. A session whose
replica is gone too may still be kept here, by the gateway that lost its client. Nothing depends on the fleet
being up to date but how soon the session is found.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

from deployments.wire import messages
from deployments.wire.detached import Detached
from deployments.wire.link import Link, OnLost, OnMessage
from deployments.wire.messages import MessageKind, ReplicaStatus, TakenSession
from deployments.wire.tokens import ResumeClaim, ResumeTokens
from deployments.wire.transfer import LogReceiver
from personaplex.errors import LogRefused, PersonaplexError, ProtocolError, ResumeRefused, SessionLost
from personaplex.sessionlog import SessionLog

ASK_TIMEOUT_S = 3.0  # for one replica to give a session
KEPT_LIMIT = 64  # sessions whose logs a gateway keeps: 2 MB each

ConnectTo = Callable[[str, str, int, OnMessage, OnLost], Awaitable[Link]]  # a replica's name, host and port


@dataclass(eq=False)
class Taken:
    """A session that its client came back to, before it goes on. `counter`: of the token that was shown."""

    session: str
    counter: int
    log: SessionLog
    generation: int
    texts: Sequence[tuple[int, str]]
    confirm: Callable[[], None] = field(repr=False)  # it goes on here
    give_back: Callable[[], None] = field(repr=False)  # it does not; without effect after `confirm`


class Resumes:
    """What the sessions of one gateway share."""

    def __init__(
        self,
        grace_s: float,
        secrets: Callable[[], Sequence[bytes]],
        describe: Callable[[], Awaitable[Sequence[ReplicaStatus]]],
        connect: ConnectTo,
    ) -> None:
        """`secrets`: the application's, newest first. `describe` asks the fleet. `connect` makes a link to a
        replica's media port."""
        self.grace_s = grace_s
        self._secrets, self._describe, self._connect = secrets, describe, connect
        self._kept = Detached(grace_s, KEPT_LIMIT, time.monotonic)

    def token(self, session: str, generation: int) -> str:
        """What the client of the session's slot `generation` comes back with."""
        return ResumeTokens(self._secrets()).make(ResumeClaim(session, generation))

    def keep(
        self, session: str, log: SessionLog, generation: int, held: int, texts: Iterable[tuple[int, str]]
    ) -> None:
        """Keeps a session that lost its client, see `Detached.keep`."""
        self._kept.keep(session, log, generation, held, texts)
        asyncio.get_running_loop().call_later(self.grace_s + 0.1, self._kept.expire)

    async def take(self, token: str) -> Taken:
        """The session that a token is good for. Raises ResumeRefused when there is none, SessionLost while
        nobody can tell: this gateway has just begun, or the fleet has."""
        secrets, replicas = self._secrets(), await self._describe()
        if not secrets or not replicas:
            raise SessionLost("the service is starting; please connect again")
        claim = ResumeTokens(secrets).read(token)
        for replica in _holders(replicas, claim.session):
            with contextlib.suppress(ResumeRefused, LogRefused, OSError):
                return await self._take_from(replica, claim, token)
        kept = self._kept.take(claim.session, claim.counter, claim)
        return Taken(
            claim.session,
            claim.counter,
            kept.log,
            kept.generation,
            kept.texts,
            confirm=lambda: self._kept.confirm(claim.session, claim),
            give_back=lambda: None,
        )

    async def _take_from(self, replica: ReplicaStatus, claim: ResumeClaim, token: str) -> Taken:
        """Raises ResumeRefused, LogRefused, OSError."""
        request = _Request()
        host, port = replica.media
        connecting = self._connect(replica.replica, host, port, request.on_message, request.on_lost)
        link = await asyncio.wait_for(connecting, ASK_TIMEOUT_S)
        try:
            link.send(MessageKind.TAKE, token.encode())
            answer, log = await asyncio.wait_for(request.result, ASK_TIMEOUT_S)
        except BaseException:
            _give_back(link)
            raise

        def confirm() -> None:
            self._kept.confirm(claim.session, claim)
            link.close()

        with contextlib.suppress(ResumeRefused):  # its own copy goes with the replica's
            self._kept.take(claim.session, claim.counter, claim)
        return Taken(
            claim.session,
            claim.counter,
            log,
            answer.generation,
            answer.texts,
            confirm=confirm,
            give_back=lambda: _give_back(link),
        )


class _Request:
    """One replica's answer to TAKE."""

    def __init__(self) -> None:
        self.result: asyncio.Future[tuple[TakenSession, SessionLog]]
        self.result = asyncio.get_running_loop().create_future()
        self._answer: TakenSession | None = None
        self._log: LogReceiver | None = None

    def on_message(self, link: Link, kind: MessageKind, payload: bytes) -> None:
        if kind is MessageKind.CLOSE:
            self._fail(messages.unpack_error(payload))
        elif kind is MessageKind.TAKEN and self._log is None:
            self._answer = messages.unpack_taken(payload)
            self._log = LogReceiver(self._answer.log_bytes)
        elif kind is MessageKind.LOG and self._answer is not None and self._log is not None:
            whole = self._log.add(payload)
            if whole is not None and not self.result.done():
                self.result.set_result((self._answer, SessionLog.unpack(whole)))
        else:
            raise ProtocolError("a message that does not belong here")

    def on_lost(self, link: Link) -> None:
        self._fail(ConnectionResetError("the replica hung up"))

    def _fail(self, error: PersonaplexError | OSError) -> None:
        if not self.result.done():
            self.result.set_exception(error)
            self.result.exception()  # whoever asked may have gone


def _holders(replicas: Sequence[ReplicaStatus], session: str) -> list[ReplicaStatus]:
    """The replicas that know of a session, the one with its newest slot first."""
    found = [
        (status.generation, number)
        for number, replica in enumerate(replicas)
        for status in (*replica.sessions, *replica.detached)
        if status.session == session and replica.media[1]
    ]
    return [replicas[number] for _, number in sorted(found, reverse=True)]


def _give_back(link: Link) -> None:
    link.send(MessageKind.DETACH, b"")
    link.close()
