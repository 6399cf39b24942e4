"""The client command's options, addresses, errors and report: everything but the conversation."""

from __future__ import annotations

import argparse
import dataclasses
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit

import numpy as np
import numpy.typing as npt
from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI

from personaplex.audio.recorder import Recorder, Rhythm
from personaplex.audio.wav import read_wav, resample, write_wav
from personaplex.config import SAMPLE_RATE
from personaplex.errors import (
    BadAudio,
    ClientError,
    ConfigError,
    EngineFault,
    NoCapacity,
    PersonaplexError,
    ProtocolError,
    SessionExpired,
    SessionLost,
    Unauthorized,
)
from personaplex.files import replacing

Pcm = npt.NDArray[np.float32]

CONNECT_ERRORS = (OSError, InvalidHandshake, InvalidURI)  # of opening a connection; see `refusal`
_BAD_URL = "--url must look like ws://HOST:8998/api/chat"
_ERRORS_BY_CODE: Mapping[int, type[PersonaplexError]] = {
    kind.close_code: kind
    for kind in (ProtocolError, BadAudio, ClientError, EngineFault, SessionLost, NoCapacity, SessionExpired)
}


@dataclass
class Report:
    """How a conversation went; times in seconds unless named otherwise, None for what never happened."""

    connect_s: float | None = None
    handshake_s: float | None = None  # from the start of the connection
    first_audio_s: float | None = None  # from our first frame
    frames_sent: int = 0
    frames_heard: int = 0
    underruns: int = 0  # heard more than a frame late
    rhythm: Rhythm | None = None  # of arriving audio
    transcript: str = ""
    session: dict[str, Any] = field(default_factory=dict)  # what the service says about itself

    def lines(self) -> str:
        """For people."""
        rows = [
            ("handshake after", _seconds(self.handshake_s)),
            ("first audio after", _seconds(self.first_audio_s)),
            ("frames", f"{self.frames_sent} sent, {self.frames_heard} heard, {self.underruns} underruns"),
        ]
        if self.rhythm:
            gaps = self.rhythm
            rows.append(
                ("between pages", f"p50 {gaps.p50_ms:.1f}, p99 {gaps.p99_ms:.1f}, max {gaps.max_ms:.1f} ms")
            )
        return "\n".join(f"{name:18} {value}" for name, value in rows)

    def json(self) -> str:
        """For programs."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.3f} s"


def refusal(error: Exception) -> PersonaplexError:
    """The typed error behind a connection that never opened."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConfigError("the server's certificate is not trusted; --insecure accepts it")
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        if status in (401, 403):
            return Unauthorized(f"the server refused the connection (HTTP {status}): check --api-key")
        if status in (429, 503):
            return NoCapacity(f"the server has no capacity (HTTP {status})")
        return ProtocolError(f"the server answered HTTP {status} instead of opening a WebSocket")
    if isinstance(error, InvalidURI):
        return ConfigError(_BAD_URL)
    if isinstance(error, InvalidHandshake):
        return ProtocolError("the server does not speak WebSocket")
    if isinstance(error, TimeoutError):
        return SessionLost("the server did not answer in time")
    return SessionLost(f"cannot connect: {error}")


def ending(code: int, reason: str) -> PersonaplexError:
    """The typed error behind a close that we did not ask for."""
    kind = _ERRORS_BY_CODE.get(code, SessionLost)
    return kind(reason or f"the server closed the connection (code {code})")


def chat_url(options: argparse.Namespace) -> str:
    """The address with the persona in its query. Raises ConfigError for an address of another kind."""
    text = options.url if "://" in options.url else f"ws://{options.url}"
    parts = urlsplit(text)
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss") or not parts.hostname:
        raise ConfigError(_BAD_URL)
    query = {
        "voice_prompt": options.voice and f"{options.voice.removesuffix('.pt')}.pt",
        "text_prompt": options.text_prompt,
        "seed": options.seed,
        "text_temperature": options.text_temperature,
        "text_topk": options.text_topk,
        "audio_temperature": options.audio_temperature,
        "audio_topk": options.audio_topk,
        "status": 1,  # tell us the place in the queue; other servers ignore it
    }
    given = urlencode({name: value for name, value in query.items() if value is not None})
    both = "&".join(part for part in (parts.query, given) if part)
    path = parts.path if parts.path.strip("/") else "/api/chat"
    return urlunsplit((scheme, parts.netloc, path, both, ""))


def tls_context(url: str, insecure: bool) -> ssl.SSLContext | None:
    """For wss addresses; `insecure` accepts any certificate, as self-signed ones need."""
    if not url.startswith("wss:"):
        return None
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def load_recording(path: Path, tail_s: float) -> Pcm:
    """The first channel at 24 kHz, float32 [samples], with `tail_s` of silence behind it.

    Raises BadAudio for a file without sound, OSError for one that cannot be opened.
    """
    pcm, rate = read_wav(path)
    silence = np.zeros(round(tail_s * SAMPLE_RATE), np.float32)
    return np.concatenate((resample(pcm[0], rate, SAMPLE_RATE), silence))


def keep(report: Report, heard: Recorder | None, options: argparse.Namespace, samples: int) -> None:
    """Writes what was heard, at least `samples` long, and the reports asked for; whole files or none."""
    if options.output_wav and heard is not None:
        write_wav(options.output_wav, heard.pcm(samples), SAMPLE_RATE)
    for path, text in ((options.output_text, report.transcript), (options.output_json, report.json())):
        if path:
            with replacing(path) as part:
                part.write_text(text, encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m personaplex.client",
        description="Talks to a PersonaPlex service: a recording in real time, or the microphone.",
        epilog="NVIDIA's own server needs --voice and --text-prompt; here everything has a default.",
    )
    parser.add_argument(
        "--url", default="ws://localhost:8998/api/chat", help="address of the service (default: %(default)s)"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--input-wav", type=Path, metavar="PATH", help="what to say (default: the microphone)")
    files.add_argument("--output-wav", type=Path, metavar="PATH", help="what was heard, from our first word")
    files.add_argument("--output-text", type=Path, metavar="PATH", help="the agent's transcript")
    files.add_argument("--output-json", type=Path, metavar="PATH", help="the report, for programs")
    files.add_argument(
        "--tail",
        type=_non_negative,
        default=2.0,
        metavar="SECONDS",
        help="silence after the recording, for the agent to answer in (default: %(default)s)",
    )
    persona = parser.add_argument_group("persona (the service's defaults unless given)")
    persona.add_argument("--voice", metavar="NAME", help="a voice of the service, such as NATF2")
    persona.add_argument("--text-prompt", metavar="TEXT", help="the agent's role")
    persona.add_argument("--seed", type=int, metavar="N", help="same seed, same audio: same answers")
    persona.add_argument("--text-temperature", type=float, metavar="T")
    persona.add_argument("--text-topk", type=int, metavar="K")
    persona.add_argument("--audio-temperature", type=float, metavar="T")
    persona.add_argument("--audio-topk", type=int, metavar="K")
    access = parser.add_argument_group("access")
    access.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")
    access.add_argument("--insecure", action="store_true", help="accept any certificate (self-signed)")
    return parser


def _non_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < 3_600:
        raise argparse.ArgumentTypeError("must be between 0 and 3600")
    return value
