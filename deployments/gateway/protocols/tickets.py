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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from personaplex.errors import SessionLost, Unauthorized

_NONCE_BYTES = 12
TICKET_LIMIT = 49_152  # characters: with the rest of a request's head in what a proxy takes


class Tickets:
    """Makes and reads the tickets of one purpose."""

    def __init__(self, purpose: str, secrets: Callable[[], Sequence[bytes]]) -> None:
        """`secrets` gives what the service's processes share and others do not know: the first makes tickets,
        all of them read."""
        self._purpose, self._secrets = purpose.encode(), secrets

    def _ciphers(self) -> list[AESGCM]:
        keys = [hmac.digest(hashlib.sha256(one).digest(), self._purpose, "sha256") for one in self._secrets()]
        if not keys:
            raise SessionLost("the service is starting; please try again")
        return [AESGCM(key) for key in keys]

    def make(self, content: Mapping[str, Any], expires_at: float) -> str:
        """A ticket fit for a URL and a header. Raises ValueError for one longer than TICKET_LIMIT,
        SessionLost while there is no secret yet."""
        plain = zlib.compress(json.dumps({"until": expires_at, "content": content}).encode())
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._ciphers()[0].encrypt(nonce, plain, self._purpose)
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
        except (binascii.Error, ValueError) as error:
            raise Unauthorized("the ticket is not one of this service") from error
        nonce, rest = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        for cipher in self._ciphers():
            try:
                plain = json.loads(zlib.decompress(cipher.decrypt(nonce, rest, self._purpose)))
                break
            except (ValueError, InvalidTag):
                continue
        else:
            raise Unauthorized("the ticket is not one of this service")
        if now >= plain["until"]:
            raise Unauthorized("the ticket has expired")
        return nonce.hex(), dict(plain["content"])
