"""Tokens with which a client that lost its connection gets its session back.

A token names a session and how often it was resumed (the counter), and nothing else; it is sealed
(sealing.py). What a token is worth is judged by the process that holds the session, which counts up: every
token is good for one resume.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from deployments.wire.sealing import Sealer
from personaplex.errors import ResumeRefused

TOKEN_LENGTH = 64  # characters

_PURPOSE = "personaplex resume token 1"
_CLAIM = struct.Struct("<16sI")


@dataclass(frozen=True)
class ResumeClaim:
    """What a token says: `session`, 32 hexadecimal digits, and how often it had been resumed."""

    session: str
    counter: int


class ResumeTokens:
    """Makes and reads the tokens of one application."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        """`secrets`: the first makes tokens, all of them read."""
        self._sealer = Sealer(_PURPOSE, secrets)

    def make(self, claim: ResumeClaim) -> str:
        """A token of TOKEN_LENGTH characters, fit for a URL."""
        return self._sealer.seal(_CLAIM.pack(bytes.fromhex(claim.session), claim.counter))

    def read(self, token: str) -> ResumeClaim:
        """Raises ResumeRefused for anything that `make` did not make with one of the secrets."""
        opened = self._sealer.open(token) if len(token) == TOKEN_LENGTH else None
        if opened is None:
            raise ResumeRefused
        session, counter = _CLAIM.unpack(opened.plain)
        return ResumeClaim(session.hex(), counter)
