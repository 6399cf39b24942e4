"""Security headers of pages."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Route

from deployments.gateway.app import PAGE
from deployments.gateway.headers import SecurityHeaders
from deployments.settings import Settings


def _headers(host: str = "talk.example", **options: Any) -> Any:
    chosen = {"policy": Settings().content_security_policy, "hsts_s": 0, **options}
    app = Starlette(
        routes=[Route("/", lambda _: Response("x"))], middleware=[Middleware(SecurityHeaders, **chosen)]
    )
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request"}

    async def run(path: str) -> Headers:
        sent.clear()
        scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "root_path": ""}
        await app({**scope, "headers": [(b"host", host.encode())]}, receive, send)
        return Headers(raw=sent[0]["headers"])

    found, missing = asyncio.run(run("/")), asyncio.run(run("/nowhere"))
    assert {name: missing[name] for name in found if name not in ("content-length", "content-type")} == {
        name: found[name] for name in found if name not in ("content-length", "content-type")
    }, "an error is a page too"
    return found


def test_every_answer_has_security_headers() -> None:
    headers = _headers()
    policy = headers["content-security-policy"]
    assert "unsafe" not in policy.replace("'wasm-unsafe-eval'", ""), "WebAssembly is no text that is run"
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert "microphone=(self)" in headers["permissions-policy"]
    assert "strict-transport-security" not in headers
    assert "content-security-policy" not in _headers(policy="")


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("localhost", True),
        ("localhost:8998", True),
        ("app.localhost:1", True),
        ("127.0.0.5", True),
        ("[::1]:8998", True),
        ("talk.example", False),
        ("localhost.example:443", False),
        ("[2001:db8::1]:1", False),
        ("192.0.2.1", False),
    ],
)
def test_strict_transport_is_asked_for_by_a_setting_and_never_of_this_machine(host: str, local: bool) -> None:
    headers = _headers(host, hsts_s=60)
    assert headers.get("strict-transport-security") == (None if local else "max-age=60")


def test_the_page_has_nothing_inline() -> None:
    """What the policy would block in silence."""
    text = (PAGE / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|javascript:", text)
    assert not any("data:" in sheet.read_text() for sheet in PAGE.glob("*.css"))
