"""The benchmark's cheap clients find their own frames again in what each protocol says."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from benchmarks.caller import BINARY, LIVE, TEXT
from benchmarks.dialects import sound, stream
from loadtest.webhook import Webhook
from personaplex.audio.pcm import PcmFormat, PcmTranscoder
from personaplex.config import FRAME_SIZE

SECONDS = 4.0
FRAMES = sound(SECONDS)
LEFT_OUT = (20, 33)


def said(protocol: str) -> list[tuple[int, bytes]]:
    """What an echo, one frame late, is written as, without the frames of LEFT_OUT."""
    call = protocol in ("twilio", "telnyx")
    form = PcmFormat("mulaw", 8_000) if call else PcmFormat()
    ears, mouth = PcmTranscoder(burst_s=60.0), PcmTranscoder()
    ears.set_formats(form, form)
    mouth.set_formats(form, form)
    answers = [np.zeros(FRAME_SIZE, np.float32)]
    for frame in FRAMES:
        answers += ears.receive(mouth.send(frame))
    written = []
    for number, answer in enumerate(answers[:-1]):
        audio = ears.send(answer)
        text = base64.b64encode(audio).decode()
        event = {
            "live": {"type": "session.output_audio.delta", "delta": text},
            "realtime": {"type": "response.output_audio.delta", "event_id": "e", "delta": text},
            "realtime-beta": {"type": "response.audio.delta", "event_id": "e", "delta": text},
        }.get(protocol, {"event": "media", "streamSid": "s", "media": {"payload": text}})
        if number not in LEFT_OUT:
            plain = (BINARY, audio) if protocol == "asterisk" else None
            written.append(plain or (TEXT, json.dumps(event, separators=(",", ":")).encode()))
    return written


@pytest.mark.parametrize("protocol", ["live", "realtime", "realtime-beta", "twilio", "telnyx", "asterisk"])
def test_answers_are_known_by_their_numbers(protocol: str) -> None:
    made = stream(protocol, FRAMES, Webhook("https://h", "t"))
    assert len(made.messages) == made.per_frame * len(FRAMES)
    assert made.completes[:2] == [made.per_frame - 1, 2 * made.per_frame - 1]
    hear = made.hear()
    found = [hear(opcode, b"head" + data, 4, 4 + len(data)) for opcode, data in said(protocol)]
    expected = [number for number in range(1, len(FRAMES)) if number not in LEFT_OUT]
    assert [number for number in found if number is not None] == expected


def test_what_is_no_audio_is_none() -> None:
    hear = stream("live", FRAMES, Webhook("https://h", "t")).hear()
    for text, number in ((b'{"type":"session.started"}', LIVE), (b'{"type":"error"}', None)):
        assert hear(TEXT, text, 0, len(text)) == number


def test_the_sound_is_the_same_for_all_and_never_quiet() -> None:
    levels = 10 * np.log10(np.mean(FRAMES**2, axis=1))
    assert levels.min() > -40
    assert len(FRAMES) == round(SECONDS / 0.08)
