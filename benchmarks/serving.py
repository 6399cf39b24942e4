"""What the service adds to the engine: delay and CPU, beside the floor, in one run.

    python -m benchmarks.serving [--sessions 1 16 64] [--seconds 20] [--rounds 1] [--gateways 1] [--output F]

The engine does no maths (`echo`), so only the serving path is measured. The floor is the same conversation
with the engine inside the gateway's process (`floor.py`): no replica, no lease, no media link. Both stand
behind Serve's HAProxy on one machine, which the clients share; they take turns. Clients send one page of
80 ms speech every 80 ms, each at a phase of its own.

- delay: from sending the page that completes a user frame to receiving the page that answers it, with pacing
- on time: the answer arrives before the next one is due (80 ms); after a stall of the machine a session stays
  behind until its pacer has given the delay back
- heard on time: the answer arrives before a stock player, which holds 20 ms beside what it plays, has run dry
- CPU: of gateway and replica processes, per session and second; the ingress is not counted, the clients are
  beside it
- stolen: the share of the machine's CPU time that its host gave to others meanwhile: what makes a virtual
  machine stand still for tens of milliseconds. Of several rounds the one with the least of it counts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.caller import Caller, framed
from benchmarks.machine import cpu_seconds, machine, publish, stolen_seconds
from loadtest.listener import Listener
from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SECONDS, FRAME_SIZE

WARM_UP_S = 2.0  # of each run, not counted
SLOTS = 64
PERCENTILES = (50, 95, 99)
RECORDING = Path(__file__).parent.parent / "tests" / "data" / "mic.ogg"


@dataclass
class Stream:
    """Speech as pages of one frame, encoded once. `completes[n]` is the page that completes frame n."""

    pages: list[bytes]
    headers: list[bytes]
    completes: list[int] = field(default_factory=list)

    @classmethod
    def make(cls, seconds: float) -> Stream:
        speech = np.concatenate(Transcoder().receive(RECORDING.read_bytes()))
        encoder, decoder = Transcoder(), Transcoder()
        headers = encoder.headers()
        decoder.receive(b"".join(headers))
        count = round(seconds / FRAME_SECONDS)
        frames = np.resize(speech, count * FRAME_SIZE).reshape(count, FRAME_SIZE)
        stream = cls([encoder.send(frame) for frame in frames], headers)
        for number, page in enumerate(stream.pages):
            stream.completes += [number] * len(decoder.receive(page))
        return stream


async def _calls(
    url: str, count: int, stream: Stream, processes: Sequence[int]
) -> tuple[list[Caller], list[float]]:
    """All calls at once, and the CPU seconds that `processes`, this process and the machine's hypervisor used
    while they talked after the warm-up."""
    headers, pages = ([framed(b"\x01" + page) for page in some] for some in (stream.headers, stream.pages))
    callers = [Caller(url, headers) for _ in range(count)]
    await asyncio.gather(*(caller.open() for caller in callers))
    talking = [
        asyncio.ensure_future(caller.talk(pages, random.random() * FRAME_SECONDS, FRAME_SECONDS))
        for caller in callers
    ]
    await asyncio.sleep(WARM_UP_S)
    before = (cpu_seconds(processes), time.process_time(), stolen_seconds())
    await asyncio.sleep(len(pages) * FRAME_SECONDS - WARM_UP_S)
    after = (cpu_seconds(processes), time.process_time(), stolen_seconds())
    await asyncio.gather(*talking)
    return callers, [end - begin for begin, end in zip(before, after, strict=True)]


def measure(url: str, count: int, stream: Stream, processes: Sequence[int]) -> dict[str, float]:
    """One run of `count` sessions; the keys say their units."""
    calls, (cpu, clients, stolen) = uvloop.run(_calls(url, count, stream, processes))
    first = round(WARM_UP_S / FRAME_SECONDS)
    delays, expected, gaps = [], 0, 0
    for call in calls:
        listener = Listener()
        for number in sorted(call.heard):
            if number >= first:
                listener.hear(call.heard[number])
        gaps += listener.underruns
        for number, page in enumerate(stream.completes[first:], start=first):
            expected += 1
            if number in call.heard:
                delays.append(call.heard[number] - call.sent[page])
    seconds = len(stream.pages) * FRAME_SECONDS - WARM_UP_S
    result = {f"delay_p{p}_ms": round(1_000 * float(np.percentile(delays, p)), 2) for p in PERCENTILES}
    missing = expected - len(delays)
    late = sum(delay > FRAME_SECONDS for delay in delays)
    result["on_time_share"] = round(1 - (late + missing) / expected, 5)
    result["heard_on_time_share"] = round(1 - (gaps + missing) / expected, 5)
    result["cpu_ms_per_session_second"] = round(1_000 * cpu / (count * seconds), 2)
    result["clients_cpu_ms_per_session_second"] = round(1_000 * clients / (count * seconds), 2)
    result["stolen_share"] = round(stolen / (seconds * (os.cpu_count() or 1)), 3)
    return result


def _processes(app: str) -> list[int]:
    """Gateways and replicas of an application, by the titles Serve gives them."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            title = (entry / "cmdline").read_bytes().decode(errors="replace")
            if title.startswith((f"ray::ServeReplica:{app}:gateway", f"ray::ServeReplica:{app}:replica")):
                found.append(int(entry.name))
    return found


