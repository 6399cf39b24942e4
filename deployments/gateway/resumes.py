"""Clients that come back: where their sessions are found, and how this gateway gets them.

A token names a session, not where it is. A session of this gateway is handed over by its old connection,
which may still look open. Replicas tell the fleet which sessions they hold or keep; those that name this one
are asked over the media link and judge the token. A session whose replica is gone too may still be kept here,
by the gateway that lost its client.

The fleet hears of a slot a moment after its client. So a token that nobody takes, and that was not used as
far as is known, is tried for LOOK_FOR_S before it is refused.

A session that went on elsewhere leaves copies behind, here or at a replica, and they would take the token
that it went on with. So the gateway that hears the client tells the fleet at once that the token is used, and
every gateway asks the fleet first (wire/whereabouts.py). A copy of our own, whose replica cannot be asked, is
given only when the fleet has answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from deployments.gateway.taking import TakeRequest, give_back
from deployments.wire.detached import Detached
from deployments.wire.link import Link, OnLost, OnMessage
from deployments.wire.messages import REPORT_EVERY_S, Address, Held, MessageKind, ReplicaStatus
from deployments.wire.tokens import ResumeClaim, ResumeTokens
from deployments.wire.whereabouts import Whereabouts
from personaplex.errors import LogRefused, ResumeRefused, SessionLost
from personaplex.sessionlog import SessionLog

ASK_TIMEOUT_S = 3.0  # for one replica to give a session
LOOK_FOR_S = 2 * REPORT_EVERY_S  # a slot that is there is known by then
LOOK_EVERY_S = 0.25
LOOK_ELSEWHERE_S = 0.75  # for a session that another gateway keeps: the client had better try that one
KEPT_LIMIT = 64  # sessions whose logs a gateway keeps: 2 MB each

ConnectTo = Callable[[str, str, int, OnMessage, OnLost], Awaitable[Link]]  # the first three: an Address


@dataclass(eq=False)
class Taken:
    """A session that its client came back to, before it goes on. `counter`: of the token that was shown.
    `generation`: no slot that it had is known to have a higher one."""

    session: str
    counter: int
    log: SessionLog
    generation: int
    texts: Sequence[tuple[int, str]]
    confirm: Callable[[], None] = field(repr=False)  # it goes on here
    give_back: Callable[[], None] = field(repr=False)  # it does not; without effect after `confirm`
    lost: bool = False  # its client has come back by yet another connection
    on_lost: Callable[[], None] | None = field(default=None, repr=False)

    def lose(self) -> None:
        """Its client has come back by yet another connection."""
        self.lost = True
        if self.on_lost is not None:
            self.on_lost()


class Own(Protocol):
    """A session of this gateway whose client may come back."""

    def hand_over(self, counter: int) -> None:
        """Its client shows the token with this counter over another connection: unless that was used before,
        the session ends here and is kept."""


class Fleet(Protocol):
    """What the fleet knows, as `Observer` asks and tells it."""

    async def describe(self) -> Sequence[ReplicaStatus]:
        """[] when it does not answer."""

    async def look_up(self, session: str) -> Whereabouts | None:
        """None when it does not answer."""

    def use_tokens(self, session: str, good_from: int, valid_s: float) -> None: ...

    def keep_session(self, session: str, held: Held, generation: int, valid_s: float) -> None: ...


@dataclass(frozen=True)
class _Place:
    """A replica that holds or keeps a session, see `SessionStatus`."""

    address: Address
    generation: int
    held: Held

    def takes(self, counter: int) -> bool:
        return self.held.takes(counter, self.generation)


class Resumes:
    """What the sessions of one gateway share."""

    def __init__(
        self,
        grace_s: float,
        secrets: Callable[[], Sequence[bytes]],
        fleet: Fleet,
        connect: ConnectTo,
        *,
        look_for_s: float = LOOK_FOR_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`secrets`: the application's, newest first. `connect` makes a link to a replica's media
        port. `look_for_s`: how long a session is looked for."""
        self.grace_s = grace_s
        self._secrets, self._fleet, self._connect = secrets, fleet, connect
        self._look_for_s, self._clock, self._sleep = look_for_s, clock, sleep
        self._kept = Detached(grace_s, KEPT_LIMIT, clock)
        self._own: dict[str, Own] = {}
        self._coming: dict[str, Taken] = {}  # taken, but not going on yet

    def token(self, session: str, generation: int) -> str:
        """What the client of the session's slot `generation` comes back with."""
        return ResumeTokens(self._secrets()).make(ResumeClaim(session, generation))

    def enter(self, session: str, own: Own) -> None:
        """From now on `own` is this gateway's session of that name."""
        self._own[session] = own

    def leave(self, session: str, own: Own) -> None:
        """It is no longer. Idempotent."""
        if self._own.get(session) is own:
            del self._own[session]

    def keep(
        self,
        session: str,
        log: SessionLog,
        generation: int,
        held: Held,
        texts: Iterable[tuple[int, str]],
        place: Address | None = None,
    ) -> None:
        """Keeps a session that lost its client, see `Detached.keep`."""
        self._kept.keep(session, log, generation, held, texts, place)
        asyncio.get_running_loop().call_later(self.grace_s + 0.1, self._kept.expire)
        self._fleet.keep_session(session, held, generation, self.grace_s)

    def use(self, session: str, generation: int) -> None:
        """The client of the session's slot `generation` is heard: it has this slot's token, and the earlier
        ones are used."""
        self._fleet.use_tokens(session, generation, self.grace_s + LOOK_FOR_S)

    def free(self, token: str) -> None:
        """The client of a session of this gateway is back: its old connection is closed, and no longer counts
        soon. Without effect for a token of any other session. Whoever shows it has shown its API key."""
        with contextlib.suppress(ResumeRefused):
            claim = ResumeTokens(self._secrets()).read(token)
            if (own := self._own.get(claim.session)) is not None:
                own.hand_over(claim.counter)

    async def take(self, token: str) -> Taken:
        """The session that a token is good for. Raises ResumeRefused when there is none, SessionLost while
        nobody can tell: this gateway has just begun, the fleet has, or the session is on its way to another
        replica."""
        secrets = self._secrets()
        if not secrets:
            raise SessionLost("the service is starting; please connect again")
        claim = ResumeTokens(secrets).read(token)
        began = self._clock()
        while True:
            if (own := self._own.get(claim.session)) is not None:
                own.hand_over(claim.counter)
            replicas, known = await asyncio.gather(self._fleet.describe(), self._fleet.look_up(claim.session))
            if known is not None and known.used(claim.counter):
                raise ResumeRefused
            places = self._places(replicas, claim)
            taken = await self._take_first(places, claim, token, ours=known is not None)
            if taken is not None:
                if (earlier := self._coming.get(claim.session)) is not None:
                    earlier.lose()
                self._coming[claim.session] = taken
                return taken
            elsewhere = known is not None and known.kept(claim.counter)
            look_for_s = min(LOOK_ELSEWHERE_S, self._look_for_s) if elsewhere else self._look_for_s
            if self._clock() >= began + look_for_s:
                break
            await self._sleep(LOOK_EVERY_S)
        if places or elsewhere:
            raise SessionLost("the conversation is being brought back; please connect again")
        if known is None or not replicas:
            raise SessionLost("the service is starting; please connect again")
        raise ResumeRefused

    def _places(self, replicas: Sequence[ReplicaStatus], claim: ResumeClaim) -> list[_Place]:
        """Who may have the session, whom to ask first first. Raises ResumeRefused for a token that was used.

        First comes a session that somebody came back to with this very token and was not heard in yet; then
        the slot that the token was given for. A later slot may be of a move that is not over yet, and not
        know what its client has heard already.
        """
        found = [
            _Place((replica.replica, *replica.media), status.generation, status.held)
            for replica in replicas
            for status in (*replica.sessions, *replica.detached)
            if status.session == claim.session and replica.media[1]
        ]
        if (own := self._kept.place(claim.session)) is not None:
            kept, address = own
            found += [_Place(address, kept.generation, kept.held)]
        if any(place.held.used(claim.counter) for place in found):
            raise ResumeRefused
        found = [place for place in found if place.takes(claim.counter)]
        at = claim.counter
        found.sort(key=lambda one: (one.held.back == at, one.generation == at, one.generation))
        return found[::-1]

    async def _take_first(
        self, places: Sequence[_Place], claim: ResumeClaim, token: str, *, ours: bool
    ) -> Taken | None:
        """`ours`: whether the log that is kept here will do."""
        newest = max((place.generation for place in places), default=0)
        for address in dict.fromkeys(place.address for place in places):
            with contextlib.suppress(ResumeRefused, LogRefused, OSError, asyncio.TimeoutError):
                return await self._take_from(address, newest, claim, token)
        with contextlib.suppress(ResumeRefused):
            if not ours:
                return None
            kept = self._kept.take(claim.session, claim.counter, claim)
            return self._taken(claim, kept.log, max(newest, kept.generation), kept.texts)
        return None

    def _taken(
        self,
        claim: ResumeClaim,
        log: SessionLog,
        generation: int,
        texts: Sequence[tuple[int, str]],
        link: Link | None = None,
    ) -> Taken:
        def confirm() -> None:
            self._forget(taken)
            self._kept.confirm(claim.session, claim)
            if link is not None:
                link.close()

        def return_it() -> None:
            self._forget(taken)
            if link is not None:
                give_back(link)

        taken = Taken(claim.session, claim.counter, log, generation, texts, confirm, return_it)
        return taken

    def _forget(self, taken: Taken) -> None:
        if self._coming.get(taken.session) is taken:
            del self._coming[taken.session]

    async def _take_from(self, address: Address, newest: int, claim: ResumeClaim, token: str) -> Taken:
        """Raises ResumeRefused, LogRefused, OSError, asyncio.TimeoutError."""
        request = TakeRequest()
        connecting = self._connect(*address, request.on_message, request.on_lost)
        link = await asyncio.wait_for(connecting, ASK_TIMEOUT_S)
        try:
            link.send(MessageKind.TAKE, token.encode())
            answer, log = await asyncio.wait_for(request.result, ASK_TIMEOUT_S)
        except BaseException:
            give_back(link)
            raise
        with contextlib.suppress(ResumeRefused):  # its own copy goes with the replica's
            self._kept.take(claim.session, claim.counter, claim)
        taken = self._taken(claim, log, max(newest, answer.generation), answer.texts, link)
        request.on_taken = taken.lose
        return taken
