"""Client addresses: as sockets and proxies write them, and as sessions are counted by. Pure functions."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

SUBSCRIBER_BITS = 64  # of IPv6: what a provider gives one customer, who may use any address in it
NAME_LIMIT = 64  # characters of an address that is none


def network(text: str) -> Network:
    """The network `text` names in CIDR notation, or a single address. Raises ValueError."""
    return ipaddress.ip_network(text.strip())


def forwarded_for(lines: Iterable[str], trusted_proxies: int) -> str:
    """What the outermost of our proxies wrote down as its peer in X-Forwarded-For, else "".

    Each proxy appends one entry, some on a line of their own: what counts is the end of all `lines`. Entries
    before those of `trusted_proxies` are whatever the client sent.
    """
    entries = [entry.strip() for entry in ",".join(lines).split(",")]
    if not trusted_proxies or len(entries) < trusted_proxies:
        return ""
    return entries[-trusted_proxies]


def caller_of(address: str) -> str:
    """The name `address` is counted under: an IPv4 address, or the /64 of an IPv6 one.

    Takes ports (`192.0.2.1:80`, `[2001:db8::1]:80`) as some proxies write them, zones (`fe80::1%eth0`), and
    IPv4 in IPv6. What is no address is its own name; "" stays "".
    """
    parsed = _parse(address)
    if parsed is None:
        return address[:NAME_LIMIT]
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    return str(ipaddress.IPv6Network((int(parsed), SUBSCRIBER_BITS), strict=False))


def contains(networks: Sequence[Network], address: str) -> bool:
    """Whether `address` is in one of `networks`."""
    parsed = _parse(address)
    return parsed is not None and any(parsed in one for one in networks)


def _parse(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        parsed = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(parsed, "ipv4_mapped", None) or parsed
