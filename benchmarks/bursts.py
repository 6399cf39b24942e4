"""Senders of long pages, beside senders of one page a frame: are they answered, and what do they cost?

    python -m benchmarks.bursts [--sessions 64] [--gateways 2] [--seconds 20] [--output F]

The engine says back what it hears. All sessions of a run send the same speech, in pages of one frame or of
five seconds; these all at the same moment, which is as bad as it gets, then each at a time of its own.

- answers: the share of all frames that came back, of all sessions and of the one with the fewest
- memory: the highest resident size of gateways and replica meanwhile, over that before the first session
- cores: CPU time of gateways and replica per second, and of the clients beside them; stolen is the share of
  the machine that its host gave to others
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop

from benchmarks.caller import Caller, framed
from benchmarks.live import service
from benchmarks.machine import cpu_seconds, machine, publish, stolen_seconds
from personaplex.audio.ogg import OggMuxer
from personaplex.audio.opus import PACKET_SAMPLES, OpusEncoder
from personaplex.audio.transcoder import Transcoder
from personaplex.config import BURST_S, FRAME_SECONDS, SAMPLE_RATE

RECORDING = Path(__file__).parent.parent / "tests" / "data" / "mic.ogg"
PAGE_S = 5.0
RUNS = ((FRAME_SECONDS, False), (PAGE_S, True), (PAGE_S, False))  # length of a page; all at once?
TITLES = {"gateway": ":gateway", "replica": ":replica"}
EVERY_S = 0.25  # between two looks at memory


@dataclass(frozen=True)
class PagedSpeech:
    """Framed headers and pages of speech in packets of 20 ms, and how many frames a service makes of it."""

    headers: list[bytes]
    pages: list[bytes]
    frames: int

    @classmethod
    def make(cls, page_s: float, seconds: float) -> PagedSpeech:
        speech = np.concatenate(Transcoder().receive(RECORDING.read_bytes()))
        pcm = np.resize(speech, round(seconds * SAMPLE_RATE))
        encoder, muxer = OpusEncoder(), OggMuxer(1)
        packets = [encoder.encode(part) for part in pcm.reshape(-1, PACKET_SAMPLES)]
        count = round(page_s * SAMPLE_RATE / PACKET_SAMPLES)
        headers = muxer.headers(2 * encoder.lookahead)
        pages = [muxer.page(packets[start : start + count], 0) for start in range(0, len(packets), count)]
        frames = len(Transcoder().receive(b"".join([*headers, *pages])))
        return cls(
            [framed(b"\1" + page) for page in headers], [framed(b"\1" + page) for page in pages], frames
        )


Watched = dict[str, list[psutil.Process]]


def processes(since: float) -> Watched:
    """Gateways and replica that were started after `since`, by the titles Serve gives them."""
    found: Watched = {name: [] for name in TITLES}
    for process in psutil.process_iter(["cmdline", "create_time"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("ray::ServeReplica:") and process.info["create_time"] >= since:
            for name, mark in TITLES.items():
                if mark in title:
                    found[name].append(process)
    return found


async def measure(
    url: str, sessions: int, stream: PagedSpeech, page_s: float, together: bool, watched: Watched
) -> dict[str, Any]:
    """One run."""
    pids = [process.pid for group in watched.values() for process in group]
    peak = resident(watched)
    callers = [Caller(url, stream.headers) for _ in range(sessions)]
    await asyncio.gather(*(caller.open() for caller in callers))
    began, clock = time.monotonic(), (cpu_seconds(pids), time.process_time(), stolen_seconds())
    talking = asyncio.gather(*(_talk(caller, stream.pages, page_s, together) for caller in callers))
    while not talking.done():
        await asyncio.wait([talking], timeout=EVERY_S)
        peak = {name: max(peak[name], size) for name, size in resident(watched).items()}
    took = time.monotonic() - began
    ends = (cpu_seconds(pids), time.process_time(), stolen_seconds())
    service_s, clients_s, stolen_s = (end - begin for begin, end in zip(clock, ends, strict=True))
    shares = [len(caller.heard) / stream.frames for caller in callers]
    return {
        "page_s": page_s,
        "together": together,
        "answers_share": round(statistics.fmean(shares), 4),
        "least_answers_share": round(min(shares), 4),
        **{f"{name}_mb": round(size / 1e6, 1) for name, size in peak.items()},
        "cores": round(service_s / took, 2),
        "clients_cores": round(clients_s / took, 2),
        "stolen_share": round(stolen_s / took / (os.cpu_count() or 1), 3),
    }


def resident(watched: Watched) -> dict[str, int]:
    """Bytes of memory, of gateways together and of the replica."""
    return {name: sum(process.memory_info().rss for process in group) for name, group in watched.items()}


async def _talk(caller: Caller, pages: Sequence[bytes], page_s: float, together: bool) -> None:
    """Sends each page when it is full, and stays until its answers have had their time."""
    phase = page_s if together else random.random() * page_s
    await caller.talk(pages, phase, page_s, listen_s=page_s + 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bursts", description=__doc__.split("\n")[0])
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--gateways", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/bursts.json"))
    options = parser.parse_args()
    began = time.time()
    settings = {"slots": options.sessions, "replica_num_cpus": 0.1, "gateway_num_cpus": 0.1}
    settings |= {"gateways_min": options.gateways, "gateways_max": options.gateways}
    with service("echo", settings) as base:
        time.sleep(3.0)  # HAProxy learns of the service
        url, runs = f"{base.replace('http', 'ws')}/api/chat", []
        watched = processes(began)
        idle = resident(watched)
        for page_s, together in RUNS:
            stream = PagedSpeech.make(page_s, options.seconds)
            run = uvloop.run(measure(url, options.sessions, stream, page_s, together, watched))
            for name, size in idle.items():
                run[f"{name}_mb"] = round(run[f"{name}_mb"] - size / 1e6, 1)
            grown = sum(run[f"{name}_mb"] for name in idle)
            run["kb_per_session"] = round(1e3 * grown / options.sessions)
            print(json.dumps(run), flush=True)
            runs.append(run)
            time.sleep(2.0)
    result = {"benchmark": "bursts", "machine": machine("ray"), "sessions": options.sessions}
    publish(result | {"gateways": options.gateways, "burst_s": BURST_S, "runs": runs}, options.output)


if __name__ == "__main__":
    main()
