"""Where sessions go, from the options of a load test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loadtest.protocols import path_of
from loadtest.webhook import Webhook
from personaplex.client_io import split_address
from personaplex.errors import ConfigError

SECRETS = ("api_key", "twilio_token")  # options that no report repeats


@dataclass(frozen=True)
class Target:
    """Where sessions go: the protocol's WebSocket, without a query. `headers` go with the upgrade request, an
    API key for example. `webhook`: what Twilio needs."""

    url: str
    insecure: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    protocol: str = "chat"
    webhook: Webhook | None = None


def address(host: str, end: str = "/api/chat") -> str:
    """The WebSocket address of a host as people write it, with the path `end`. Raises ConfigError."""
    try:
        parts = split_address(host)
    except ValueError as error:
        raise ConfigError(f"--host must look like ws://HOST:8998, not {host!r}: {error}") from error
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if path.endswith(end) else path + end}"


def target(options: Mapping[str, Any]) -> Target:
    """Where sessions go. Raises ConfigError for options that do not go together."""
    protocol, key, token = options["protocol"], options["api_key"], options["twilio_token"]
    if protocol != "chat" and options["dialogues"]:
        raise ConfigError("--dialogues are spoken with --protocol chat")
    webhook = None
    if protocol == "twilio":
        if not (token and options["public_url"]):
            raise ConfigError("--protocol twilio needs --public-url and --twilio-token, those of the service")
        webhook = Webhook(options["public_url"], token, options["insecure"])
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = address(options["host"] or "", path_of(protocol))
    return Target(url, options["insecure"], headers, protocol, webhook)
