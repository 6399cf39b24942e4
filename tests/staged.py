"""A conversation of two synthetic speakers, staged for the page's tests.

The user speaks from a wav file that the browser takes for its microphone (`microphone` writes it), the agent
by a script, and at times both at once. `Staged` is a chat for WebService. Times of the script count from a
second before the user's first word, wherever in the stream that comes.
"""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile
import soxr
from evaluation_scenes import TEXTS, lasts, utterance
from websockets.exceptions import ConnectionClosed

from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SECONDS, FRAME_SIZE, SAMPLE_RATE
from personaplex.evaluation.vad import RATE
from personaplex.session.moshi import Audio, Handshake, Metadata, Text, decode, encode


class Line(NamedTuple):
    """One utterance of the script, perhaps cut short."""

    start: float
    name: str
    until: float = math.inf

    @property
    def end(self) -> float:
        return min(self.start + lasts(self.name), self.until)


USER = (
    *(Line(1.0, "question"), Line(6.6, "interruption")),  # the agent is still speaking, and gives way
    *(Line(12.8, "half_a"), Line(14.4, "half_b"), Line(17.9, "okay")),
)
AGENT = (Line(3.0, "six"), Line(5.0, "fourteen", until=7.6), Line(10.0, "seven"), Line(16.4, "eight"))
SECONDS = 20.0
LOUD = 0.02  # a frame of the user with this peak is speech
FRAMES = 1 / FRAME_SECONDS  # a second
DETAILS = {"session": "4f6c1d09a3e24b57", "voice": "NATF2", "text_seed": 90210, "audio_seed": 90210}


def sound(lines: tuple[Line, ...], rate: int = SAMPLE_RATE, seconds: float = SECONDS) -> np.ndarray:
    """float32 [samples] of all of `lines`."""
    whole = np.zeros(round(seconds * rate), np.float32)
    for line in lines:
        said = soxr.resample(utterance(line.name).astype(np.float32) / 2**15, RATE, rate)
        said, at = said[: round((line.end - line.start) * rate)], round(line.start * rate)
        whole[at : at + len(said)] += said[: len(whole) - at]
    return whole


def microphone(path: Path) -> Path:
    """The user's side as a wav at 48 kHz, as Chromium's fake microphone reads it."""
    soundfile.write(path, sound(USER, 48_000), 48_000, subtype="PCM_16")
    return path


class Staged:
    """One chat after another, each answered by the script; `heard` are the user's frames."""

    def __init__(
        self, *, words: bool = True, details: dict[str, Any] = DETAILS, unprompted: bool = False
    ) -> None:
        """`words`: what the user said is told. `unprompted`: the agent waits for nobody."""
        self.heard: list[np.ndarray] = []
        self.sent: list[np.ndarray] = []
        self._details, self._words, self._unprompted = details, words, unprompted
        self._agent = sound(AGENT)

    async def __call__(self, socket: Any) -> None:
        transcoder = Transcoder(clock=time.monotonic)
        await socket.send(encode(Handshake()))
        for page in transcoder.headers():
            await socket.send(encode(Audio(page)))
        await socket.send(encode(Metadata({"type": "session", **self._details})))
        told: list[tuple[float, Text | Metadata]] | None = None
        number = 0
        with contextlib.suppress(ConnectionClosed):
            while True:
                message = decode(await socket.recv())
                assert isinstance(message, Audio)
                for frame in transcoder.receive(message.data):
                    self.heard.append(frame)
                    if told is None and (self._unprompted or np.abs(frame).max() > LOUD):
                        begin = number - round(USER[0].start * FRAMES)
                        told = self._pieces(begin * FRAME_SECONDS)
                    script = None if told is None else number - begin
                    await socket.send(encode(Audio(transcoder.send(self._frame(script)))))
                    number += 1
                    while told and told[0][0] <= number * FRAME_SECONDS:
                        await socket.send(encode(told.pop(0)[1]))

    def _frame(self, script: int | None) -> np.ndarray:
        frame = np.zeros(FRAME_SIZE, np.float32)
        at = len(self._agent) if script is None else script * FRAME_SIZE
        part = self._agent[at : at + FRAME_SIZE]
        frame[: len(part)] = part
        self.sent.append(frame)
        return frame

    def _pieces(self, begin: float) -> list[tuple[float, Text | Metadata]]:
        """What is written down and when it is told, in order; the script's zero is at `begin`."""
        told: list[tuple[float, Text | Metadata]] = []
        for line in AGENT:
            words = TEXTS[line.name].split()
            for number, word in enumerate(words):
                at = line.start + lasts(line.name) * number / len(words)
                if at < line.end:
                    told.append((begin + at, Text(f" {word}")))
        for line in USER if self._words else ():
            times = {"start_ms": round(1e3 * (begin + line.start)), "end_ms": round(1e3 * (begin + line.end))}
            heard = {"type": "user_text", "text": TEXTS[line.name], **times, "words": []}
            told.append((begin + line.end + 0.4, Metadata(heard)))
        return sorted(told, key=lambda piece: piece[0])
