"""The two dialects of `/v1/realtime`: GA and the older beta, which differ in names and in a session's
shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

BETA_HEADER = "realtime=v1"
BETA_SUBPROTOCOL = "openai-beta.realtime-v1"
KEY_SUBPROTOCOL = "openai-insecure-api-key."
SUBPROTOCOL = "realtime"  # the one that is answered

_BETA_NAMES = {
    "response.output_audio.delta": "response.audio.delta",
    "response.output_audio.done": "response.audio.done",
    "response.output_audio_transcript.delta": "response.audio_transcript.delta",
    "response.output_audio_transcript.done": "response.audio_transcript.done",
    "conversation.item.added": "conversation.item.created",
}
_GA_ONLY = frozenset({"conversation.item.done"})
_BETA_CONTENT = {"output_audio": "audio", "output_text": "text"}


class Dialect(Enum):
    GA = "ga"
    BETA = "beta"

    def name_of(self, kind: str) -> str | None:
        """An event's name, from GA's; None where the dialect has no such event."""
        if self is Dialect.GA:
            return kind
        return None if kind in _GA_ONLY else _BETA_NAMES.get(kind, kind)

    def content(self, kind: str) -> str:
        """A content part's type, from GA's."""
        return kind if self is Dialect.GA else _BETA_CONTENT.get(kind, kind)


def dialect_of(headers: Mapping[str, str], subprotocols: Iterable[str]) -> Dialect:
    """By an upgrade's headers (names in lower case) and subprotocols."""
    asked = [word.strip() for word in headers.get("openai-beta", "").split(",")]
    beta = BETA_HEADER in asked or BETA_SUBPROTOCOL in subprotocols
    return Dialect.BETA if beta else Dialect.GA


def key_among(subprotocols: Iterable[str]) -> str:
    """The key a browser sends as a subprotocol, "" for none."""
    prefix = KEY_SUBPROTOCOL
    return next((word.removeprefix(prefix) for word in subprotocols if word.startswith(prefix)), "")


def usage(heard: int, spoken: int, dialect: Dialect) -> dict[str, Any]:
    """One token for each frame of audio heard or spoken."""
    details: dict[str, Any] = {"audio_tokens": heard, "text_tokens": 0, "cached_tokens": 0}
    if dialect is Dialect.GA:
        none = {"audio_tokens": 0, "text_tokens": 0, "image_tokens": 0}
        details.update(image_tokens=0, cached_tokens_details=none)
    return {
        "total_tokens": heard + spoken,
        "input_tokens": heard,
        "output_tokens": spoken,
        "input_token_details": details,
        "output_token_details": {"audio_tokens": spoken, "text_tokens": 0},
    }
