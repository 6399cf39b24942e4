"""What a conversation needs of its protocol: a translator between the client's messages and session events.

A translator knows no socket, no clock and no Ray. `read` makes of a client's message what it means: events
for the session core, replies that need no decision of the core, and once, where the upgrade did not say it,
which session is wanted (`Begin`). `write` makes messages of what the core sends. The bytes of a message of
audio are counted by the core, so every message read yields a PeerAudio or a PeerMessage.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from personaplex.audio.transcoder import StreamCounters
from personaplex.config import Pcm
from personaplex.persona import Persona
from personaplex.session.events import Event, Send

Message = str | bytes


@dataclass(frozen=True)
class Reply:
    """A message for the client, to be sent now."""

    message: Message


@dataclass(frozen=True)
class Begin:
    """The persona is settled: the session needs its slot. `ticket` is what may be used only once, and at all,
    to begin a session; "" where none is needed."""

    persona: Persona
    ticket: str = ""


Read = Event | Reply | Begin


class Codec(Protocol):
    """Between the client's audio and frames; see `Transcoder` and `PcmTranscoder`."""

    counters: StreamCounters

    @property
    def feed_bytes(self) -> int: ...
    @property
    def astray(self) -> bool: ...
    @property
    def dropped_pages(self) -> int: ...
    @property
    def resyncs(self) -> int: ...

    def headers(self) -> list[bytes]: ...
    def send(self, frame: Pcm) -> bytes: ...
    def receive(self, data: bytes) -> list[Pcm]: ...


class Translator(Protocol):
    """One client's protocol; made with its conversation."""

    @property
    def name(self) -> str:
        """Of the protocol, as in metrics."""
        ...

    @property
    def transcoder(self) -> Codec: ...
    @property
    def handshake_delay_s(self) -> float:
        """From the upgrade to the handshake, at least, for clients that say nothing."""
        ...

    @property
    def byte_share(self) -> float:
        """Times the bytes a second that an Ogg stream may have."""
        ...

    @property
    def user_text(self) -> bool:
        """Whether the client can be told what its user said."""
        ...

    def open(self) -> Sequence[Message]:
        """What is sent right after the upgrade."""
        ...

    def read(self, message: Message) -> Iterable[Read]:
        """What a client's message means. Never raises for what a client sent."""
        ...

    def write(self, command: Send) -> Sequence[Message]:
        """The messages that tell the client of `command`, in order; often none."""
        ...
