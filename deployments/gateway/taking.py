"""How a gateway gets the log of a detached session from the replica that holds or keeps it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from deployments.wire import messages
from deployments.wire.link import Link
from deployments.wire.messages import MessageKind, TakenSession
from deployments.wire.transfer import LogReceiver
from personaplex.errors import PersonaplexError, ProtocolError, SessionTaken
from personaplex.sessionlog import SessionLog


class TakeRequest:
    """One replica's answer to TAKE."""

    def __init__(self) -> None:
        self.result: asyncio.Future[tuple[TakenSession, SessionLog]]
        self.result = asyncio.get_running_loop().create_future()
        self._answer: TakenSession | None = None
        self._log: LogReceiver | None = None
        self.on_taken: Callable[[], None] = lambda: None  # somebody else has it now

    def on_message(self, link: Link, kind: MessageKind, payload: bytes) -> None:
        if kind is MessageKind.CLOSE:
            error = messages.unpack_error(payload)
            self._fail(error)
            if isinstance(error, SessionTaken):
                self.on_taken()
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


def give_back(link: Link) -> None:
    """The session does not go on here: whoever was asked for it keeps it."""
    link.send(MessageKind.DETACH, b"")
    link.close()