@contextlib.contextmanager
def _cluster(gateways: int) -> Iterator[int]:
    """Ray and Serve behind HAProxy with both applications; the port clients connect to."""
    from deployments import haproxy
    from deployments.command import ENVIRONMENT

    port, metrics_port, stats_port = haproxy.free_ports(3)
    os.environ.update(
        ENVIRONMENT,
        RAY_SERVE_ENABLE_HA_PROXY="1",
        RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="1",  # at the end, nobody is left to wait for
        RAY_SERVE_HAPROXY_BINARY_PATH=str(Path(sysconfig.get_path("scripts")) / haproxy.COMMAND),
        RAY_SERVE_HAPROXY_METRICS_PORT=str(metrics_port),  # fixed ones otherwise
        RAY_SERVE_HAPROXY_STATS_PORT=str(stats_port),
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=secrets.token_hex(32),
    )
    import ray
    from ray import serve

    from benchmarks.floor import build_floor
    from deployments import build
    from deployments.settings import Settings

    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
    chosen: dict[str, Any] = {
        "model": "echo",
        "slots": SLOTS,
        "replica_num_cpus": 0.1,
        "gateways_min": gateways,
        "gateways_max": gateways,
        "gateway_num_cpus": 0.1,
        "session_limit_s": 300,
    }
    settings = Settings(**chosen)
    serve.run(build(settings), name="service", route_prefix="/service")
    serve.run(build_floor(settings), name="floor", route_prefix="/floor")
    time.sleep(3)  # for HAProxy to know both
    try:
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n")[0])
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=1, help="of each number of sessions")
    parser.add_argument("--gateways", type=int, default=1, help="of the service, and of the floor")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/serving.json"))
    options = parser.parse_args()
    stream = Stream.make(options.seconds)
    runs: dict[str, Any] = {}
    with _cluster(options.gateways) as port:
        for count in (count for count in options.sessions for _ in range(options.rounds)):
            for app in ("floor", "service"):
                url = f"ws://127.0.0.1:{port}/{app}/api/chat"
                run = measure(url, count, stream, _processes(app))
                print(f"{count:4d} sessions {app:8s} {json.dumps(run)}", flush=True)
                kept = runs.setdefault(str(count), {}).setdefault(app, run)
                if run["stolen_share"] < kept["stolen_share"]:
                    runs[str(count)][app] = run
    for count, run in runs.items():
        for key in ("delay_p50_ms", "cpu_ms_per_session_second"):
            run[f"{key}_times_floor"] = round(run["service"][key] / run["floor"][key], 2)
        print(f"{count:>4s} sessions", {key: value for key, value in run.items() if "times" in key})
    result = {
        "benchmark": "serving",
        "machine": machine("ray", "uvloop", "websockets"),
        "gateways": options.gateways,
        "sessions": runs,
    }
    publish(result, options.output)


if __name__ == "__main__":
    main()
