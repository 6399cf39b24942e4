"""Tokens with which a client that lost its connection gets its session back.

A token names a session and how often it was resumed (the counter), and nothing else. It is sealed (AES-GCM,
256 bits, under a key derived from the application's secret): who has no secret can neither read, make nor
change one. What a token is worth is judged by the process that holds the session, which counts up: every
token is good for one resume.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from personaplex.errors import ResumeRefused

TOKEN_LENGTH = 64  # characters

_PURPOSE = b"personaplex resume token 1"
_NONCE_BYTES, _TAG_BYTES = 12, 16
_CLAIM = struct.Struct("<16sI")
_BYTES = _NONCE_BYTES + _CLAIM.size + _TAG_BYTES


@dataclass(frozen=True)
class ResumeClaim:
    """What a token says: `session`, 32 hexadecimal digits, and how often it had been resumed."""

    session: str
    counter: int


class ResumeTokens:
    """Makes and reads the tokens of one application."""

    def __init__(self, secrets: Sequence[bytes]) -> None:
        """`secrets`: the first makes tokens, all of them read."""
        self._ciphers = [AESGCM(hmac.digest(secret, _PURPOSE, hashlib.sha256)) for secret in secrets]

    def make(self, claim: ResumeClaim) -> str:
        """A token of TOKEN_LENGTH characters, fit for a URL."""
        nonce = os.urandom(_NONCE_BYTES)
        plain = _CLAIM.pack(bytes.fromhex(claim.session), claim.counter)
        sealed = self._ciphers[0].encrypt(nonce, plain, None)
        return base64.urlsafe_b64encode(nonce + sealed).decode()

    def read(self, token: str) -> ResumeClaim:
        """Raises ResumeRefused for anything that `make` did not make with one of the secrets."""
        try:
            data = base64.b64decode(token.encode("ascii"), b"-_", validate=True)
        except (UnicodeEncodeError, binascii.Error) as error:
            raise ResumeRefused from error
        if len(data) != _BYTES:
            raise ResumeRefused
        for cipher in self._ciphers:
            try:
                plain = cipher.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], None)
            except InvalidTag:
                continue
            session, counter = _CLAIM.unpack(plain)
            return ResumeClaim(session.hex(), counter)
        raise ResumeRefused
