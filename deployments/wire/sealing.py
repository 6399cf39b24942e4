"""What one process seals and any other of the application believes, without a store between them.

AES-GCM (256 bits) under keys derived from the application's secrets, one key a purpose: who has no secret can
neither read, make nor change what is sealed, and what was sealed for one purpose is nothing to another.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_NONCE_BYTES = 12


@dataclass(frozen=True)
class Opened:
    """`nonce` is of no two sealings the same."""

    nonce: bytes
    plain: bytes = field(repr=False)


class Sealer:
    """Seals and opens for one purpose."""

    def __init__(self, purpose: str, secrets: Sequence[bytes]) -> None:
        """`secrets`: the first seals, all of them open."""
        name = purpose.encode()
        self._ciphers = [AESGCM(hmac.digest(secret, name, hashlib.sha256)) for secret in secrets]

    def seal(self, plain: bytes) -> str:
        """Text fit for a URL and a header, four characters for three bytes and 28 more. Needs a secret."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._ciphers[0].encrypt(nonce, plain, None)
        return base64.urlsafe_b64encode(sealed).decode().rstrip("=")

    def open(self, text: str) -> Opened | None:
        """What `seal` made with one of the secrets; None for any other text."""
        try:
            sealed = base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True)
        except (ValueError, binascii.Error):  # not ASCII is a ValueError
            return None
        nonce, rest = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        for cipher in self._ciphers:
            try:
                return Opened(nonce, cipher.decrypt(nonce, rest, None))
            except (ValueError, InvalidTag):  # ValueError: too short to be anything
                continue
        return None
