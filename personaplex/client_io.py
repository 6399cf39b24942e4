"""The client command's options, addresses, errors and report: everything but the conversation."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlencode, urlsplit, urlunsplit

import numpy as np
from websockets.exceptions import InvalidHandshake, InvalidProxy, InvalidStatus, InvalidURI
from websockets.http11 import Response

from personaplex import cli
from personaplex.audio.recorder import Recorder, Rhythm
from personaplex.audio.wav import one_channel, read_wav, resample, write_wav
from personaplex.config import SAMPLE_RATE, Pcm
from personaplex.errors import (
    BadAudio,
    ClientError,
    ConfigError,
    EngineFault,
    Forbidden,
    NoCapacity,
    PersonaplexError,
    ProtocolError,
    ResumeRefused,
    SessionExpired,
    SessionLost,
    TooManySessions,
    Unauthorized,
)
from personaplex.files import replacing
from personaplex.outputs import file_name, refuse_overwriting, try_output
from personaplex.persona import own_digest
from personaplex.transcript import Transcript

# Of opening a connection; see `refusal`. ImportError: a SOCKS proxy needs a package of its own.
CONNECT_ERRORS = (OSError, InvalidHandshake, InvalidURI, InvalidProxy, ImportError)
WORDS_LIMIT = 300  # bytes of a refusal's reason
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
    frames_lost: int = 0  # of the agent, between two connections
    resumes: int = 0
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
        if self.resumes:
            rows.append(("resumed", f"{self.resumes} times, {self.frames_lost} frames were lost"))
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
        return _refused(error.response)
    if isinstance(error, InvalidURI):
        return ConfigError(_BAD_URL)
    if isinstance(error, InvalidProxy | ImportError):
        return ConfigError(f"the proxy that the environment names cannot be used: {error}")
    if isinstance(error, InvalidHandshake):
        return ProtocolError("the server does not speak WebSocket")
    if isinstance(error, TimeoutError):
        return SessionLost("the server did not answer in time")
    return SessionLost(f"cannot connect: {error}")


def _refused(response: Response) -> PersonaplexError:
    """The typed error of an upgrade that was refused; with the server's own words where it has some."""
    status = response.status_code
    words = _words(response)
    if status == 401:
        return Unauthorized(f"the server refused the connection (HTTP 401): {words or 'check --api-key'}")
    if status == 403:
        return Forbidden(f"the server refused the connection (HTTP 403){words and f': {words}'}")
    if status == 429:
        return TooManySessions(f"the server refused the connection (HTTP 429){words and f': {words}'}")
    if status == 503:
        return NoCapacity(f"the server has no capacity (HTTP 503){words and f': {words}'}")
    if status == 410:
        return ResumeRefused("the session is gone (HTTP 410)")
    if status == 400 and words:
        return ClientError(words)
    return ProtocolError(f"the server answered HTTP {status} instead of opening a WebSocket")


def _words(response: Response) -> str:
    """The server's reason, if it is one short line of text."""
    kind = response.headers.get("content-type", "")
    text = (response.body or b"")[:WORDS_LIMIT].decode(errors="replace").strip()
    return text if kind.startswith("text/plain") and text.isprintable() else ""


def ending(code: int, reason: str) -> PersonaplexError:
    """The typed error behind a close that we did not ask for."""
    kind = _ERRORS_BY_CODE.get(code, SessionLost)
    return kind(reason or f"the server closed the connection (code {code})")


