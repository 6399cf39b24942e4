"""What a gateway asks a replica outside any session, on a media link of its own: bytes only.

    gateway -> replica   TOKENS   a role text, UTF-8
                         SAMPLES  a piece of a recording, float32 LE at 24 kHz; any number of them
                         ENCODE   empty: the recording is complete, make a voice of it
    replica -> gateway   ANSWER   to TOKENS JSON {"tokens", "limit"}; to ENCODE digest and voice
                         CLOSE    JSON with the error instead

One question a link; it needs no lease, so a full replica answers too. The link's handshake comes first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import numpy as np

from personaplex.config import SAMPLE_RATE, Pcm
from personaplex.errors import ProtocolError

TEXT_LIMIT = 65_000  # bytes of a role text that is counted
RECORDING_LIMIT_S = 31.0
PIECE_SAMPLES = 15_000
DIGEST_CHARACTERS = 64

_RECORDING_BYTES = round(4 * RECORDING_LIMIT_S * SAMPLE_RATE)


def pack_text(text: str) -> bytes:
    return text.encode()


def unpack_text(payload: bytes) -> str:
    """Raises ProtocolError for one that is too long or not UTF-8."""
    if len(payload) > TEXT_LIMIT:
        raise ProtocolError("a role text of impossible length")
    try:
        return payload.decode()
    except UnicodeDecodeError as error:
        raise ProtocolError("a role text that is not UTF-8") from error


def pack_tokens(tokens: int, limit: int) -> bytes:
    return json.dumps({"tokens": tokens, "limit": limit}).encode()


def unpack_tokens(payload: bytes) -> tuple[int, int]:
    """Tokens of the text, and how many a role may have. Raises ProtocolError."""
    try:
        fields = json.loads(payload)
        found = fields["tokens"], fields["limit"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProtocolError("an answer of the wrong shape") from error
    if not all(type(number) is int and number >= 0 for number in found):
        raise ProtocolError("an answer of the wrong shape")
    return found


def pieces(pcm: Pcm) -> Iterator[bytes]:
    """A recording float32 [samples] as payloads of SAMPLES."""
    for start in range(0, len(pcm), PIECE_SAMPLES):
        yield np.ascontiguousarray(pcm[start : start + PIECE_SAMPLES], "<f4").tobytes()


def pack_voice(digest: str, packed: bytes) -> bytes:
    return digest.encode("ascii") + packed


def unpack_voice(payload: bytes) -> tuple[str, bytes]:
    """Digest of a voice's content, and the voice, packed. Raises ProtocolError."""
    try:
        digest = payload[:DIGEST_CHARACTERS].decode("ascii")
    except UnicodeDecodeError as error:
        raise ProtocolError("a voice of the wrong shape") from error
    if not re.fullmatch(r"[0-9a-f]{64}", digest) or len(payload) == DIGEST_CHARACTERS:
        raise ProtocolError("a voice of the wrong shape")
    return digest, payload[DIGEST_CHARACTERS:]


class Samples:
    """A recording as its pieces come."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def add(self, payload: bytes) -> None:
        """Raises ProtocolError for more than RECORDING_LIMIT_S, and for parts of samples."""
        if len(payload) % 4 or len(self._bytes) + len(payload) > _RECORDING_BYTES:
            raise ProtocolError("a recording of impossible length")
        self._bytes += payload

    def pcm(self) -> Pcm:
        """float32 [samples]. Raises ProtocolError for numbers that are no sound."""
        pcm = np.frombuffer(bytes(self._bytes), "<f4").astype(np.float32)
        if not np.isfinite(pcm).all():
            raise ProtocolError("a recording that is not audio")
        return pcm
