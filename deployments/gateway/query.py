"""What a client asks for in the query of `/api/chat`, read strictly: a pure function of bytes.

Everything has a default, and names nobody knows are ignored, since stock clients send more than is used
(`pad_mult`, `repetition_penalty`, `repetition_penalty_context`, `email`). A name given twice counts once.
`record=1` is the consent to be recorded, and `record_person` a name to find the record by.
`status=1` asks for news before the handshake: the place in the queue and the session's details; and for the
words of the user, where the service reads them. `transcription=0` forbids that.
`resume` is a token to come back with, `heard` how many of the agent's frames were heard before, and `read` of
how many the text is known to be complete.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from urllib.parse import parse_qsl

from personaplex.config import Sampling
from personaplex.errors import BadParameter
from personaplex.persona import Persona, voice_name
from personaplex.record.format import is_person

TEMPERATURE_LIMIT = 10.0
TEXT_TOPK_LIMIT = 32_000
AUDIO_TOPK_LIMIT = 2_048
SEED_LIMIT = 2**63 - 1
HEARD_LIMIT = 2**31 - 1

_INTEGER = re.compile(r"-?[0-9]{1,19}")
_NUMBER = re.compile(r"-?([0-9]{1,32}(\.[0-9]{0,64})?|\.[0-9]{1,64})([eE][+-]?[0-9]{1,3})?")


def read_query(query: bytes, limit: int) -> dict[str, str]:
    """Names and values. Raises BadParameter when it is longer than `limit` bytes or not UTF-8."""
    if len(query) > limit:
        raise BadParameter(f"the query has more than {limit} bytes")
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=64)
    except (ValueError, UnicodeDecodeError) as error:
        raise BadParameter("the query cannot be read") from error
    return dict(reversed(pairs))


def wants_status(query: Mapping[str, str]) -> bool:
    """Whether the client asks to be told how it stands before the handshake. Any value but 1 is no."""
    return query.get("status") == "1"


def allows_transcription(query: Mapping[str, str]) -> bool:
    """Whether the client lets the service read what its user says. Any value but 0 is yes."""
    return query.get("transcription") != "0"


def wants_record(query: Mapping[str, str]) -> bool:
    """Whether the client agrees to be recorded."""
    return query.get("record") == "1"


def heard_from(query: Mapping[str, str]) -> int:
    """How many frames of the agent a client that comes back has heard. Raises BadParameter."""
    return _integer(query, "heard", 0, HEARD_LIMIT)


def read_from(query: Mapping[str, str]) -> int:
    """Of how many frames such a client has all the text: a frame's text follows its sound, and may have been
    lost without it. Raises BadParameter."""
    return _integer(query, "read", heard_from(query), HEARD_LIMIT)


def person_from(query: Mapping[str, str]) -> str:
    """The name under which the client's record is to be found, "" for none. Raises BadParameter."""
    name = query.get("record_person", "")
    if name and not is_person(name):
        raise BadParameter("record_person must be letters, digits and _.@+-, at most 128 of them")
    return name


def persona_from(query: Mapping[str, str]) -> Persona:
    """The persona a query asks for; raises BadParameter and UnknownVoice. A missing seed, or -1 as stock
    clients write it, is drawn here, so that the client can be sent the one it got."""
    default = Persona()
    seed = _seed(query, "seed", secrets.randbits(48))
    text_seed, audio_seed = _seed(query, "text_seed", seed), _seed(query, "audio_seed", seed)
    sampling = Sampling(
        text_temperature=_number(query, "text_temperature", default.sampling.text_temperature),
        text_topk=_integer(query, "text_topk", default.sampling.text_topk, TEXT_TOPK_LIMIT),
        audio_temperature=_number(query, "audio_temperature", default.sampling.audio_temperature),
        audio_topk=_integer(query, "audio_topk", default.sampling.audio_topk, AUDIO_TOPK_LIMIT),
        text_seed=text_seed,
        audio_seed=audio_seed,
    )
    voice = query.get("voice_prompt", "")
    return Persona(
        voice=voice_name(voice) if voice else default.voice,
        text_prompt=query.get("text_prompt", default.text_prompt),
        sampling=sampling,
    )


def _seed(query: Mapping[str, str], name: str, default: int) -> int:
    return default if query.get(name) == "-1" else _integer(query, name, default, SEED_LIMIT)


def _integer(query: Mapping[str, str], name: str, default: int, limit: int) -> int:
    text = query.get(name, "")
    if not text:
        return default
    if not _INTEGER.fullmatch(text) or not 0 <= int(text) <= limit:
        raise BadParameter(f"{name} must be a whole number between 0 and {limit}")
    return int(text)


def _number(query: Mapping[str, str], name: str, default: float) -> float:
    text = query.get(name, "")
    if not text:
        return default
    if not _NUMBER.fullmatch(text) or not 0 <= float(text) <= TEMPERATURE_LIMIT:
        raise BadParameter(f"{name} must be a number between 0 and {TEMPERATURE_LIMIT:g}")
    return float(text)
