"""Twilio's part in a call of a load test: the signed request to the number's webhook, and the signed upgrade.

The service believes who signs with the account's auth token over its public address, so that the load test
has to be told both. A real carrier is not needed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ssl
import urllib.error
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

from personaplex.client_io import tls_context
from personaplex.errors import NoCapacity, PersonaplexError, ProtocolError, SessionLost, Unauthorized

TIMEOUT_S = 20.0
VOICE, MEDIA = "/twilio/voice", "/twilio/media"
_FORM = {"CallSid": "CA0", "From": "+15550100", "To": "+15550199"}


@dataclass(frozen=True)
class Webhook:
    """`public_url` is the service's setting of that name, `token` its account's auth token."""

    public_url: str
    token: str
    insecure: bool = False

    def ring(self, media_url: str, query: str) -> dict[str, str]:
        """A call comes in: the parameters that the stream at `media_url` (ws or wss) is started with. Raises
        what the service refuses the call with."""
        where = urlsplit(media_url)
        path = where.path.removesuffix(MEDIA) + VOICE
        url = where._replace(scheme=where.scheme.replace("ws", "http"), path=path, query=query).geturl()
        public = self.public_url + path + (f"?{query}" if query else "")
        headers = {"X-Twilio-Signature": self._signature(public, _FORM)}
        request = urllib.request.Request(url, urlencode(_FORM).encode(), headers)
        context: ssl.SSLContext | None = tls_context(media_url, self.insecure)
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as answer:
                return _parameters(answer.read())
        except urllib.error.HTTPError as error:
            error.close()
            raise _refusal(error.code) from error
        except OSError as error:
            raise SessionLost(f"cannot connect: {error}") from error

    def headers(self, media_url: str) -> dict[str, str]:
        """Of the upgrade to the stream."""
        public = urlsplit(self.public_url)._replace(scheme="wss", path=urlsplit(media_url).path).geturl()
        return {"X-Twilio-Signature": self._signature(public, {})}

    def _signature(self, url: str, form: Mapping[str, str]) -> str:
        text = url + "".join(name + form[name] for name in sorted(form))
        return base64.b64encode(hmac.new(self.token.encode(), text.encode(), hashlib.sha1).digest()).decode()


def _parameters(twiml: bytes) -> dict[str, str]:
    try:
        answer = ElementTree.fromstring(twiml)
    except ElementTree.ParseError as error:
        raise ProtocolError("the webhook answers no TwiML") from error
    if answer.find("Reject") is not None:
        raise NoCapacity("the call was rejected as busy")
    parameters = {one.get("name", ""): one.get("value", "") for one in answer.iter("Parameter")}
    if not parameters:
        raise ProtocolError("the webhook starts no stream")
    return parameters


def _refusal(status: int) -> PersonaplexError:
    if status == 401:
        return Unauthorized("the webhook refused the signature: check --public-url and --twilio-token")
    if status == 503:
        return NoCapacity("the webhook has no capacity (HTTP 503)")
    return ProtocolError(f"the webhook answered HTTP {status}")
