"""Access control of one gateway: keys, browser origins, and how many sessions a caller may hold.

All of it is decided before the WebSocket is accepted, so a refusal is an HTTP status (`refusal`). Keys are
compared in constant time and as digests, so that neither their length nor a common prefix shows. An address
counts sessions only where it is a client's own: not in `unlimited_networks`, and not where a proxy hides it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse

from deployments.addresses import Network, caller_of, contains, forwarded_for
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


class AccessControl:
    """Admission of one gateway; `enter` is a context that counts the session while it lasts."""

    def __init__(
        self,
        keys: Sequence[str],
        origins: Sequence[str],
        *,
        sessions_per_key: int,
        sessions_per_address: int,
        trusted_proxies: int,
        unlimited_networks: Sequence[Network],
        peer_is_proxy: bool = False,
    ) -> None:
        """No keys: no key is asked for. No origins: any will do. 0 sessions: any number.

        `peer_is_proxy`: sockets come from a proxy of our own; without trusted_proxies no client's address is
        known then, and none is counted.
        """
        self._digests = [_digest(key) for key in keys]
        self._origins = frozenset(origins)
        self._per_key, self._per_address = sessions_per_key, sessions_per_address
        self._trusted_proxies, self._peer_is_proxy = trusted_proxies, peer_is_proxy
        self._unlimited = tuple(unlimited_networks)
        self._open: Counter[bytes | str] = Counter()
        self._warned = False

    @contextlib.contextmanager
    def enter(self, client: ClientInfo) -> Iterator[str]:
        """Gives the caller's name, a digest of its address and key, while its session is counted.

        Raises Forbidden, Unauthorized, and TooManySessions when one of its limits is reached.
        """
        origin = client.headers.get("origin")
        if self._origins and origin is not None and origin not in self._origins:
            raise Forbidden("pages of this origin may not connect")
        key = self._key(client) if self._digests else b""
        address = self._address(client)
        counted: list[tuple[bytes | str, int, str]] = []
        if key:
            counted.append((key, self._per_key, "key"))
        if self._counts(client, address):
            counted.append((caller_of(address), self._per_address, "address"))
        for name, limit, kind in counted:
            if limit and self._open[name] >= limit:
                raise TooManySessions(f"this {kind} holds as many sessions as it may", LIMIT_RETRY_S)
        self._open.update(name for name, _, _ in counted)
        try:
            yield hashlib.sha256(key + caller_of(address).encode()).hexdigest()
        finally:
            for name, _, _ in counted:
                self._open[name] -= 1
                if not self._open[name]:
                    del self._open[name]

    @property
    def counted(self) -> int:
        """Keys and addresses that hold a session now."""
        return len(self._open)

    def _key(self, client: ClientInfo) -> bytes:
        shown = _digest(_shown_key(client))
        matches = [hmac.compare_digest(shown, digest) for digest in self._digests]  # all of them, always
        if not any(matches):
            raise Unauthorized("a valid API key is needed")
        return shown

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
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return PlainTextResponse(words + "\n", status_code=error.http_status, headers=headers)


def _shown_key(client: ClientInfo) -> str:
    """The key in X-API-Key, Authorization: Bearer, or the query stock clients use."""
    scheme, _, token = client.headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return client.headers.get("x-api-key") or bearer or client.query.get("worker_auth_id", "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()
