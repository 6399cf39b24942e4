"""Sessions of one replica that lost their client or their gateway, and those who come back for them.

What is left of such a session is its log. It is kept for `resume_grace_s`, and given over the media link to
whoever shows the session's token; it goes when the taker says that the session goes on elsewhere. Knows
links and logs, no engine and no slots.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from deployments.policy import kept_sessions
from deployments.replica.running import RunningLog
from deployments.wire import messages
from deployments.wire.detached import Detached
from deployments.wire.handshake import Keyring
from deployments.wire.link import Link
from deployments.wire.messages import MessageKind, TakenSession
from deployments.wire.tokens import ResumeClaim, ResumeTokens
from deployments.wire.transfer import pieces
from personaplex.errors import LogRefused, SessionTaken


class Comebacks:
    """Made on the replica's event loop."""

    def __init__(self, grace_s: float, slots: int, keyring: Keyring, changed: Callable[[], None]) -> None:
        """`grace_s`: 0 keeps nothing. `changed` is called when a session is kept or forgotten."""
        self.kept = Detached(grace_s, kept_sessions(slots), time.monotonic)
        self._grace_s, self._keyring, self._changed = grace_s, keyring, changed
        self._takers: dict[Link, str] = {}  # of which session
        self._loop = asyncio.get_running_loop()

    def keep(self, session: str, running: RunningLog) -> None:
        """Keeps what is left of a session, if its client may come back for it."""
        if not running.wanted:
            return
        try:
            log = running.recorder.log()
        except LogRefused:  # the sound of its last frame is not known
            return
        self.kept.keep(session, log, running.generation, running.held, running.texts)
        self._loop.call_later(self._grace_s + 0.1, self._expire)
        self._changed()

    def read(self, token: bytes) -> ResumeClaim:
        """What a token says. Raises ResumeRefused."""
        return ResumeTokens(self._keyring.secrets).read(token.decode("ascii", "replace"))

    def give(self, link: Link, claim: ResumeClaim) -> None:
        """Gives the session's log to who is at the other end of `link`, from now on its taker. Raises
        ResumeRefused when it is not here, or the token is not its own."""
        kept = self.kept.take(claim.session, claim.counter, link)
        for other in [other for other, session in self._takers.items() if session == claim.session]:
            del self._takers[other]
            other.close(SessionTaken())  # it has the log, but its client is not there any more
        self._takers[link] = claim.session
        log = kept.log.pack()
        taken = TakenSession(kept.generation, len(log), kept.texts)
        link.send(MessageKind.TAKEN, messages.pack_taken(taken))
        for piece in pieces(log):
            link.send(MessageKind.LOG, piece)

    def takes(self, link: Link) -> bool:
        """Whether a taker is at the other end."""
        return link in self._takers

    def answer(self, link: Link, kind: MessageKind) -> None:
        """What a taker says at last: CLOSE that the session goes on elsewhere, anything else that it does
        not."""
        session = self._takers.pop(link)
        if kind is MessageKind.CLOSE:
            self.kept.confirm(session, link)
            self._changed()
        link.close()

    def lost(self, link: Link) -> None:
        """A connection is gone; a session that was taken over it is still here."""
        self._takers.pop(link, None)

    def _expire(self) -> None:
        self.kept.expire()
        self._changed()
