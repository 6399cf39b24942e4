"""CPU of each protocol in a gateway, per session, beside `/api/chat`'s: python -m benchmarks.protocols

For every frame of 80 ms: the client's message is read and decoded to a frame, the agent's frame is encoded
and written as messages. No sockets, no replica: what differs between protocols and nothing else. Protocols
take turns; CPU seconds are those of this process, so that a busy machine changes little. The delay of a
format is that of its filters, both ways; linear 24 kHz has none, Opus 6.5 ms.
"""

from __future__ import annotations

import argparse
import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine, publish
from deployments.gateway.protocols.asterisk import AsteriskTranslator
from deployments.gateway.protocols.carriers import TWILIO, CarrierTranslator
from deployments.gateway.protocols.live import LiveTranslator
from deployments.gateway.protocols.moshi import MoshiTranslator
from deployments.gateway.protocols.realtime import RealtimeOptions, RealtimeTranslator
from deployments.gateway.protocols.realtime_dialect import Dialect
from deployments.gateway.protocols.translator import Begin, Message, Translator
from personaplex.audio.g711 import MU_LAW
from personaplex.audio.resample import DELAY_S
from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SECONDS, FRAME_SIZE
from personaplex.persona import Persona
from personaplex.session.events import PeerAudio, SendAudio, SendText

FRAMES = 250
RECORDING = Path(__file__).parent.parent / "tests" / "data" / "mic.ogg"


def _speech() -> Any:
    heard = np.concatenate(Transcoder().receive(RECORDING.read_bytes()))
    return np.resize(heard, FRAMES * FRAME_SIZE).reshape(FRAMES, FRAME_SIZE)


def _chat(frames: Any) -> tuple[Translator, list[list[Message]]]:
    sender = Transcoder()
    pages: list[list[Message]] = [[b"\x01" + sender.send(frame)] for frame in frames]
    pages[0] = [*(b"\x01" + page for page in sender.headers()), *pages[0]]
    return MoshiTranslator(time.monotonic, 60.0), pages


def _pcm(frames: Any, name: str) -> list[str]:
    linear = [(frame * 32_767).astype("<i2").tobytes() for frame in frames]
    return [json.dumps({"type": name, "audio": base64.b64encode(one).decode()}) for one in linear]


def _live(frames: Any) -> tuple[Translator, list[list[Message]]]:
    options: Any = {"voices": {}, "expires_at": 0, "clock": time.monotonic, "burst_s": 60.0}
    translator = LiveTranslator("s" * 32, Persona(), **options)
    list(translator.read('{"type": "session.start", "session": {"model": "m"}}'))
    return translator, [[one] for one in _pcm(frames, "session.input_audio.append")]


def _realtime(frames: Any) -> tuple[Translator, list[list[Message]]]:
    options: Any = {"model": "m", "expires_at": 0, "clock": time.monotonic, "burst_s": 60.0}
    translator = RealtimeTranslator("s" * 32, Persona(), Dialect.GA, RealtimeOptions({}), **options)
    return translator, [[one] for one in _pcm(frames, "input_audio_buffer.append")]


def _twilio(frames: Any) -> tuple[Translator, list[list[Message]]]:
    options: Any = {"clock": time.monotonic, "burst_s": 60.0}
    translator = CarrierTranslator(TWILIO, lambda parameters: Begin(Persona()), **options)
    form = {"encoding": "audio/x-mulaw", "sampleRate": 8_000, "channels": 1}
    list(translator.read(json.dumps({"event": "start", "streamSid": "s", "start": {"mediaFormat": form}})))
    codes = MU_LAW.encode((frames[:, ::3] * 32_767).astype(np.int16).reshape(-1))
    media: list[Message] = []
    for number, at in enumerate(range(0, len(codes), 160)):
        payload = base64.b64encode(codes[at : at + 160]).decode()
        media.append(json.dumps({"event": "media", "media": {"chunk": str(number), "payload": payload}}))
    return translator, [media[at : at + 4] for at in range(0, len(media), 4)]


def _asterisk(frames: Any) -> tuple[Translator, list[list[Message]]]:
    translator = AsteriskTranslator(Persona(), clock=time.monotonic, burst_s=60.0)
    list(translator.read('{"event": "MEDIA_START", "format": "slin24"}'))
    linear = [(frame * 32_767).astype("<i2").tobytes() for frame in frames]
    return translator, [[one[at : at + 960] for at in range(0, 3_840, 960)] for one in linear]


PROTOCOLS: dict[str, tuple[Callable[[Any], tuple[Translator, list[list[Message]]]], float]] = {
    "chat": (_chat, 0.0065),
    "live": (_live, 0.0),
    "realtime": (_realtime, 0.0),
    "twilio": (_twilio, 2 * DELAY_S),
    "asterisk": (_asterisk, 0.0),
}


def measure(name: str, frames: Any) -> float:
    """CPU seconds of one frame, both ways."""
    translator, messages = PROTOCOLS[name][0](frames)
    began = time.process_time()
    for said, frame in zip(messages, frames, strict=True):
        for message in said:
            for meaning in translator.read(message):
                if isinstance(meaning, PeerAudio):
                    translator.transcoder.receive(meaning.data)
        translator.write(SendAudio(translator.transcoder.send(frame)))
        translator.write(SendText(" so"))
    return (time.process_time() - began) / len(frames)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.protocols", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--protocol", choices=list(PROTOCOLS), nargs="+", default=list(PROTOCOLS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/protocols.json"))
    options = parser.parse_args()
    frames = _speech()
    names = dict.fromkeys(["chat", *options.protocol])
    runs: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            runs[name].append(measure(name, frames))
    least = {name: min(values) for name, values in runs.items()}
    result = {
        name: {
            "cpu_us_per_frame": round(1e6 * value, 1),
            "times_chat": round(value / least["chat"], 2),
            "sessions_per_core": round(FRAME_SECONDS / value),
            "format_delay_ms": round(1_000 * PROTOCOLS[name][1], 1),
        }
        for name, value in least.items()
    }
    for name, row in result.items():
        print(f"{name:9s} {json.dumps(row)}")
    publish({"benchmark": "protocols", "machine": machine("numpy"), "protocols": result}, options.output)


if __name__ == "__main__":
    main()