def split_address(text: str) -> SplitResult:
    """A service's address as people write it, with the scheme ws or wss. Raises ValueError, in words."""
    if any(character.isspace() or not character.isprintable() for character in text):
        raise ValueError("it holds a space or a character that cannot be shown")
    parts = urlsplit(text if "://" in text else f"ws://{text}")
    scheme = {"http": "ws", "https": "wss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("ws", "wss"):
        raise ValueError(f"its scheme is {parts.scheme}")
    if not parts.hostname:
        raise ValueError("it has no host")
    parts.hostname.encode("idna")  # UnicodeError is a ValueError
    if parts.port == 0:  # a ValueError for any other that is none
        raise ValueError("Port out of range 1-65535")
    return parts._replace(scheme=scheme)


def chat_url(options: argparse.Namespace) -> str:
    """The address with the persona in its query. Raises ConfigError for an address of another kind."""
    try:
        parts = split_address(options.url)
    except ValueError as error:
        raise ConfigError(f"{_BAD_URL}, not {options.url!r}: {error}") from error
    query = {
        "voice_prompt": options.voice and _voice_file(options.voice),
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
    return urlunsplit((parts.scheme, parts.netloc, path, both, ""))


def _voice_file(name: str) -> str:
    """As stock servers want it; an own voice is no file."""
    return name if own_digest(name) else f"{name.removesuffix('.pt')}.pt"


def tls_context(url: str, insecure: bool) -> ssl.SSLContext | None:
    """For wss addresses; `insecure` accepts any certificate, as self-signed ones need."""
    if not url.startswith("wss:"):
        return None
    context = ssl.create_default_context()
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def check_outputs(options: argparse.Namespace) -> None:
    """Raises ConfigError for an output that is the input or another output, OSError for one that cannot be
    written.
    """
    outputs = _outputs(options)
    refuse_overwriting(outputs, [("--input-wav", options.input_wav)] if options.input_wav else [])
    for _, path in outputs:
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
        try_output(path)


def _outputs(options: argparse.Namespace) -> list[tuple[str, Path]]:
    named = [(f"--output-{kind}", getattr(options, f"output_{kind}")) for kind in ("wav", "text", "json")]
    named.append(("--transcript", options.transcript))
    return [(option, path) for option, path in named if path is not None]


def load_recording(path: Path, tail_s: float, channel: int = 1) -> Pcm:
    """One channel at 24 kHz, float32 [samples], with `tail_s` of silence behind it.

    Raises BadAudio, which names the file, for one without sound, OSError for one that cannot be opened.
    """
    try:
        pcm, rate = read_wav(path)
        heard = one_channel(pcm, path.name, channel, "--channel")
    except BadAudio as error:
        raise BadAudio(f"{path}: {error}") from error
    silence = np.zeros(round(tail_s * SAMPLE_RATE), np.float32)
    return np.concatenate((resample(heard, rate, SAMPLE_RATE), silence))


def keep(
    report: Report, heard: Recorder | None, transcript: Transcript, options: argparse.Namespace, samples: int
) -> list[str]:
    """Writes what was heard, at least `samples` long, and the texts asked for; whole files or none.

    Gives the reasons why some could not be written; one does not keep another from it.
    """
    failures = []
    for option, path in _outputs(options):
        try:
            if option == "--output-wav":
                if heard is not None:
                    write_wav(path, heard.pcm(samples), SAMPLE_RATE)
                continue
            if option == "--output-text":
                text = report.transcript
            elif option == "--output-json":
                text = report.json()
            else:
                text = transcript.json(report.session)
            with replacing(path) as part:
                part.write_text(text, "utf-8")
        except OSError as error:
            failures.append(cli.reason(error))
    return failures


EXAMPLES = (
    "python -m personaplex.client",
    "python -m personaplex.client --input-wav user.wav --output-wav heard.wav --output-text said.txt",
    "python -m personaplex.client --url ws://localhost:8998/api/chat --input-wav user.wav --voice NATM1 "
    "--text-prompt 'You enjoy having a good conversation.'",
)


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = cli.Parser(
        prog="python -m personaplex.client",
        description="Talks to a PersonaPlex service: a recording in real time, or the microphone. "
        "NVIDIA's own server needs --voice and --text-prompt; here everything has a default.",
        examples=EXAMPLES,
    )
    parser.add_argument(
        "--url", default="ws://localhost:8998/api/chat", help="address of the service (default: %(default)s)"
    )
    files = parser.add_argument_group("files")
    files.add_argument("--input-wav", type=Path, metavar="PATH", help="what to say (default: the microphone)")
    files.add_argument("--output-wav", type=file_name, metavar="PATH", help="what was heard")
    files.add_argument("--output-text", type=file_name, metavar="PATH", help="the agent's transcript")
    files.add_argument("--output-json", type=file_name, metavar="PATH", help="the report, for programs")
    files.add_argument(
        "--transcript",
        type=file_name,
        metavar="PATH",
        help="what both sides said, with times (JSON); your side where the service transcribes it",
    )
    files.add_argument(
        "--tail",
        type=cli.number(0, 3_600),
        default=2.0,
        metavar="SECONDS",
        help="silence after the recording, for the agent to answer in (default: %(default)s)",
    )
    files.add_argument(
        "--channel", type=cli.whole(1), default=1, metavar="N", help="of a recording that has several"
    )
    persona = parser.add_argument_group("persona (the service's defaults unless given)")
    voice = persona.add_mutually_exclusive_group()
    voice.add_argument("--voice", type=cli.text, metavar="NAME", help="a voice, such as NATF2")
    voice.add_argument(
        "--own-voice",
        type=Path,
        metavar="PATH",
        help="a recording of at most 30 s whose speaker agreed to the use of their voice",
    )
    persona.add_argument("--text-prompt", type=cli.text, metavar="TEXT", help="the agent's role")
    persona.add_argument("--seed", type=cli.whole(-1), metavar="N", help="same seed and audio: same answers")
    persona.add_argument("--text-temperature", type=cli.not_negative, metavar="T")
    persona.add_argument("--text-topk", type=cli.whole(0), metavar="K")
    persona.add_argument("--audio-temperature", type=cli.not_negative, metavar="T")
    persona.add_argument("--audio-topk", type=cli.whole(0), metavar="K")
    access = parser.add_argument_group("access")
    access.add_argument("--api-key", type=_key, metavar="KEY", help="sent as a bearer token")
    access.add_argument("--key-file", type=Path, metavar="PATH", help="file of keys; the first is sent")
    access.add_argument("--insecure", action="store_true", help="accept any certificate (self-signed)")
    return parser


def _key(text: str) -> str:
    if not (text.isascii() and text.isprintable()) or text != text.strip():
        raise argparse.ArgumentTypeError("holds characters that a header cannot carry")
    return text
