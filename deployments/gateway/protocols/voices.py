"""Names of voices that clients of other services send unasked, and the voices that stand in for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from personaplex.errors import UnknownVoice
from personaplex.persona import voice_name

_FEMALE = (
    *("alloy", "bossa", "coral", "delta", "gleam", "marin", "nova", "quartz", "ripple", "sage", "shida"),
    *("shimmer", "vesper", "willow"),
)
_MALE = (
    *("ash", "ballad", "beacon", "cedar", "cinder", "echo", "fable", "meridian", "onyx", "stone", "tempo"),
    "verse",
)
ALIASES: Mapping[str, str] = {**dict.fromkeys(_FEMALE, "NATF2"), **dict.fromkeys(_MALE, "NATM1")}


def our_voice(wanted: Any, aliases: Mapping[str, str]) -> str:
    """The voice for a name, or for `{"id": name}`. `aliases` come before the built-in ones. Raises
    UnknownVoice for what is no name."""
    if isinstance(wanted, dict):
        wanted = wanted.get("id")
    if not isinstance(wanted, str):
        raise UnknownVoice("a voice is a name or an object with an id")
    return voice_name(aliases.get(wanted) or ALIASES.get(wanted) or wanted)
