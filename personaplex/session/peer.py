"""The client's side of one conversation, without a socket, a clock or a sound card.

    OPENING   connecting
    PRIMING   connected; the service has not sent its handshake
    LIVE      audio and text flow both ways
    CLOSING   Close was asked for
    CLOSED    the connection is gone

Laws: `PEER_TABLE` names the events of each state, any other raises IllegalEvent. We speak only when LIVE:
some servers lose what comes before their handshake, stream headers included. Once live, PATIENCE_S without a
message ends the session. A server's error message is shown; how it closes decides how the session ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from personaplex.errors import PersonaplexError, ProtocolError, SessionLost
from personaplex.session.core import CLOSED, CLOSING, LIVE, OPENING, PRIMING, State, after
from personaplex.session.events import Close, PeerClosed, Tick
from personaplex.session.moshi import Audio, Error, Handshake, Metadata, Text, close_reason, decode, encode

PATIENCE_S = 10.0  # as stock web clients


@dataclass(frozen=True)
class Received:
    """One binary message from the server."""

    data: bytes


@dataclass(frozen=True)
class ReceivedText:
    """One text frame from the server: an error, since the protocol has none."""

    text: str


@dataclass(frozen=True)
class Send:
    """Send one binary message."""

    data: bytes


@dataclass(frozen=True)
class Connected:
    """The WebSocket is open."""


@dataclass(frozen=True)
class OwnAudio:
    """One Ogg page of our own speech."""

    page: bytes


@dataclass(frozen=True)
class HangUp:
    """The user is done."""


@dataclass(frozen=True)
class Live:
    """The handshake arrived."""


@dataclass(frozen=True)
class Play:
    """A piece of the agent's Ogg stream."""

    data: bytes


@dataclass(frozen=True)
class Show:
    """Agent text, to be appended verbatim."""

    text: str


@dataclass(frozen=True)
class Notice:
    """Metadata from the service: queue position, session details."""

    data: Mapping[str, Any]


@dataclass(frozen=True)
class Complain:
    """The service reports an error, in words for people."""

    message: str


PeerEvent = Connected | OwnAudio | HangUp | Received | ReceivedText | PeerClosed | Tick
PeerCommand = Send | Close | Live | Play | Show | Notice | Complain

_ANY = (OwnAudio, HangUp, Tick)

PEER_TABLE: Mapping[State, Mapping[type[PeerEvent], tuple[State, ...]]] = {
    OPENING: {
        Connected: (PRIMING,),
        HangUp: (CLOSING,),
        PeerClosed: (CLOSED,),
        Tick: (OPENING,),
    },
    PRIMING: {
        Received: (PRIMING, LIVE, CLOSING),
        ReceivedText: (CLOSING,),
        HangUp: (CLOSING,),
        PeerClosed: (CLOSED,),
        Tick: (PRIMING,),
    },
    LIVE: {
        Received: (LIVE, CLOSING),
        ReceivedText: (CLOSING,),
        OwnAudio: (LIVE,),
        HangUp: (CLOSING,),
        PeerClosed: (CLOSED,),
        Tick: (LIVE, CLOSING),
    },
    CLOSING: {
        **dict.fromkeys(_ANY, (CLOSING,)),
        Received: (CLOSING,),
        ReceivedText: (CLOSING,),
        PeerClosed: (CLOSED,),
    },
    CLOSED: {**dict.fromkeys(_ANY, (CLOSED,)), PeerClosed: (CLOSED,)},
}


class ClientCore:
    """One session seen from the client. `error` is why it ended, if that was not our own wish."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        """`patience_s`: longest silence of a server, once live."""
        self.state = OPENING
        self.error: PersonaplexError | None = None
        self._patience_s = patience_s
        self._last_heard = float("inf")

    def receive(self, event: PeerEvent, now: float) -> list[PeerCommand]:
        """What to do about `event`, in order. Raises IllegalEvent for one that PEER_TABLE does not list."""
        allowed = after(self.state, event, PEER_TABLE)
        if isinstance(event, PeerClosed):
            self.state = CLOSED
            commands: list[PeerCommand] = []
        elif self.state in (CLOSING, CLOSED):
            commands = []
        else:
            try:
                commands = self._handle(event, now)
            except PersonaplexError as error:
                self.error, self.state = error, CLOSING
                commands = [Close(error.close_code, close_reason(str(error)))]
        assert self.state in allowed, (type(event).__name__, self.state)  # an event may be what was said
        return commands

    def deadline(self) -> float | None:
        """When the next Tick is due, or None."""
        return self._last_heard + self._patience_s if self.state is LIVE else None

    def _handle(self, event: PeerEvent, now: float) -> list[PeerCommand]:
        match event:
            case Connected():
                self.state = PRIMING
                return []
            case OwnAudio(page):
                return [Send(encode(Audio(page)))]
            case HangUp():
                self.state = CLOSING
                return [Close(1000, "")]
            case Received(data):
                return self._hear(data, now)
            case ReceivedText():
                raise ProtocolError("text frames are not part of the protocol")
            case _:
                if self.state is LIVE and now >= self._last_heard + self._patience_s:
                    raise SessionLost(f"the server was silent for {self._patience_s:g} s")
                return []

    def _hear(self, data: bytes, now: float) -> list[PeerCommand]:
        self._last_heard = now
        match decode(data):
            case Handshake() if self.state is PRIMING:
                self.state = LIVE
                return [Live()]
            case Audio(page) if page:
                return [Play(page)]
            case Text(text):
                return [Show(text)]
            case Metadata(details):
                return [Notice(details)]
            case Error(message):
                return [Complain(message)]
            case _:
                return []
