"""Access control of one gateway: keys, browser origins, and how many sessions a caller may hold.

All of it is decided before the WebSocket is accepted, so a refusal is an HTTP status (`refusal`). What a key
may do, and its limits over all gateways, are in accounts.py. An address counts sessions only where it is a
client's own: not in `unlimited_networks`, and not where a proxy hides it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse

from deployments.addresses import Network, caller_of, contains, forwarded_for
from deployments.gateway.keys import Key, KeyTable
from personaplex.errors import Forbidden, NoCapacity, PersonaplexError, TooManySessions, Unauthorized

logger = logging.getLogger(__name__)

LIMIT_RETRY_S = 10.0  # Retry-After for a caller that holds all the sessions it may


@dataclass(frozen=True)
class ClientInfo:
    """What a request says about its client. Header names are in any case; a header may be there twice."""

    address: str  # of the socket's peer; empty when unknown
    headers: Headers
    query: Mapping[str, str]

    @classmethod
    def of(cls, connection: HTTPConnection, query: Mapping[str, str]) -> ClientInfo:
        return cls(connection.client.host if connection.client else "", connection.headers, query)


@dataclass(frozen=True)
class Entrant:
    """Who was let in: `caller`, a digest of address and key, and the key, if the service asks for one."""

    caller: str
    key: Key | None


class AccessControl:
    """Admission of one gateway; `enter` is a context that counts the session while it lasts."""

    def __init__(
        self,
        table: Callable[[], KeyTable] | None,
        origins: Sequence[str],
        *,
        sessions_per_address: int,
        trusted_proxies: int,
        unlimited_networks: Sequence[Network],
        peer_is_proxy: bool = False,
    ) -> None:
        """`table` gives the keys of this moment; None: no key is asked for. No origins: any will do. 0
        sessions: any number.

        `peer_is_proxy`: sockets come from a proxy of our own; without trusted_proxies no client's address is
        known then, and none is counted.
        """
        self._table = table
        self._origins = frozenset(origins)
        self._per_address = sessions_per_address
        self._trusted_proxies, self._peer_is_proxy = trusted_proxies, peer_is_proxy
        self._unlimited = tuple(unlimited_networks)
        self._open: Counter[str] = Counter()  # addresses
        self._warned = False

    @contextlib.contextmanager
    def enter(self, client: ClientInfo) -> Iterator[Entrant]:
        """Gives who it is, while its session is counted for its address.

        Raises Forbidden, Unauthorized, and TooManySessions when the address holds all it may.
        """
        entrant, name = self.identify(client), ""
        address = self._address(client)
        if self._counts(client, address):
            name = caller_of(address)
            if self._per_address and self._open[name] >= self._per_address:
                words = "this address holds as many sessions as it may"
                raise TooManySessions(words, LIMIT_RETRY_S, "address")
            self._open[name] += 1
        try:
            yield entrant
        finally:
            if name:
                self._open[name] -= 1
                if not self._open[name]:
                    del self._open[name]

    def identify(self, client: ClientInfo) -> Entrant:
        """Who it is, counting nothing. Raises Forbidden, Unauthorized."""
        origin = client.headers.get("origin")
        if self._origins and origin is not None and origin not in self._origins:
            raise Forbidden("pages of this origin may not connect")
        key, shown = None, ""
        if self._table is not None:
            shown = _shown_key(client)
            key = self._table().find(shown)
            if key is None:
                raise Unauthorized("a valid API key is needed")
        who = shown.encode(errors="surrogatepass") + b" " + caller_of(self._address(client)).encode()
        return Entrant(hashlib.sha256(who).hexdigest(), key)

    @property
    def counted(self) -> int:
        """Addresses that hold a session now."""
        return len(self._open)

    def _address(self, client: ClientInfo) -> str:
        forwarded = forwarded_for(client.headers.getlist("x-forwarded-for"), self._trusted_proxies)
        return forwarded or client.address

    def _counts(self, client: ClientInfo, address: str) -> bool:
        if not address or contains(self._unlimited, address):
            return False
        if self._trusted_proxies:
            return True
        if self._peer_is_proxy:
            return False
        if self._per_address and not self._warned and "x-forwarded-for" in client.headers:
            # Not believed, since anybody can send it; but an operator may wonder about many refusals.
            self._warned = True
            logger.warning(
                "a request has X-Forwarded-For and trusted_proxies is 0: if a proxy is in front, all its "
                "clients count as one address for sessions_per_address; set trusted_proxies"
            )
        return True


def refusal(error: PersonaplexError) -> PlainTextResponse:
    """The answer to an upgrade that is refused: the error's status and words, and when to come back."""
    headers = {"cache-control": "no-store"}
    words = str(error)
    if isinstance(error, (NoCapacity, TooManySessions)):
        seconds = max(1, math.ceil(error.retry_after_s))
        headers["retry-after"] = str(seconds)
        words += f"; try again in {seconds} s"
    if isinstance(error, TooManySessions) and error.limit:
        headers["x-limit"] = error.limit
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return PlainTextResponse(words + "\n", status_code=error.http_status, headers=headers)


def _shown_key(client: ClientInfo) -> str:
    """The key in X-API-Key, Authorization: Bearer, or the query stock clients use."""
    scheme, _, token = client.headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return client.headers.get("x-api-key") or bearer or client.query.get("worker_auth_id", "")
