"""How long after a sound is made it is heard again through the service, beside the sum of its known parts.

    python -m benchmarks.mouth_to_ear [--sessions 1 16 64] [--seconds 30] [--low-latency] [--output FILE]

The echo engine says back what it hears one frame later, as the model would. Probes send chirps at moments of
their own and find each again, by correlation, in what came back: laid out as a player without a reserve plays
it, each page at its arrival or behind its predecessor. So the figure holds everything between microphone and
loudspeaker but the devices. All other sessions are a load test's, in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.live import service
from benchmarks.machine import machine, publish
from loadtest import arrivals
from loadtest.connection import Connection
from loadtest.listener import Listener, percentile
from loadtest.target import address
from personaplex.audio.ogg import Head, OggDemuxer
from personaplex.audio.opus import OpusDecoder, OpusEncoder
from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SECONDS, FRAME_SIZE, SAMPLE_RATE
from personaplex.session.moshi import Audio, Handshake, Message, decode, encode

Pcm = npt.NDArray[np.float32]

LOCUSTFILE = Path(__file__).parent.parent / "loadtest" / "locustfile.py"
PROBES = 4  # of the sessions, where there are so many
CHIRP_S = 0.04
SWEEPS = ((400, 1_500), (1_500, 400), (1_700, 3_200), (3_200, 1_700))  # Hz; told apart by correlation
EVERY_S = 0.6  # between two chirps, and up to a frame more, so that they fall anywhere in a frame
LONGEST_S = 1.8  # a chirp that is not back by then is missed; less than until the next of its kind
CLEAR = 0.6  # correlation of a chirp that was found
RAMP_S = 5.0
PERCENTILES = (50, 95, 99)


def known_parts() -> dict[str, float]:
    """Milliseconds that the design costs, whatever the machine."""
    lookahead = 1e3 * OpusEncoder().lookahead / SAMPLE_RATE
    return {
        "page of the client: a sound leaves with the end of its 80 ms": 1e3 * FRAME_SECONDS,
        "frame in the gateway: Opus keeps its end back until the next page": 1e3 * FRAME_SECONDS,
        "engine: an answer is one frame behind": 1e3 * FRAME_SECONDS,
        "encoder in the gateway: look-ahead": lookahead,
    }


def chirps(seconds: float, seed: int) -> tuple[Pcm, list[Pcm], list[int]]:
    """A recording of chirps in silence, their kinds in turn, and the samples where each begins."""
    kinds = [_sweep(low, high) for low, high in SWEEPS]
    chance = np.random.default_rng(seed)
    recording = np.zeros(round(seconds / FRAME_SECONDS) * FRAME_SIZE, np.float32)
    starts: list[int] = []
    at = SAMPLE_RATE
    while at + 2 * SAMPLE_RATE < len(recording):
        kind = kinds[len(starts) % len(kinds)]
        recording[at : at + len(kind)] = kind
        starts.append(at)
        at += round((EVERY_S + chance.random() * FRAME_SECONDS) * SAMPLE_RATE)
    return recording, kinds, starts


def _sweep(low: float, high: float) -> Pcm:
    """A short tone that glides from `low` to `high` Hz."""
    time_s = np.arange(round(CHIRP_S * SAMPLE_RATE)) / SAMPLE_RATE
    phase = 2 * np.pi * (low * time_s + (high - low) / CHIRP_S * time_s**2 / 2)
    return np.asarray(0.5 * np.sin(phase) * np.hanning(len(time_s)), np.float32)


class Probe:
    """One session in a thread of its own; `delays` and `listener` after `join`."""

    def __init__(self, url: str, seconds: float, seed: int) -> None:
        self.listener = Listener()
        self.first_audio_ms: float | None = None
        self._url = url
        self._recording, self._kinds, self._starts = chirps(seconds, seed)
        self._heard: list[tuple[float, bytes]] = []  # moment and page
        self._began = 0.0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def delays(self) -> list[float]:
        """Milliseconds from each chirp to its return; those that were not found are left out."""
        heard = self._played()
        size = round(LONGEST_S * SAMPLE_RATE)
        found = []
        for number, start in enumerate(self._starts):
            chirp = self._kinds[number % len(self._kinds)]
            part = heard[start : start + size]
            if len(part) < size:
                continue
            energy = np.convolve(part**2, np.ones(len(chirp)), "valid")
            scores = np.correlate(part, chirp, "valid") / np.sqrt(energy * (chirp**2).sum() + 1e-9)
            best = int(scores.argmax())
            if scores[best] > CLEAR:
                found.append(1e3 * best / SAMPLE_RATE)
        return found

    @property
    def sent(self) -> int:
        """Chirps."""
        return len(self._starts)

    def _run(self) -> None:
        transcoder = Transcoder()
        frames = self._recording.reshape(-1, FRAME_SIZE)
        pages = [transcoder.send(frame) for frame in frames]  # encoded before it matters
        connection = Connection(self._url, {})
        try:
            live = False
            while not live:
                live = any(isinstance(_message(one), Handshake) for one in connection.receive(60.0))
            for page in transcoder.headers():
                connection.send(encode(Audio(page)))
            self._began = time.monotonic()
            for number, page in enumerate(pages, start=1):
                self._listen(connection, self._began + number * FRAME_SECONDS)
                connection.send(encode(Audio(page)))
            self._listen(connection, time.monotonic() + 1.0)
        finally:
            connection.close()

    def _listen(self, connection: Connection, until: float) -> None:
        while (rest := until - time.monotonic()) > 0:
            for one in connection.receive(rest):
                message = _message(one)
                if isinstance(message, Audio):
                    self._heard.append((time.monotonic(), message.data))

    def _played(self) -> Pcm:
        """What the loudspeaker plays, float32 [samples], from the moment of our own sample 0 on."""
        demuxer, decoder = OggDemuxer(), OpusDecoder()
        skip, end = 0, 0
        pieces: list[Pcm] = [np.zeros(0, np.float32)]
        for moment, page in self._heard:
            parts = []
            for item in demuxer.feed(page):
                if isinstance(item, Head):
                    skip = item.pre_skip // 2
                else:
                    parts.append(decoder.decode(item).copy())
            if not parts:
                continue
            pcm = np.concatenate(parts)
            pcm, skip = pcm[skip:], 0
            self.listener.hear(moment)
            if self.first_audio_ms is None:
                self.first_audio_ms = 1e3 * (
                    moment - self._began - FRAME_SECONDS
                )  # since the first page left
            late = round((moment - self._began) * SAMPLE_RATE) - end
            if late > 0:
                pieces.append(np.zeros(late, np.float32))
                end += late
            pieces.append(pcm)
            end += len(pcm)
        return np.concatenate(pieces)


def _message(data: bytes | str) -> Message:
    assert isinstance(data, bytes), "there are no text frames in the protocol"
    return decode(data)


def measure(base: str, sessions: int, seconds: float) -> dict[str, Any]:
    """One run with `sessions` at once."""
    url, probes = address(base), min(PROBES, sessions)
    others = sessions - probes
    late: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        load = _others(url, others, seconds + RAMP_S + 2, Path(folder) / "load") if others else None
        if load is not None:
            time.sleep(RAMP_S + 4.0)  # Locust's start, too
        running = [Probe(url, seconds, seed) for seed in range(probes)]
        for probe in running:
            probe.join()
        if load is not None:
            load.wait()
            figures = json.loads((Path(folder) / "load.json").read_text())["summary"]
            late = {f"load_{name}": figures[name] for name in ("live", "sent_late_share")}
    delays = [delay for probe in running for delay in probe.delays()]
    intervals = sum((probe.listener.intervals for probe in running), start=Counter[int]())
    return {
        "sessions": probes + late.get("load_live", 0),
        "chirps": sum(probe.sent for probe in running),
        "found": len(delays),
        "least_ms": round(min(delays), 1),
        **{f"p{level}_ms": round(float(np.percentile(delays, level)), 1) for level in PERCENTILES},
        "first_audio_ms": round(float(np.median([probe.first_audio_ms or np.nan for probe in running])), 1),
        "underruns": sum(probe.listener.underruns for probe in running),
        "interval_p50_ms": percentile(intervals, 0.5),
        "interval_p99_ms": percentile(intervals, 0.99),
        "interval_max_ms": max(intervals),
        **late,
    }


def _others(url: str, sessions: int, seconds: float, stem: Path) -> subprocess.Popen[bytes]:
    profile, length = f"{RAMP_S}@{sessions / RAMP_S}", f"fixed:{seconds}"
    pieces, drawn = arrivals.profile(profile), arrivals.lengths(length)
    seed = next(n for n in itertools.count(1) if len(arrivals.draw(pieces, drawn, n)) == sessions)
    command = [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", url),
        *("--arrivals", profile, "--lengths", length, "--draw-seed", str(seed)),
        *("--output", str(stem), "--require"),
    ]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 16, 64], help="at once, in each run")
    parser.add_argument("--seconds", type=float, default=30.0, help="of chirps in each run")
    parser.add_argument("--low-latency", action="store_true", help="with the service's setting of that name")
    parser.add_argument("--output", type=Path, help="write the result here as JSON")
    options = parser.parse_args()
    settings = {"slots": 96, "replica_num_cpus": 0.1, "gateway_num_cpus": 0.1}
    settings["low_latency"] = options.low_latency
    with service("echo", settings) as base:
        time.sleep(3.0)  # HAProxy learns of the service
        runs = [measure(base, sessions, options.seconds) for sessions in options.sessions]
    parts = known_parts()
    result = {
        "benchmark": "mouth_to_ear",
        "machine": machine("ray", "websockets"),
        "low_latency": options.low_latency,
        "known_parts_ms": {name: round(value, 1) for name, value in parts.items()},
        "known_sum_ms": round(sum(parts.values()), 1),
        "runs": runs,
    }
    publish(result, options.output)


if __name__ == "__main__":
    main()
