"""What users say, as text: how right, how well timed and how soon, through Opus and the live service.

    python -m benchmarks.words [--count 60] [--quiet-minutes 10] [--pipeline] [--output FILE]

Sentences by several synthetic voices (`benchmarks.spoken`), whose words' times are known, go through the
service in one session as a client sends them: Opus at 32 kb/s, a frame every 80 ms, pauses between them. The
same model reads the same clean sound, as one file a sentence. Then come minutes of silence, hiss, hum,
clicks, breath and music without a word: whatever text the service makes of them is invented.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import websockets
from numpy.typing import NDArray

from benchmarks.live import service
from benchmarks.machine import machine, publish
from benchmarks.spoken import Spoken, utterances
from benchmarks.worderrors import pairs, plain
from personaplex.audio.transcoder import Transcoder
from personaplex.audio.wav import resample
from personaplex.config import FRAME_SECONDS, FRAME_SIZE, SAMPLE_RATE, Pcm
from personaplex.session.moshi import Audio, Handshake, Metadata, decode
from personaplex.transcription.listener import Listener
from personaplex.transcription.silero import FASTER_WHISPER, RATE, Silero, find
from personaplex.transcription.whisper import Options, Whisper
from personaplex.words import Segment, Word, from_json, word_errors

PAUSES_S = (0.9, 1.6)  # between two sentences
KINDS = 6  # of sound without a word
LAST_S = 6.0  # waited for the words of the last one
PLAIN = {"RAY_SERVE_ENABLE_HA_PROXY": "0"}  # a handful of sessions
SETTINGS = {
    "slots": KINDS,
    "sessions_per_address": 0,
    "transcription": "on",
    "session_limit_s": 3_600,
    "static": "none",
}


@dataclass
class Heard:
    """What the client was told, with the seconds since its first frame."""

    segments: list[tuple[float, Segment]] = field(default_factory=list)
    lost: int = 0
    pages: list[float] = field(default_factory=list)


async def converse(base: str, pcm: Pcm) -> Heard:
    """One session that says `pcm`, float32 [samples] at 24 kHz, in real time."""
    heard, live, coder = Heard(), asyncio.Event(), Transcoder()
    began = 0.0

    async def listen(socket: Any) -> None:
        async for message in socket:
            match decode(message):
                case Handshake():
                    live.set()
                case Audio():
                    heard.pages.append(time.monotonic() - began)
                case Metadata(data) if data.get("type") == "user_text":
                    heard.segments.append((time.monotonic() - began, from_json(data)))
                case Metadata(data) if data.get("type") == "user_text_lost":
                    heard.lost += 1

    url = f"{base.replace('http', 'ws')}/api/chat?status=1"
    async with websockets.connect(url, max_size=None, compression=None) as socket:
        listening = asyncio.ensure_future(listen(socket))
        await live.wait()
        for page in coder.headers():
            await socket.send(b"\x01" + page)
        began = time.monotonic()
        for number in range(len(pcm) // FRAME_SIZE):
            await asyncio.sleep(began + (number + 1) * FRAME_SECONDS - time.monotonic())  # its sound is over
            await socket.send(b"\x01" + coder.send(pcm[number * FRAME_SIZE :][:FRAME_SIZE]))
        await asyncio.sleep(LAST_S)
        listening.cancel()
    return heard


def lay_out(said: Sequence[Spoken]) -> tuple[Pcm, list[float]]:
    """All sentences with pauses, and when each begins."""
    dice = np.random.default_rng(0)
    parts: list[Pcm] = [np.zeros(SAMPLE_RATE, np.float32)]
    starts = []
    for one in said:
        starts.append(sum(map(len, parts)) / SAMPLE_RATE)
        parts += [one.pcm, np.zeros(round(dice.uniform(*PAUSES_S) * SAMPLE_RATE), np.float32)]
    sound = np.concatenate(parts)
    return np.pad(sound, (0, -len(sound) % FRAME_SIZE)), starts


def quiet(seconds: float) -> list[Pcm]:
    """Sound without a word: silence, hiss, hum, clicks, breath and music, each for `seconds`."""
    dice = np.random.default_rng(1)
    count = round(seconds / FRAME_SECONDS) * FRAME_SIZE
    time_s = np.arange(count) / SAMPLE_RATE
    hiss = dice.standard_normal(count)
    hum = sum(np.sin(2 * np.pi * 50 * k * time_s) / k for k in (1, 2, 3, 5))
    clicks: NDArray[np.floating[Any]] = np.zeros(count)
    clicks[dice.integers(0, count, round(4 * seconds))] = dice.uniform(0.2, 0.9)
    clicks = np.convolve(clicks, np.exp(-np.arange(600) / 60) * dice.standard_normal(600), "same")
    brown = np.cumsum(dice.standard_normal(count))
    brown -= np.convolve(brown, np.ones(401) / 401, "same")
    breath = brown / np.abs(brown).max() * (np.maximum(0, np.sin(2 * np.pi * time_s / 4)) ** 3)
    notes = 220 * 2 ** (dice.choice([0, 2, 4, 5, 7, 9, 11, 12], size=count // (SAMPLE_RATE // 3) + 1) / 12)
    phase = 2 * np.pi * np.cumsum(np.repeat(notes, SAMPLE_RATE // 3)[:count]) / SAMPLE_RATE
    tones = np.sin(phase) + 0.5 * np.sin(2 * phase) + 0.3 * np.sin(1.5 * phase)
    music = np.exp(-3 * (time_s % (1 / 3))) * tones
    parts = [0 * hiss, 0.01 * hiss, 0.05 * hum, 0.5 * clicks, 0.3 * breath, 0.2 * music]
    return [part.astype(np.float32) for part in parts]


def judge(
    said: Sequence[Spoken], starts: Sequence[float], heard: Heard, clean: Sequence[Sequence[Word]]
) -> dict[str, Any]:
    """The figures. What was told belongs to the sentence in whose time it lies."""
    bounds = [*starts[1:], float("inf")]
    wrong: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    offsets, ends, delays = [], [], []
    for one, start, until, alone in zip(said, starts, bounds, clean, strict=True):
        mine = [(at, s) for at, s in heard.segments if start - 0.5 <= (s.start + s.end) / 2 < until - 0.5]
        read = [word for _, segment in mine for word in segment.words]
        text = plain(one.text)
        for kind in ("all", one.voice.split()[0]):
            wrong[kind][0] += len(text)
            wrong[kind][1] += word_errors(text, plain(" ".join(word.text for word in read)))
            wrong[kind][2] += word_errors(text, plain(" ".join(word.text for word in alone)))
        for true, found in pairs(one.words, read):
            offsets.append(found.start - start - true.start)
            ends.append(found.end - start - true.end)
        if mine:
            delays.append(mine[-1][0] - start - len(one.pcm) / SAMPLE_RATE)
    figures = {
        kind: {
            "words": count,
            "word_error_rate": round(live / count, 4),
            "word_error_rate_of_clean_files": round(alone / count, 4),
        }
        for kind, (count, live, alone) in wrong.items()
    }
    return {
        "sentences": len(said),
        "voices": len({one.voice for one in said}),
        "without_a_text": len(said) - len(delays),
        "lost": heard.lost,
        **figures["all"],
        "by_synthesiser": {kind: row for kind, row in figures.items() if kind != "all"},
        "words_compared_in_time": len(offsets),
        "start_off_by_s": quantiles(offsets, absolute=True),
        "start_off_by_s_median_signed": round(float(np.median(offsets)), 3),
        "end_off_by_s": quantiles(ends, absolute=True),
        "text_after_end_of_speech_s": quantiles(delays),
    }


def quantiles(values: Sequence[float], absolute: bool = False) -> dict[str, float]:
    row = np.abs(values) if absolute else np.asarray(values)
    return {f"p{share}": round(float(np.percentile(row, share)), 3) for share in (50, 90, 95, 99)}


def no_words(base: str, minutes: float) -> dict[str, Any]:
    """What the service makes of `minutes` of sound without a word, in as many sessions as there are kinds."""

    async def all_at_once() -> list[Heard]:
        return list(await asyncio.gather(*(converse(base, pcm) for pcm in quiet(minutes * 60 / KINDS))))

    heard = asyncio.run(all_at_once())
    segments = [segment for one in heard for _, segment in one.segments]
    return {"minutes": minutes, "texts": len(segments), "words": sum(len(one.words) for one in segments)}


class Pipeline:
    """What gateway and transcriber do with the sound, in this process and as fast as it goes."""

    def __init__(self, whisper: Whisper) -> None:
        path = find(FASTER_WHISPER)
        assert path is not None
        self._whisper, self._silero = whisper, Silero(path, "")
        self.ear_s = self.sound_s = 0.0  # CPU time of the gateway's ear, and of how much sound

    def converse(self, pcm: Pcm) -> Heard:
        """As `converse` over a service: a text comes when its speech is known to have ended and was read."""
        heard, there, here = Heard(), Transcoder(), Transcoder()
        frames = [frame for page in there.headers() for frame in here.receive(page)]
        for frame in pcm.reshape(-1, FRAME_SIZE):
            frames += here.receive(there.send(frame))
        listener, found = Listener(self._silero), []
        began = time.process_time()
        for number, frame in enumerate(frames):
            found += listener.hear(number, frame)
        self.ear_s += time.process_time() - began
        self.sound_s += len(frames) * FRAME_SECONDS
        for speech in [*found, *listener.end()]:
            began = time.process_time()
            segment = self._whisper.read(speech)
            if segment is not None:
                took = time.process_time() - began
                heard.segments.append((speech.end + speech.waited + took, segment))
        return heard


def through_pipeline(
    said: Sequence[Spoken], clean: Sequence[Sequence[Word]], whisper: Whisper, minutes: float
) -> dict[str, Any]:
    """The figures without a service; delays are those of an idle core."""
    sound, starts = lay_out(said)
    pipeline = Pipeline(whisper)
    speech = judge(said, starts, pipeline.converse(sound), clean)
    ear = pipeline.ear_s / pipeline.sound_s
    segments = [s for pcm in quiet(minutes * 60 / KINDS) for _, s in pipeline.converse(pcm).segments]
    return {
        "speech": speech,
        "no_speech": {
            "minutes": minutes,
            "texts": len(segments),
            "words": sum(len(s.words) for s in segments),
        },
        "cpu_seconds_of_the_gateways_ear_per_second": round(ear, 4),
    }


def through_service(
    said: Sequence[Spoken], clean: Sequence[Sequence[Word]], model: str, minutes: float
) -> dict[str, Any]:
    """The figures of the live service."""
    sound, starts = lay_out(said)
    with service(model, SETTINGS, PLAIN) as base:
        speech = judge(said, starts, asyncio.run(converse(base, sound)), clean)
    with service(model, SETTINGS, PLAIN) as base:
        return {"engine": model, "speech": speech, "no_speech": no_words(base, minutes)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--quiet-minutes", type=float, default=10.0)
    parser.add_argument("--engine", default="echo", help="what answers in the service")
    parser.add_argument(
        "--pipeline", action="store_true", help="the same code in one process, without a service"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    said = utterances(options.count)
    whisper = Whisper(Options())
    began = time.process_time()
    clean = [whisper.words(resample(one.pcm, SAMPLE_RATE, RATE)) for one in said]
    work = (time.process_time() - began) / sum(len(one.pcm) / SAMPLE_RATE for one in said)
    if options.pipeline:
        figures = through_pipeline(said, clean, whisper, options.quiet_minutes)
    else:
        del whisper
        figures = through_service(said, clean, options.engine, options.quiet_minutes)
    result = {
        "machine": machine("faster-whisper", "ctranslate2", "onnxruntime"),
        "through": "pipeline" if options.pipeline else "service",
        **figures,
        "cpu_seconds_of_clean_files_per_second_of_speech": round(work, 3),
    }
    publish(result, options.output)


if __name__ == "__main__":
    main()
