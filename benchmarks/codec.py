"""Opus and Ogg, per session and second: this project's transcoder beside sphn, which the peers use.

    python -m benchmarks.codec [--seconds 4] [--rounds 7] [--output benchmarks/results/codec.json]

Both do the work of a gateway for the same speech: demux and decode a client's pages of 40 ms (two packets),
cut frames, encode each frame and mux it. CPU time of the process, rounds alternate between the two so that
both see the same machine, the median counts. A session per core is a session-second per CPU second.

The encoder's settings stand beside other candidates: CPU, bits, and how close the decoded speech comes to
what was said (signal to noise of the waveform).
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sphn

from benchmarks.machine import machine, publish
from personaplex.audio.ogg import OggMuxer
from personaplex.audio.opus import PACKET_SAMPLES, OpusDecoder, OpusEncoder
from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SIZE, SAMPLE_RATE, Pcm

SPEECH = Path(__file__).parent.parent / "tests" / "data" / "mic.ogg"
CANDIDATES = ((48_000, 0), (32_000, 0), (32_000, 5), (48_000, 5))  # bits per second, complexity; ours first
CLIENT_PACKETS = 2  # 20 ms each, in one page: what the reference's web client sends


def client_pages(pcm: Pcm) -> list[bytes]:
    """`pcm` as a browser would send it, one page per message."""
    encoder, muxer = OpusEncoder(), OggMuxer(serial=1)
    pages = muxer.headers(pre_skip=encoder.lookahead * 2)
    step = CLIENT_PACKETS * PACKET_SAMPLES
    for start in range(0, len(pcm) - step + 1, step):
        parts = pcm[start : start + step].reshape(CLIENT_PACKETS, PACKET_SAMPLES)
        pages.append(muxer.page([encoder.encode(part) for part in parts], (start + step) * 2))
    return pages


def ours_receive(pages: list[bytes]) -> None:
    transcoder = Transcoder()
    for page in pages:
        transcoder.receive(page)


def ours_send(frames: Pcm) -> None:
    transcoder = Transcoder()
    for frame in frames:
        transcoder.send(frame)


def sphn_receive(pages: list[bytes]) -> None:
    reader = sphn.OpusStreamReader(SAMPLE_RATE)
    waiting: Pcm = np.zeros(0, np.float32)
    for page in pages:
        waiting = np.concatenate((waiting, reader.append_bytes(page)))
        while len(waiting) >= FRAME_SIZE:
            waiting = waiting[FRAME_SIZE:]


def sphn_send(frames: Pcm) -> None:
    writer = sphn.OpusStreamWriter(SAMPLE_RATE)
    for frame in frames:
        writer.append_pcm(frame)


def encoded(encoder: OpusEncoder, frames: Pcm) -> list[bytes]:
    return [encoder.encode(part) for part in frames.reshape(-1, FRAME_SIZE)]


def signal_to_noise(packets: list[bytes], said: Pcm, delay: int) -> float:
    """dB, of what is heard of `said`, `delay` samples later."""
    decoder = OpusDecoder()
    heard = np.concatenate([decoder.decode(packet).copy() for packet in packets])[delay:]
    return 10 * math.log10(np.var(said) / np.var(heard - said[: len(heard)]))


def candidates(frames: Pcm, rounds: int) -> dict[str, dict[str, float]]:
    """Settings of the encoder side by side; the CPU of each relative to the first, which is ours."""
    times: dict[tuple[int, int], list[float]] = {key: [] for key in CANDIDATES}
    for _ in range(rounds):
        for key, taken in times.items():
            taken.append(cpu_seconds(functools.partial(encoded, OpusEncoder(*key), frames)))
    ours = statistics.median(times[CANDIDATES[0]])
    table = {}
    for (bitrate, complexity), taken in times.items():
        encoder = OpusEncoder(bitrate, complexity)
        packets = encoded(encoder, frames)
        bits = 8 * sum(map(len, packets)) / (frames.size / SAMPLE_RATE)
        table[f"{bitrate // 1_000} kb/s, complexity {complexity}"] = {
            "signal_to_noise_db": round(signal_to_noise(packets, frames.reshape(-1), encoder.lookahead), 2),
            "kilobits_per_s": round(bits / 1e3, 1),
            "cpu_times_ours": round(statistics.median(taken) / ours, 2),
        }
    return table


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()  # all threads, should a library have some
    work()
    return time.process_time() - start


def measure(seconds: float, rounds: int) -> dict[str, Any]:
    pcm = np.concatenate(Transcoder().receive(SPEECH.read_bytes()))[: int(seconds * SAMPLE_RATE)]
    frames = pcm[: len(pcm) // FRAME_SIZE * FRAME_SIZE].reshape(-1, FRAME_SIZE)
    pages = client_pages(pcm)
    tasks: dict[str, Callable[[], None]] = {
        "ours_receive": lambda: ours_receive(pages),
        "sphn_receive": lambda: sphn_receive(pages),
        "ours_send": lambda: ours_send(frames),
        "sphn_send": lambda: sphn_send(frames),
    }
    for work in tasks.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, work in tasks.items():
            times[name].append(cpu_seconds(work))
    ms = {name: 1e3 * statistics.median(taken) / seconds for name, taken in times.items()}
    ours, theirs = ms["ours_receive"] + ms["ours_send"], ms["sphn_receive"] + ms["sphn_send"]
    return {
        "cpu_ms_per_session_second": {name: round(value, 3) for name, value in ms.items()},
        "us_per_frame": {"ours": round(ours / 12.5 * 1e3, 1), "sphn": round(theirs / 12.5 * 1e3, 1)},
        "sessions_per_core": {"ours": round(1e3 / ours, 1), "sphn": round(1e3 / theirs, 1)},
        "times_sphn": round(theirs / ours, 2),
        "encoder": candidates(frames, rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="speech per round (at most 12)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="write the result here as JSON")
    arguments = parser.parse_args()
    result = {
        "benchmark": "codec",
        "machine": machine("opuslib", "sphn"),
        **measure(arguments.seconds, arguments.rounds),
    }
    publish(result, arguments.output)


if __name__ == "__main__":
    main()
