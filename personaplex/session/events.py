"""What a session core is told and what it asks for.

Events come from three sides: the peer (PeerAudio, PeerMessage, PeerClosed), the service behind the core
(everything from Queued to EngineLost) and the clock (Tick). Commands go to the shell that owns the socket.
None of them is bytes of a protocol: a codec (moshi.py) makes events of messages and messages of commands.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from personaplex.errors import PersonaplexError
from personaplex.words import Segment


@dataclass(frozen=True)
class PeerAudio:
    """A piece of the peer's stream, not empty. `size`: bytes of the message it came in."""

    data: bytes
    size: int


@dataclass(frozen=True)
class PeerMessage:
    """Any other message from the peer, of `size` bytes. `known` is False when the protocol has no such
    message."""

    size: int
    known: bool = True


@dataclass(frozen=True)
class PeerEnds:
    """The peer has said that it is done, and was told so in its protocol's own way."""


@dataclass(frozen=True)
class Begun:
    """The peer has said what session it wants; it asks for a slot."""


@dataclass(frozen=True)
class PeerClosed:
    """The connection is gone, whoever ended it."""


@dataclass(frozen=True)
class Queued:
    """No slot is free; the session is number `position` in the queue, counting from 1. `wait_s`: how long it
    will wait, where that is known."""

    position: int
    wait_s: float | None = None


@dataclass(frozen=True)
class LeaseGranted:
    """The session has a slot; its persona is being prefilled."""


@dataclass(frozen=True)
class Ready:
    """The slot will take frames from now on. `details` go to the client as metadata."""

    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AudioHeard:
    """What FeedAudio handed over was decoded to audio, silence or not. Reported at least once a second while
    audio comes."""


@dataclass(frozen=True)
class AgentAudio:
    """80 ms of agent speech in the peer's format: of Ogg one whole page. `quiet` if leaving it out would not
    be heard."""

    page: bytes
    quiet: bool = False


@dataclass(frozen=True)
class AgentText:
    """What the agent writes in the frame whose AgentAudio comes next, or would if it were not left out: whole
    characters only; "" is allowed and sends nothing."""

    text: str


@dataclass(frozen=True)
class UserText:
    """What the user said, as the transcriber read it: some time after its end, in order of time."""

    segment: Segment


@dataclass(frozen=True)
class UserTextLost:
    """The user spoke from `start` to `end`, seconds as in `Segment`, and there will be no text of it: the
    transcriber was `behind` or `unavailable`."""

    start: float
    end: float
    reason: Literal["behind", "unavailable"]


@dataclass(frozen=True)
class Failed:
    """The session cannot start or go on: refused, bad audio, unknown voice, no capacity."""

    error: PersonaplexError


@dataclass(frozen=True)
class EngineLost:
    """The replica that held the slot is gone."""


@dataclass(frozen=True)
class SessionNotice:
    """Something happened that a client may want to know: `kind` names it, `data` says more, as JSON."""

    kind: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tick:
    """Time has passed; due at the core's `deadline()`."""


Event = (
    PeerAudio
    | PeerMessage
    | PeerEnds
    | PeerClosed
    | Begun
    | Queued
    | LeaseGranted
    | Ready
    | AgentAudio
    | AudioHeard
    | AgentText
    | UserText
    | UserTextLost
    | Failed
    | EngineLost
    | SessionNotice
    | Tick
)


@dataclass(frozen=True)
class SendHandshake:
    """The session is live."""


@dataclass(frozen=True)
class SendAudio:
    """80 ms of the agent's stream."""

    page: bytes


@dataclass(frozen=True)
class SendText:
    """Agent text, to be appended verbatim; never empty."""

    text: str


@dataclass(frozen=True)
class SendUserText:
    """What the user said, or that nobody can tell; only to peers that asked for it."""

    heard: UserText | UserTextLost


@dataclass(frozen=True)
class SendPlace:
    """The place in the queue, 1 being next; 0 when the session has left the queue. `wait_s`: see Queued."""

    position: int
    wait_s: float | None = None


@dataclass(frozen=True)
class SendDetails:
    """What the session was given: voice, seeds, its name."""

    details: Mapping[str, Any]


@dataclass(frozen=True)
class SendNotice:
    """Something the client may want to know; see SessionNotice."""

    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class SendError:
    """Why the session ends, in words for people and as what was raised."""

    message: str
    error: PersonaplexError | None = field(default=None, compare=False)


@dataclass(frozen=True)
class SendKeepAlive:
    """Nothing to say; the session is still there."""


@dataclass(frozen=True)
class FeedAudio:
    """Hand these bytes of the peer's stream to the transcoder."""

    data: bytes


@dataclass(frozen=True)
class Close:
    """Close the connection with a WebSocket close code (RFC 6455); `reason` is for people, of any length."""

    code: int
    reason: str


Send = (
    SendHandshake
    | SendAudio
    | SendText
    | SendUserText
    | SendPlace
    | SendDetails
    | SendNotice
    | SendError
    | SendKeepAlive
)
Command = Send | FeedAudio | Close
