"""Asterisk's `chan_websocket`: a call of any PBX or SIP trunk, with the model's own rate as slin24.

`Dial(WebSocket/NAME/c(slin24)f(json))` connects here. Control messages are text, JSON or the plain form of
older versions; audio is binary both ways, pieces of any length, and Asterisk paces what it is sent. Closing
the socket hangs up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deployments.gateway.protocols.translator import Begin, Message, Read
from personaplex.audio.pcm import PcmFormat, PcmTranscoder
from personaplex.errors import BadAudio, PersonaplexError, ProtocolError
from personaplex.persona import Persona
from personaplex.session.events import Failed, PeerAudio, PeerMessage, Send, SendAudio, SendError
from personaplex.session.moshi import MESSAGE_LIMIT

SUBPROTOCOL = "media"
CONTROL_LIMIT = 8_192  # characters
_FORMATS = {
    "slin": PcmFormat("pcm16", 8_000),
    "slin16": PcmFormat("pcm16", 16_000),
    "slin24": PcmFormat("pcm16", 24_000),
    "slin48": PcmFormat("pcm16", 48_000),
    "ulaw": PcmFormat("mulaw", 8_000),
    "alaw": PcmFormat("alaw", 8_000),
}


class AsteriskTranslator:
    """One call."""

    name = "asterisk"
    handshake_delay_s = 0.0
    user_text = False
    byte_share = 1.6  # slin48 in pieces of 20 ms

    def __init__(self, persona: Persona, *, clock: Callable[[], float], burst_s: float) -> None:
        self.transcoder = PcmTranscoder(clock=clock, burst_s=burst_s)
        self._persona = persona
        self._format: PcmFormat | None = None
        self._json = True

    def open(self) -> Sequence[Message]:
        return ()

    def read(self, message: Message) -> Iterator[Read]:
        size = len(message) if isinstance(message, bytes) or message.isascii() else len(message.encode())
        try:
            yield from self._understand(message, size)
        except PersonaplexError as error:
            yield PeerMessage(size, known=False)
            yield Failed(error)

    def write(self, command: Send) -> Sequence[Message]:
        match command:
            case SendAudio(page):
                return [page]
            case SendError() if self._format is not None:
                return ['{"command":"FLUSH_MEDIA"}' if self._json else "FLUSH_MEDIA"]
            case _:
                return ()

    def _understand(self, message: Message, size: int) -> Iterator[Read]:
        if isinstance(message, bytes):
            if self._format is None:
                raise ProtocolError("media before MEDIA_START")
            if len(message) % self._format.sample_bytes or len(message) > MESSAGE_LIMIT:
                raise BadAudio("media of half a sample, or too long")
            yield PeerAudio(message, size) if message else PeerMessage(size)
            return
        kind, fields = self._control(message)
        if kind != "MEDIA_START":
            yield PeerMessage(size)
            return
        if self._format is not None:
            raise ProtocolError("media starts once")
        form = _FORMATS.get(str(fields.get("format")))
        if form is None:
            raise BadAudio(f"the formats of a call are {', '.join(_FORMATS)}")
        self._format = form
        self.transcoder.set_formats(form, form)
        yield PeerMessage(size)
        yield Begin(self._persona)

    def _control(self, message: str) -> tuple[str, Mapping[str, Any]]:
        """A control message's name and fields."""
        if len(message) > CONTROL_LIMIT:
            raise ProtocolError("a control message that is too long")
        if not message.lstrip().startswith("{"):
            self._json = False
            name, *words = message.split() or [""]
            return name, dict(word.partition(":")[::2] for word in words)
        try:
            value = json.loads(message)
        except (ValueError, RecursionError) as error:
            raise ProtocolError("a control message that is no JSON") from error
        return str(value.get("event")), value
