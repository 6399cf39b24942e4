"""What OpenAI's two WebSocket protocols share: JSON events, errors, audio in base64.

A client's event is a JSON object with a `type`. What is wrong with one raises `Refused`, which becomes an
`error` event; the session goes on. Nothing here keeps more than one message, and no value of a client is
trusted to have its type.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from personaplex.audio.pcm import PcmFormat
from personaplex.errors import (
    BadAudio,
    BadParameter,
    Forbidden,
    NoCapacity,
    PersonaplexError,
    PromptTooLong,
    ProtocolError,
    SessionExpired,
    SessionLost,
    TooManySessions,
    Unauthorized,
    UnknownVoice,
)
from personaplex.persona import Persona
from personaplex.session.moshi import MESSAGE_LIMIT

Event = dict[str, Any]

NAME_LIMIT = 256  # characters of a name that is told back
ROLE_LIMIT = 32_768  # of a role text with all that joins it; the replica counts its tokens

INVALID = "invalid_request_error"
SERVER = "server_error"

_CODES: tuple[tuple[type[PersonaplexError], str, str], ...] = (  # the first that fits
    (Unauthorized, INVALID, "invalid_api_key"),
    (Forbidden, INVALID, "origin_not_allowed"),
    (TooManySessions, "rate_limit_error", "rate_limit_exceeded"),
    (NoCapacity, SERVER, "no_capacity"),
    (SessionExpired, INVALID, "session_expired"),
    (SessionLost, SERVER, "session_lost"),
    (UnknownVoice, INVALID, "unknown_voice"),
    (PromptTooLong, INVALID, "instructions_too_long"),
    (BadAudio, INVALID, "invalid_audio"),
    (BadParameter, INVALID, "invalid_value"),
    (ProtocolError, INVALID, "protocol_error"),
)


class Refused(Exception):
    """A client's event that cannot be served; the session goes on."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def refuse(code: str, message: str, param: str | None = None) -> NoReturn:
    raise Refused(code, message, param)


def describe(error: PersonaplexError | None, message: str) -> dict[str, Any]:
    """`{type, code, message, param}` of one of our own errors."""
    for kind, category, code in _CODES:
        if isinstance(error, kind):
            return {"type": category, "code": code, "message": message, "param": None}
    return {"type": SERVER, "code": "server_error", "message": message, "param": None}


def parse(text: str) -> Event:
    """One event. Raises Refused for what is none."""
    if len(text) > MESSAGE_LIMIT:
        refuse("message_too_long", f"at most {MESSAGE_LIMIT} characters are accepted")
    try:
        event = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        refuse("invalid_json", "the message is no JSON that can be read")
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        refuse("invalid_event", "an event is a JSON object with a type", "type")
    return event


def event_id_of(event: Mapping[str, Any]) -> str | None:
    """The client's own name of its event, cut to what an error may repeat."""
    value = event.get("event_id")
    return value[:512] if isinstance(value, str) else None


def dump(event: Mapping[str, Any]) -> str:
    return json.dumps(event, separators=(",", ":"))


def audio_of(event: Mapping[str, Any], form: PcmFormat) -> bytes:
    """The bytes of `audio`. Raises Refused for bad base64 and for half a sample."""
    text = event.get("audio")
    if not isinstance(text, str):
        refuse("invalid_audio", "audio is a string in base64", "audio")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        refuse("invalid_audio", "audio is not base64", "audio")
    if len(data) % form.sample_bytes:
        refuse("invalid_audio", "16-bit audio has an even number of bytes", "audio")
    return data


def audio_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def text_of(value: Any, param: str) -> str:
    """A string that can be encoded. Raises Refused."""
    if not isinstance(value, str):
        refuse("invalid_type", f"{param} is a string", param)
    try:
        value.encode()
    except UnicodeEncodeError:
        refuse("invalid_value", f"{param} has half a character", param)
    return value


def name_of(value: Any, param: str) -> str:
    """A string short enough to be told back. Raises Refused."""
    text = text_of(value, param)
    if len(text) > NAME_LIMIT:
        refuse("invalid_value", f"{param} has at most {NAME_LIMIT} characters", param)
    return text


def role_with(asked: str, typed: Sequence[str]) -> str:
    """The role text of a session that was asked for one, with what its client typed before the start: that
    follows a role of the client's own, and takes the place of the default one."""
    own = "" if any(typed) and asked == Persona().text_prompt else asked
    return "\n".join(text for text in (own, *typed) if text)


def check_role(text: str, param: str) -> None:
    """Raises Refused for a role text that is too long for any prompt."""
    if len(text) > ROLE_LIMIT:
        refuse("instructions_too_long", f"a role text has at most {ROLE_LIMIT} characters", param)


def object_of(value: Any, param: str) -> Mapping[str, Any]:
    """An object; None counts as an empty one. Raises Refused."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        refuse("invalid_type", f"{param} is an object", param)
    return value


def number_of(value: Any, param: str, least: float, most: float) -> float:
    """Raises Refused for what is no number in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        refuse("invalid_value", f"{param} is a number from {least:g} to {most:g}", param)
    number = float(value)
    assert math.isfinite(number)
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


class Chunks:
    """A client's audio in whole frames, so that a begun one can still be dropped or padded."""

    def __init__(self) -> None:
        self._begun = b""
        self.bytes = 0  # pushed so far

    def push(self, data: bytes, form: PcmFormat) -> bytes:
        """The whole frames that `data` completes."""
        self.bytes += len(data)
        data = self._begun + data
        whole = len(data) - len(data) % form.frame_bytes
        self._begun = data[whole:]
        return data[:whole]

    def pad(self, form: PcmFormat) -> bytes:
        """The begun frame with silence to its end; b"" where none is begun."""
        if not self._begun:
            return b""
        data = self._begun + form.silence(form.frame_bytes - len(self._begun))
        self._begun = b""
        return data

    def clear(self) -> None:
        """Drops the begun frame."""
        self.bytes -= len(self._begun)
        self._begun = b""
