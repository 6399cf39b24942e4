"""What a benchmark's cheap client says and hears in each protocol; see benchmarks.serving, --protocol.

The sound is the same in all: speech over a faint noise, so that the agent, which echoes, never pauses and
Realtime's response never ends. What is sent is made once for all sessions, by the dialects of the load test;
of what is heard only the beginning of a message is read. Telephones send pieces of 20 ms.

Each frame bears its number, since the service may leave frames out to give back delay: in its first sample,
which comes back exactly where there is no codec, and modulo MARKS in the level of a tone in its middle.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.caller import BINARY, LIVE, TEXT, Hear, framed, hear_chat
from loadtest.protocols import PROTOCOLS, Dialect, Message
from loadtest.webhook import Webhook
from personaplex.audio.g711 import MU_LAW
from personaplex.audio.pcm import PcmTranscoder
from personaplex.audio.resample import DELAY_S
from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SECONDS, FRAME_SIZE, Pcm
from personaplex.session.moshi import Audio, encode

RECORDING = Path(__file__).parent.parent / "tests" / "data" / "mic.ogg"
NOISE = 0.02  # -34 dBFS
CODEC_DELAY_S = 0.0065  # of Opus
MARKS, MARK_STEP = 16, 0.05
MARK = slice(801, 1_161)  # the tone, samples of a frame: 1 kHz, whose peaks are samples at 8 kHz too
HEARD_MARK = slice(335, 415)  # where it is heard at 8 kHz, after three filters of 2 ms
SETTLE_S = 3.0  # where the server does not say that the slot is ready; all callers come at once

Opening = tuple[dict[str, str], list[bytes]]  # headers of the upgrade, and framed messages after it


@dataclass
class Stream:
    """One frame's speech after the other, framed for the socket. `completes[n]` is the message that completes
    frame n; `opening` is asked once for each session, with its address."""

    messages: list[bytes]
    completes: list[int]
    opening: Callable[[str], Opening]
    path: str = "/api/chat"
    per_frame: int = 1  # messages
    hear: Callable[[], Hear] = hear_chat
    settle_s: float = 0.0  # to wait after the opening, instead of being told that the session is live
    delay_s: float = CODEC_DELAY_S  # of the format, both ways


def speech(seconds: float) -> Pcm:
    """A recording of that length, float32 [frames, 1920]."""
    heard = np.concatenate(Transcoder().receive(RECORDING.read_bytes()))
    return np.resize(heard, (round(seconds / FRAME_SECONDS), FRAME_SIZE))


def sound(seconds: float) -> Pcm:
    """Without a pause and with a number in each frame, float32 [frames, 1920] of 16-bit values."""
    frames = speech(seconds)
    count = len(frames)
    noisy = frames + np.random.default_rng(1).normal(0.0, NOISE, (count, FRAME_SIZE))
    numbers = np.arange(count) + 1
    frames = np.rint(np.clip(noisy, -0.99, 0.99) * 32_768).astype(np.float32) / np.float32(32_768)
    frames[:, 0] = (numbers % 16_384) / 32_768
    levels = MARK_STEP * (1 + np.arange(count) % MARKS)
    frames[:, MARK] = levels[:, None] * np.sin(2 * np.pi * np.arange(MARK.stop - MARK.start) / 24)
    return frames.astype(np.float32)


def chat_stream(frames: Pcm) -> Stream:
    """Pages of Ogg and Opus."""
    encoder, decoder = Transcoder(), Transcoder()
    headers = encoder.headers()
    decoder.receive(b"".join(headers))
    pages = [encoder.send(frame) for frame in frames]
    completes: list[int] = []
    for number, page in enumerate(pages):
        completes += [number] * len(decoder.receive(page))
    opening = [_framed(encode(Audio(page))) for page in headers]
    return Stream([_framed(encode(Audio(page))) for page in pages], completes, lambda url: ({}, opening))


def stream(protocol: str, frames: Pcm, webhook: Webhook) -> Stream:
    """Of any protocol. `webhook` is what Twilio's calls begin at."""
    if protocol == "chat":
        return chat_stream(frames)
    dialect = PROTOCOLS[protocol]({})
    form = dialect.audio
    assert form is not None
    encoder = PcmTranscoder()
    encoder.set_formats(form, form)
    said = [dialect.write(encode(Audio(encoder.send(frame)))) for frame in frames]
    per_frame = len(said[0])
    more = [_framed('{"type":"response.create"}')] if "realtime" in protocol else []

    def opening(url: str) -> Opening:
        if protocol != "twilio":
            return dict(dialect.headers), [*_opening(dialect), *more]
        return webhook.headers(url), _opening(PROTOCOLS[protocol](webhook.ring(url, "")))

    return Stream(
        [_framed(message) for messages in said for message in messages],
        [per_frame * number + per_frame - 1 for number in range(len(frames))],
        opening,
        path=dialect.path,
        per_frame=per_frame,
        hear=_ears(protocol),
        settle_s=0.0 if protocol == "live" else SETTLE_S,
        delay_s=0.0 if form.rate == 24_000 else 2 * DELAY_S,
    )


def _opening(dialect: Dialect) -> list[bytes]:
    return [_framed(message) for message in dialect.open()]


def _framed(message: Message) -> bytes:
    return framed(message.encode(), TEXT) if isinstance(message, str) else framed(message)


def _ears(protocol: str) -> Callable[[], Hear]:
    """What a message of the server is: see `Hear`."""
    match protocol:
        case "live":
            return lambda: _numbered(b'{"type":"session.output_audio.delta"', b'{"type":"session.started"')
        case "realtime":
            return lambda: _numbered(b'{"type":"response.output_audio.delta"')
        case "realtime-beta":
            return lambda: _numbered(b'{"type":"response.audio.delta"')
        case "asterisk":
            return lambda: _hear_asterisk
        case _:
            return _hear_call


def _answer(sample: bytes) -> int | None:
    """The answer that begins with `sample`: frame n, counted from 0 and numbered n + 1, is heard in answer
    n + 1. None for the silence before."""
    return int.from_bytes(sample, "little", signed=True) or None


def _numbered(mark: bytes, live: bytes | None = None) -> Hear:
    def hear(opcode: int, data: bytes, begin: int, end: int) -> int | None:
        if opcode != TEXT or not data.startswith(mark, begin):
            return LIVE if live is not None and data.startswith(live, begin) else None
        at = data.index(b'"delta":"', begin, end) + 9
        return _answer(base64.b64decode(data[at : at + 4])[:2])

    return hear


def _hear_asterisk(opcode: int, data: bytes, begin: int, end: int) -> int | None:
    return _answer(data[begin : begin + 2]) if opcode == BINARY else None


def _hear_call() -> Hear:
    last = 0

    def hear(opcode: int, data: bytes, begin: int, end: int) -> int | None:
        nonlocal last
        if opcode != TEXT or not data.startswith(b'{"event":"media"', begin):
            return None
        at = data.index(b'"payload":"', begin, end) + 11
        heard = MU_LAW.decode(base64.b64decode(data[at : data.index(b'"', at)]))[HEARD_MARK]
        mark = round(float(np.abs(heard.astype(np.float32)).max()) / 32_768 / MARK_STEP) - 1
        if mark < 0:  # the silence before
            return None
        last += 1 + (mark + 1 - (last + 1)) % MARKS
        return last

    return hear
