"""What proves that a request comes from Twilio, and what it is answered: signatures and TwiML.

A signature is an HMAC over the public URL and, of a webhook, its form's names and values in order of the
names. It is SHA-1 under the account's auth token, or SHA-256 under the shared key that the request names.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit
from xml.sax.saxutils import quoteattr

from personaplex.errors import ConfigError

SIGNATURE = "x-twilio-signature"
SIGNATURE_SETTINGS = "x-twilio-webhooks-signature-settings"
PARAMETER = "token"  # name of the stream's parameters, with a number
PARAMETER_LENGTH = 400  # characters; a parameter's name and value together have at most 500
PARAMETER_LIMIT = 128
_PORTS = {"https": 443, "wss": 443, "http": 80, "ws": 80}


class Signatures:
    """The secrets of one account: lines of a file, first the auth token, then `KEY_ID SECRET` each."""

    def __init__(self, lines: Sequence[str]) -> None:
        """Raises ConfigError for lines of another form."""
        if not lines or len(lines[0].split()) != 1 or any(len(line.split()) != 2 for line in lines[1:]):
            raise ConfigError("twilio_token_file: first the auth token, then lines of a key's id and secret")
        self._token = lines[0]
        self._shared = dict(line.split() for line in lines[1:])

    @property
    def secrets(self) -> tuple[str, ...]:
        return (self._token,)

    def match(self, headers: Mapping[str, str], urls: Sequence[str], form: Sequence[tuple[str, str]]) -> bool:
        """Whether the signature in `headers` (names in lower case) is of one of `urls`, with or without its
        port, and of `form`."""
        shown = headers.get(SIGNATURE, "").encode("latin-1", "replace")
        settings = dict(
            part.strip().partition("=")[::2] for part in headers.get(SIGNATURE_SETTINGS, "").split(",")
        )
        secret, digest = self._token, hashlib.sha1
        algorithm = settings.get("algorithm", "HMAC_SHA1").upper()
        if algorithm == "HMAC_SHA256":
            secret, digest = self._shared.get(settings.get("key", ""), ""), hashlib.sha256
        if not secret or algorithm not in ("HMAC_SHA1", "HMAC_SHA256"):
            return False
        fields = "".join(name + value for name, value in sorted(set(form)))
        expected = [
            base64.b64encode(hmac.new(secret.encode(), (variant + fields).encode(), digest).digest())
            for url in urls
            for variant in _with_and_without_port(url)
        ]
        return sum(hmac.compare_digest(shown, one) for one in expected) > 0  # all of them, always


def connect_stream(url: str, ticket: str) -> str:
    """TwiML that connects the call to the media stream at `url`. The ticket comes back in its start, in as
    many parameters as it needs."""
    parts = [ticket[at : at + PARAMETER_LENGTH] for at in range(0, len(ticket), PARAMETER_LENGTH)]
    parameters = "".join(
        f'<Parameter name="{PARAMETER}{number}" value={quoteattr(part)}/>'
        for number, part in enumerate(parts)
    )
    return _response(f"<Connect><Stream url={quoteattr(url)}>{parameters}</Stream></Connect>")


def busy() -> str:
    """TwiML for a call that finds no room."""
    return _response('<Reject reason="busy"/>')


def ticket_of(parameters: Mapping[str, str]) -> str:
    """The ticket in a start's parameters, "" where there is none."""
    return "".join(_parts(parameters))


def _parts(parameters: Mapping[str, str]) -> Iterator[str]:
    for number in range(PARAMETER_LIMIT):
        part = parameters.get(f"{PARAMETER}{number}")
        if part is None:
            return
        yield part


def _response(content: str) -> str:
    return f'<?xml version="1.0" encoding="UTF-8"?><Response>{content}</Response>'


def _with_and_without_port(url: str) -> Iterator[str]:
    parts = urlsplit(url)
    host = parts.hostname or ""
    shown = f"[{host}]" if ":" in host else host
    yield parts._replace(netloc=shown).geturl()
    yield parts._replace(netloc=f"{shown}:{parts.port or _PORTS[parts.scheme]}").geturl()
