"""Who may open a session: keys, browser origins, and how many at once. Pure but for its counts.

Keys are compared in constant time and as digests, so that neither their length nor a common prefix shows.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers

from personaplex.errors import Unauthorized


@dataclass(frozen=True)
class Visitor:
    """What a request says of itself. Names of `headers` may be in any case; a header may be there twice."""

    address: str
    headers: Headers
    query: Mapping[str, str]


class Doors:
    """Admission of one gateway; `enter` is a context that counts the session while it lasts."""

    def __init__(
        self,
        keys: Sequence[str],
        origins: Sequence[str],
        *,
        sessions_per_key: int,
        sessions_per_address: int,
        trusted_proxies: int,
    ) -> None:
        """No keys: no key is asked for. No origins: any will do. 0 sessions: any number."""
        self._digests = [_digest(key) for key in keys]
        self._origins = frozenset(origins)
        self._per_key, self._per_address = sessions_per_key, sessions_per_address
        self._trusted_proxies = trusted_proxies
        self._open: Counter[bytes | str] = Counter()

    @contextlib.contextmanager
    def enter(self, visitor: Visitor) -> Iterator[None]:
        """Raises Unauthorized when the visitor may not open a session now."""
        origin = visitor.headers.get("origin")
        if self._origins and origin is not None and origin not in self._origins:
            raise Unauthorized("pages of this origin may not connect")
        taken: list[tuple[bytes | str, int, str]]
        taken = [(self._address(visitor), self._per_address, "address")]
        if self._digests:
            taken.append((self._key(visitor), self._per_key, "key"))
        for name, limit, kind in taken:
            if limit and self._open[name] >= limit:
                raise Unauthorized(f"this {kind} holds as many sessions as it may")
        self._open.update(name for name, _, _ in taken)
        try:
            yield
        finally:
            for name, _, _ in taken:
                self._open[name] -= 1
                if not self._open[name]:
                    del self._open[name]

    @property
    def inside(self) -> int:
        """Keys and addresses that hold a session now."""
        return len(self._open)

    def _key(self, visitor: Visitor) -> bytes:
        shown = _digest(_shown_key(visitor))
        matches = [hmac.compare_digest(shown, digest) for digest in self._digests]  # all of them, always
        if not any(matches):
            raise Unauthorized("a valid API key is needed")
        return shown

    def _address(self, visitor: Visitor) -> str:
        # A proxy may add a line of its own below the client's: what counts is the end of all of them.
        lines = ",".join(visitor.headers.getlist("x-forwarded-for"))
        forwarded = [part.strip() for part in lines.split(",")]
        if self._trusted_proxies and len(forwarded) >= self._trusted_proxies:
            return forwarded[-self._trusted_proxies] or visitor.address
        return visitor.address


def _shown_key(visitor: Visitor) -> str:
    """The key in X-API-Key, Authorization: Bearer, or the query stock clients use."""
    scheme, _, token = visitor.headers.get("authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    return visitor.headers.get("x-api-key") or bearer or visitor.query.get("worker_auth_id", "")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()
