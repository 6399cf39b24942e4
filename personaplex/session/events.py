"""What a session core is told and what it asks for.

Events come from three sides: the peer's socket (Received, ReceivedText, PeerClosed), the service behind it
(everything from Queued to EngineLost) and the clock (Tick). Commands go to the shell that owns the socket.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from personaplex.errors import PersonaplexError


@dataclass(frozen=True)
class Received:
    """One binary message from the peer."""

    data: bytes


@dataclass(frozen=True)
class ReceivedText:
    """One text frame from the peer: there are none in the protocol, so it is ignored."""

    text: str


@dataclass(frozen=True)
class PeerClosed:
    """The connection is gone, whoever ended it."""


@dataclass(frozen=True)
class Queued:
    """No slot is free; the session is number `position` in the queue, counting from 1."""

    position: int


@dataclass(frozen=True)
class LeaseGranted:
    """The session has a slot; its persona is being prefilled."""


@dataclass(frozen=True)
class Ready:
    """The slot will take frames from now on. `details` go to the client as metadata."""

    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AudioHeard:
    """What FeedAudio gave holds audio that could be decoded, silence or not. Told once a second or more often
    while it comes."""


@dataclass(frozen=True)
class AgentAudio:
    """80 ms of agent speech: one whole Ogg page. `quiet` if leaving it out would not be heard."""

    page: bytes
    quiet: bool = False


@dataclass(frozen=True)
class AgentText:
    """Agent text, whole characters only; "" is allowed and sends nothing."""

    text: str


@dataclass(frozen=True)
class Failed:
    """The session cannot start or go on: refused, bad audio, unknown voice, no capacity."""

    error: PersonaplexError


@dataclass(frozen=True)
class EngineLost:
    """The replica that held the slot is gone."""


@dataclass(frozen=True)
class Tick:
    """Time has passed; due at the core's `deadline()`."""


Event = (
    Received
    | ReceivedText
    | PeerClosed
    | Queued
    | LeaseGranted
    | Ready
    | AgentAudio
    | AudioHeard
    | AgentText
    | Failed
    | EngineLost
    | Tick
)


@dataclass(frozen=True)
class Send:
    """Send one binary message."""

    data: bytes


@dataclass(frozen=True)
class FeedAudio:
    """Hand these bytes of the peer's Ogg stream to the transcoder."""

    data: bytes


@dataclass(frozen=True)
class Close:
    """Close the connection. `reason` has at most 123 bytes."""

    code: int
    reason: str


Command = Send | FeedAudio | Close
