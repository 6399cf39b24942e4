"""Sealed tickets: what one gateway made and any other believes, without a store between them.

A ticket is JSON, sealed (wire/sealing.py), that names its own end. Where one may be used only once, whoever
spends it keeps account of its `nonce`.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.wire.sealing import Sealer
from personaplex.errors import Unauthorized

TICKET_LIMIT = 49_152  # characters: with the rest of a request's head in what a proxy takes


class Tickets:
    """Makes and reads the tickets of one purpose."""

    def __init__(self, purpose: str, secrets: Sequence[bytes]) -> None:
        """`secrets` are what the service's processes share and others do not know: the application's, an
        account's tokens. The first makes tickets, all of them read."""
        self._sealer = Sealer(purpose, secrets)

    def make(self, content: Mapping[str, Any], expires_at: float) -> str:
        """A ticket fit for a URL and a header. Raises ValueError for one longer than TICKET_LIMIT."""
        plain = json.dumps({"until": expires_at, "content": content}).encode()
        ticket = self._sealer.seal(zlib.compress(plain))
        if len(ticket) > TICKET_LIMIT:
            raise ValueError("a ticket of more than fits a header")
        return ticket

    def read(self, ticket: str, now: float) -> tuple[str, dict[str, Any]]:
        """The ticket's nonce and its content. Raises Unauthorized for one that was not made here, was changed
        or is over."""
        opened = self._sealer.open(ticket) if len(ticket) <= TICKET_LIMIT else None
        if opened is None:
            raise Unauthorized("the ticket is not one of this service")
        read = json.loads(zlib.decompress(opened.plain))  # ours, as it is sealed
        if now >= read["until"]:
            raise Unauthorized("the ticket has expired")
        return opened.nonce.hex(), dict(read["content"])
