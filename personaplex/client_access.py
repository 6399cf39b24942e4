"""What a client needs of a service before a conversation: its key from a file, its own voice uploaded."""

from __future__ import annotations

import http.client
import json
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode, urlsplit

from personaplex.errors import (
    BadAudio,
    ClientError,
    ConfigError,
    Forbidden,
    NoCapacity,
    PersonaplexError,
    ProtocolError,
    SessionLost,
    TooManySessions,
    Unauthorized,
)
from personaplex.files import key_lines, read_bounded

UPLOAD_LIMIT = 2_000_000  # bytes; the service's
TIMEOUT_S = 90.0
ANSWER_LIMIT = 65_536
WORDS_LIMIT = 300

_KINDS: dict[int, type[PersonaplexError]] = {
    400: ClientError,
    401: Unauthorized,
    403: Forbidden,
    413: BadAudio,
    422: BadAudio,
    429: TooManySessions,
    503: NoCapacity,
}


@dataclass(frozen=True)
class OwnVoice:
    """A voice that was made of a recording: its name for `voice_prompt`, and what is wrong with it."""

    name: str
    seconds: float
    problems: tuple[str, ...]


def read_key(path: Path) -> str:
    """The first key in a file of keys. Raises ConfigError."""
    key = key_lines(path)[0].split()[0]
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"--key-file {path.name}: the key holds characters that a header cannot carry")
    return key


def upload_voice(chat: str, path: Path, key: str | None, tls: ssl.SSLContext | None) -> OwnVoice:
    """Uploads a recording to the service whose conversations are at `chat` (ws or wss).

    Raises the typed error of a refusal, BadAudio for a recording that is too large or cannot be used, OSError
    for one that cannot be read.
    """
    try:
        data = read_bounded(path, UPLOAD_LIMIT)
    except OSError as error:
        if error.strerror and error.strerror.startswith("larger than"):
            raise BadAudio(f"{path}: an own voice has at most {UPLOAD_LIMIT:,} bytes") from error
        raise OSError(error.errno, error.strerror, str(path)) from error
    parts = urlsplit(chat)
    host, port = parts.hostname or "", parts.port
    connection = (
        http.client.HTTPSConnection(host, port, timeout=TIMEOUT_S, context=tls)
        if parts.scheme == "wss"
        else http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    )
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    place = parts.path.removesuffix("/").rpartition("/")[0]
    try:
        connection.request("POST", f"{place}/voices?{urlencode({'consent': 1})}", data, headers)
        answer = connection.getresponse()
        status, body = answer.status, answer.read(ANSWER_LIMIT)
    except (OSError, http.client.HTTPException) as error:
        raise SessionLost(f"the recording could not be uploaded: {error}") from error
    finally:
        connection.close()
    if status != 200:
        raise _refusal(status, body, path)
    return _voice(body)


def _voice(body: bytes) -> OwnVoice:
    try:
        fields = json.loads(body)
        problems = tuple(str(one["text"]) for one in fields["problems"])
        return OwnVoice(str(fields["voice"]), float(fields["seconds"]), problems)
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError("the server's answer to the upload cannot be read") from error


def _refusal(status: int, body: bytes, path: Path) -> PersonaplexError:
    words = body[:WORDS_LIMIT].decode(errors="replace").strip()
    said = f": {words}" if words and words.isprintable() else ""
    kind = _KINDS.get(status, ProtocolError)
    return kind(f"--own-voice {path}: the server refused it (HTTP {status}){said}")


def key_of(api_key: str | None, key_file: Path | None) -> str | None:
    """The key to show, if any. Raises ConfigError for a file without one, and for two ways to give it."""
    if api_key is not None and key_file is not None:
        raise ConfigError("--api-key and --key-file: give one of the two")
    return read_key(key_file) if key_file is not None else api_key
