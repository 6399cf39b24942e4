"""What senders of long pages cost: memory of the service, beside senders of one page a frame, in one run.

    python -m benchmarks.bursts [--sessions 64] [--seconds 20] [--output benchmarks/results/bursts.json]

The engine says back what it hears. All sessions of a run send the same speech, in pages of one frame or of
five seconds; these all at the same moment, which is as bad as it gets. Memory is the highest resident size of
gateway and replica meanwhile, over that at the start of the run. That every answer comes is a test's affair
(tests/service/test_serve_senders.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.caller import Caller, framed
from benchmarks.live import service
from benchmarks.machine import machine, publish
from personaplex.audio.ogg import OggMuxer
from personaplex.audio.opus import PACKET_SAMPLES, OpusEncoder
from personaplex.audio.transcoder import Transcoder
from personaplex.config import BURST_S, FRAME_SECONDS, SAMPLE_RATE

RECORDING = Path(__file__).parent.parent / "tests" / "data" / "mic.ogg"
PAGES_S = (FRAME_SECONDS, 5.0)
TITLES = {"gateway": ":gateway", "replica": ":replica"}
EVERY_S = 0.25  # between two looks at memory


def stream(page_s: float, seconds: float) -> tuple[list[bytes], list[bytes]]:
    """Framed headers and pages of speech in packets of 20 ms."""
    speech = np.concatenate(Transcoder().receive(RECORDING.read_bytes()))
    pcm = np.resize(speech, round(seconds * SAMPLE_RATE))
    encoder, muxer = OpusEncoder(), OggMuxer(1)
    packets = [encoder.encode(part) for part in pcm.reshape(-1, PACKET_SAMPLES)]
    count = round(page_s * SAMPLE_RATE / PACKET_SAMPLES)
    headers = muxer.headers(2 * encoder.lookahead)
    pages = [muxer.page(packets[start : start + count], 0) for start in range(0, len(packets), count)]
    return [framed(b"\1" + page) for page in headers], [framed(b"\1" + page) for page in pages]


def processes(since: float) -> dict[str, psutil.Process]:
    """Gateway and replica that were started after `since`, by the titles Serve gives them."""
    found = {}
    for process in psutil.process_iter(["cmdline", "create_time"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::ServeReplica:") and process.info["create_time"] >= since:
            found |= {name: process for name, mark in TITLES.items() if mark in title}
    return found


async def measure(url: str, sessions: int, seconds: float, page_s: float, watched: Any) -> dict[str, Any]:
    """One run; megabytes are over those at its start."""
    headers, pages = stream(page_s, seconds)
    before = {name: process.memory_info().rss for name, process in watched.items()}
    peak = dict(before)
    callers = [Caller(url, headers) for _ in range(sessions)]
    await asyncio.gather(*(caller.open() for caller in callers))
    talking = asyncio.gather(*(_talk(caller, pages, page_s) for caller in callers))
    while not talking.done():
        await asyncio.wait([talking], timeout=EVERY_S)
        for name, process in watched.items():
            peak[name] = max(peak[name], process.memory_info().rss)
    result: dict[str, Any] = {"page_s": page_s}
    for name in watched:
        result[f"{name}_mb"] = round((peak[name] - before[name]) / 1e6, 1)
    total = sum(peak.values()) - sum(before.values())
    return result | {"kb_per_session": round(total / sessions / 1e3)}


async def _talk(caller: Caller, pages: Sequence[bytes], page_s: float) -> None:
    """Sends each page when it is full, and stays until its answers have had their time."""
    phase = random.random() * FRAME_SECONDS if page_s < 1 else page_s
    await caller.talk(pages, phase, page_s, listen_s=page_s + 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bursts", description=__doc__.split("\n")[0])
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/bursts.json"))
    options = parser.parse_args()
    began = time.time()
    settings = {"slots": options.sessions, "replica_num_cpus": 0.1, "gateway_num_cpus": 0.1}
    with service("echo", settings) as base:
        time.sleep(3.0)  # HAProxy learns of the service
        url, runs = f"{base.replace('http', 'ws')}/api/chat", []
        for page_s in PAGES_S:
            watched = processes(began)
            run = asyncio.run(measure(url, options.sessions, options.seconds, page_s, watched))
            print(json.dumps(run), flush=True)
            runs.append(run)
            time.sleep(2.0)
    result = {"benchmark": "bursts", "machine": machine("ray"), "sessions": options.sessions}
    publish(result | {"burst_s": BURST_S, "runs": runs}, options.output)


if __name__ == "__main__":
    main()
