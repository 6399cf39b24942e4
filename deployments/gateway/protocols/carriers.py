"""Telephone carriers' media streams: Twilio's, which many imitate, and Telnyx's dialect of it.

A call is one WebSocket with JSON messages both ways: `connected`, `start`, then `media` with 20 ms of the
caller in base64, `dtmf`, `mark` and `stop`. The agent's frames go out one by one as they are due, so that
little is buffered at the carrier, and the caller's speech clears nothing: the model yields by itself. A
missing piece of the caller is filled with silence; pieces may come out of order where the dialect says so.
Closing the socket ends the call.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.gateway.protocols.translator import Begin, Message, Read
from personaplex.audio.pcm import PcmFormat, PcmTranscoder
from personaplex.errors import BadAudio, PersonaplexError, ProtocolError
from personaplex.session.events import Failed, PeerAudio, PeerEnds, PeerMessage, Send, SendAudio, SendError
from personaplex.session.moshi import MESSAGE_LIMIT

PIECE_LIMIT = 65_536  # bytes of audio in one message
FILL_LIMIT = 50  # missing pieces in a row that are filled; more are a new beginning
_FORMATS = {
    ("audio/x-mulaw", 8_000): PcmFormat("mulaw", 8_000),
    ("pcmu", 8_000): PcmFormat("mulaw", 8_000),
    ("pcma", 8_000): PcmFormat("alaw", 8_000),
    ("l16", 8_000): PcmFormat("pcm16", 8_000),
    ("l16", 16_000): PcmFormat("pcm16", 16_000),
    ("l16", 24_000): PcmFormat("pcm16", 24_000),
}


@dataclass(frozen=True)
class Dialect:
    """Names of a carrier's fields. `window`: pieces that one which is late may still be waited for."""

    name: str
    stream: str
    media_format: str
    rate: str
    parameters: str
    names_stream: bool  # in what it is sent
    window: int


TWILIO = Dialect("twilio", "streamSid", "mediaFormat", "sampleRate", "customParameters", True, 0)
TELNYX = Dialect("telnyx", "stream_id", "media_format", "sample_rate", "custom_parameters", False, 5)


class Pieces:
    """Numbered pieces of one stream, in order and without gaps."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._next: int | None = None
        self._early: dict[int, bytes] = {}

    def push(self, number: int, data: bytes, form: PcmFormat) -> bytes:
        """What can be heard now that piece `number` is there; b"" for one that came twice or too late."""
        if self._next is None:
            self._next = number
        if number < self._next:
            return b""
        self._early[number] = data
        heard = self._in_order()
        if len(self._early) > self._window:
            missing = min(self._early) - self._next
            if missing <= FILL_LIMIT:
                heard += form.silence(missing * len(data))
            self._next = min(self._early)
            heard += self._in_order()
        return heard

    def _in_order(self) -> bytes:
        heard = []
        assert self._next is not None
        while self._next in self._early:
            heard.append(self._early.pop(self._next))
            self._next += 1
        return b"".join(heard)


class CarrierTranslator:
    """One call. `admit` makes of the call's own parameters what begins the session; it raises what the call
    is refused with."""

    handshake_delay_s = 0.0
    user_text = False
    byte_share = 1.0

    def __init__(
        self,
        dialect: Dialect,
        admit: Callable[[Mapping[str, str]], Begin],
        *,
        clock: Callable[[], float],
        burst_s: float,
    ) -> None:
        self.name = dialect.name
        self.transcoder = PcmTranscoder(clock=clock, burst_s=burst_s)
        self._dialect, self._admit = dialect, admit
        self._stream = ""
        self._format = PcmFormat("mulaw", 8_000)
        self._begun = False
        self._pieces = Pieces(dialect.window)

    def open(self) -> Sequence[Message]:
        return ()

    def read(self, message: Message) -> Iterator[Read]:
        size = len(message) if isinstance(message, bytes) or message.isascii() else len(message.encode())
        try:
            if isinstance(message, bytes) or len(message) > MESSAGE_LIMIT:
                raise ProtocolError("a media stream speaks in JSON messages")
            yield from self._understand(_object(message), size)
        except PersonaplexError as error:
            yield PeerMessage(size, known=False)
            yield Failed(error)

    def write(self, command: Send) -> Sequence[Message]:
        match command:
            case SendAudio(page):
                return [self._told("media", media={"payload": base64.b64encode(page).decode()})]
            case SendError():
                return [self._told("clear")] if self._begun else []
            case _:
                return ()

    def _understand(self, event: Mapping[str, Any], size: int) -> Iterator[Read]:
        kind = event.get("event")
        if kind == "media":
            if not self._begun:
                raise ProtocolError("media before the start")
            media = _part(event, "media")
            if media.get("track", "inbound") != "inbound":
                yield PeerMessage(size)
                return
            piece = _audio(media.get("payload"), self._format)
            heard = self._pieces.push(_number(media.get("chunk")), piece, self._format)
            yield PeerAudio(heard, size) if heard else PeerMessage(size)
        elif kind == "start":
            if self._begun:
                raise ProtocolError("a call starts once")
            begin = self._start(event)
            yield PeerMessage(size)
            yield begin
        elif kind == "stop":
            yield PeerMessage(size)
            yield PeerEnds()
        else:
            yield PeerMessage(size, known=kind in ("connected", "dtmf", "mark"))

    def _start(self, event: Mapping[str, Any]) -> Begin:
        start = _part(event, "start")
        stream = event.get(self._dialect.stream) or start.get(self._dialect.stream)
        if not isinstance(stream, str) or len(stream) > 128:
            raise ProtocolError("a call's start names its stream")
        form = _part(start, self._dialect.media_format)
        encoding, rate = form.get("encoding"), form.get(self._dialect.rate, 8_000)
        known = (
            _FORMATS.get((encoding.lower(), int(rate)))
            if isinstance(encoding, str) and str(rate).isdecimal() and len(str(rate)) < 8
            else None
        )
        if known is None or form.get("channels", 1) not in (1, "1"):
            raise BadAudio("calls are mu-law or A-law at 8 kHz, or 16-bit samples at 8, 16 or 24 kHz, mono")
        given = start.get(self._dialect.parameters) or {}
        parameters = given if isinstance(given, dict) else {}
        begin = self._admit({name: text for name, text in parameters.items() if isinstance(text, str)})
        self._stream, self._format, self._begun = stream, known, True
        self.transcoder.set_formats(known, known)
        return begin

    def _told(self, kind: str, **fields: Any) -> str:
        event: dict[str, Any] = {"event": kind}
        if self._dialect.names_stream:
            event[self._dialect.stream] = self._stream
        return json.dumps({**event, **fields}, separators=(",", ":"))


def _object(message: str) -> Mapping[str, Any]:
    try:
        value = json.loads(message)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("a message that is no JSON") from error
    if not isinstance(value, dict):
        raise ProtocolError("a message that is no JSON object")
    return value


def _part(event: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = event.get(name)
    if not isinstance(value, dict):
        raise ProtocolError(f"a message without {name}")
    return value


def _number(value: Any) -> int:
    """Carriers write numbers as text."""
    text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    if not text.isascii() or not text.isdecimal() or len(text) > 15:
        raise ProtocolError("a piece of media without a number")
    return int(text)


def _audio(payload: Any, form: PcmFormat) -> bytes:
    if not isinstance(payload, str):
        raise BadAudio("media without a payload")
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadAudio("a payload that is not base64") from error
    if len(data) % form.sample_bytes or len(data) > PIECE_LIMIT:
        raise BadAudio("a payload of half a sample, or too long")
    return data
