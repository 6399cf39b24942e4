"""Security headers on every HTTP answer of a gateway: an ASGI middleware.

Content-Security-Policy     the setting `content_security_policy`
X-Content-Type-Options      nosniff
Referrer-Policy             no-referrer: a key may stand in a query
X-Frame-Options             DENY
Permissions-Policy          the microphone for this page alone, nothing else of what is asked for most
Strict-Transport-Security   for `hsts_s` seconds, if any; never to a request for this very machine
"""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PERMISSIONS = "microphone=(self), camera=(), geolocation=(), payment=(), usb=(), display-capture=()"


class SecurityHeaders:
    """`policy`: the Content-Security-Policy, empty for none; `hsts_s`: 0 for no Strict-Transport-Security."""

    def __init__(self, app: ASGIApp, *, policy: str, hsts_s: int) -> None:
        self._app, self._hsts_s = app, hsts_s
        self._headers = {
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "X-Frame-Options": "DENY",
            "Permissions-Policy": PERMISSIONS,
            **({"Content-Security-Policy": policy} if policy else {}),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        secure = self._hsts_s > 0 and not is_local(Headers(scope=scope).get("host", ""))

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(self._headers)
                if secure:
                    headers["Strict-Transport-Security"] = f"max-age={self._hsts_s}"
            await send(message)

        await self._app(scope, receive, send_with_headers)


def is_local(host: str) -> bool:
    """Whether a Host header names this very machine: localhost or a loopback address, with a port or not."""
    name = host.rpartition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
