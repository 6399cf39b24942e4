"""Sealed tickets: what one gateway made and any other believes, without a store between them.

A ticket is JSON under AES-GCM (256 bits): who has no secret can neither read, make nor change one. It names
its own end. Where one may be used only once, whoever spends it keeps account of its `nonce`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from personaplex.errors import Unauthorized

_NONCE_BYTES = 12
TICKET_LIMIT = 49_152  # characters: with the rest of a request's head in what a proxy takes


class Tickets:
    """Makes and reads the tickets of one purpose."""

    def __init__(self, purpose: str, secrets: Sequence[str]) -> None:
        """`secrets` are what the service's processes share and others do not know: keys, an account's token.
        With none of them a ticket proves nothing, as nothing is guarded."""
        digest = hashlib.sha256()
        for secret in sorted(secrets):
            digest.update(hashlib.sha256(secret.encode(errors="surrogatepass")).digest())
        self._purpose = purpose.encode()
        self._cipher = AESGCM(hmac.digest(digest.digest(), self._purpose, "sha256"))

    def make(self, content: Mapping[str, Any], expires_at: float) -> str:
        """A ticket fit for a URL and a header. Raises ValueError for one longer than TICKET_LIMIT."""
        plain = zlib.compress(json.dumps({"until": expires_at, "content": content}).encode())
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, plain, self._purpose)
        ticket = base64.urlsafe_b64encode(sealed).decode().rstrip("=")
        if len(ticket) > TICKET_LIMIT:
            raise ValueError("a ticket of more than fits a header")
        return ticket

    def read(self, ticket: str, now: float) -> tuple[str, dict[str, Any]]:
        """The ticket's nonce and its content. Raises Unauthorized for one that was not made here, was changed
        or is over."""
        if len(ticket) > TICKET_LIMIT:
            raise Unauthorized("the ticket is not one of this service")
        try:
            sealed = base64.b64decode(ticket + "=" * (-len(ticket) % 4), b"-_", validate=True)
            nonce, rest = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
            plain = json.loads(zlib.decompress(self._cipher.decrypt(nonce, rest, self._purpose)))
        except (binascii.Error, ValueError, InvalidTag) as error:
            raise Unauthorized("the ticket is not one of this service") from error
        if now >= plain["until"]:
            raise Unauthorized("the ticket has expired")
        return nonce.hex(), dict(plain["content"])
