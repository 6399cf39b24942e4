"""The Moshi protocol of `/api/chat`; its messages are in personaplex/session/moshi.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from deployments.gateway.protocols.translator import Message, Read
from personaplex.audio.transcoder import Transcoder
from personaplex.session.core import HANDSHAKE_DELAY_S
from personaplex.session.events import Send
from personaplex.session.moshi import bytes_of, event_of, event_of_text


class MoshiTranslator:
    """Ogg Opus both ways. What session is wanted is in the upgrade's query."""

    name = "chat"
    handshake_delay_s = HANDSHAKE_DELAY_S
    user_text = False  # unless it asks for `status`
    byte_share = 1.0

    def __init__(self, clock: Callable[[], float], burst_s: float, *, frames_before: int = 0) -> None:
        """See Transcoder."""
        self.transcoder = Transcoder(clock=clock, burst_s=burst_s, frames_before=frames_before)

    def open(self) -> Sequence[Message]:
        return ()

    def read(self, message: Message) -> Sequence[Read]:
        return (event_of_text(message) if isinstance(message, str) else event_of(message),)

    def write(self, command: Send) -> Sequence[Message]:
        return (bytes_of(command),)
