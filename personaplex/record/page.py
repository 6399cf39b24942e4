"""One self-contained page of a record: player, two lanes of sound, the words, the delay of every answer.

Nothing is loaded from anywhere; the sound is in it as Ogg Opus, which every browser of today plays.
"""

from __future__ import annotations

import base64
import io
import json
import time
from importlib import resources

import numpy as np
import soundfile
from numpy.typing import NDArray

from personaplex.config import FRAME_SIZE, SAMPLE_RATE
from personaplex.record.format import Record
from personaplex.record.transcript import TEXT, USER_TEXT, user_words, words

_BLOCK = 2**18  # samples encoded at once


def render(record: Record, sound: NDArray[np.float32]) -> str:
    """The page of a record and its stereo sound, float32 [2, samples], agent first."""
    template = resources.files("personaplex").joinpath("data/record.html").read_text(encoding="utf-8")
    # `<` would end the script element, or begin a comment in it
    data = json.dumps(_facts(record, sound), ensure_ascii=False).replace("<", "\\u003c")
    audio = base64.b64encode(_opus(sound)).decode()
    before, middle, after = template.replace("{{data}}", "\0").replace("{{sound}}", "\0").split("\0")
    return before + audio + middle + data + after


def _facts(record: Record, sound: NDArray[np.float32]) -> dict[str, object]:
    head, delays = record.head, np.full(record.span, np.nan)
    delays[record.frames] = 1e3 * record.latencies_s
    peaks = np.abs(sound.reshape(2, record.span, FRAME_SIZE)).max(axis=2)
    return {
        "session": head.session,
        "began": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(head.began)),
        "seconds": record.seconds,
        "voice": head.persona.voice,
        "role": head.persona.text_prompt,
        "model": head.model,
        "version": head.version,
        "ended": record.ended or "cut short",
        "damage": record.damage,
        "missing": record.span - len(record),
        "words": [[word.text, word.start, word.end] for word in words(record)],
        "user_words": [[word.text, word.start, word.end] for word in user_words(record)],
        "peaks": [np.round(lane, 3).tolist() for lane in peaks],
        "delays": [None if np.isnan(delay) or delay == 0 else round(delay, 1) for delay in delays.tolist()],
        "events": [
            [event.at, event.type, str(event.fields.get("cause", ""))]
            for event in record.events
            if event.type not in (TEXT, USER_TEXT)
        ],
    }


def _opus(sound: NDArray[np.float32]) -> bytes:
    """Ogg Opus of float32 [2, samples]."""
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", SAMPLE_RATE, 2, format="OGG", subtype="OPUS") as file:
        for start in range(0, sound.shape[1], _BLOCK):
            file.write(np.clip(sound[:, start : start + _BLOCK].T, -1.0, 1.0))
    return out.getvalue()
