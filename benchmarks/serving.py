"""What the service adds to the engine: delay and CPU, beside the floor, in one run.

    python -m benchmarks.serving [--sessions 1 16 64] [--seconds 20] [--rounds 1] [--gateways 1] [--output F]
    python -m benchmarks.serving --protocol live realtime twilio ...   # each beside /api/chat, no floor

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
- over chat, with --protocol: the median of the rounds' differences in delay to /api/chat, which takes turns
  with the others, and how many sessions fill a core with their share of the gateway
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from benchmarks.caller import Caller
from benchmarks.dialects import Stream, chat_stream, sound, speech
from benchmarks.dialects import stream as stream_of
from benchmarks.machine import cpu_seconds, machine, publish, stolen_seconds
from loadtest.listener import Listener
from loadtest.protocols import PROTOCOLS
from loadtest.webhook import Webhook
from personaplex.config import FRAME_SECONDS

WARM_UP_S = 2.0  # of each run, not counted
GIVEN_BACK_S = (
    12.0  # the same beside chat: a late start's delay is given back by then, in speech without pauses
)
SLOTS = 64
PERCENTILES = (50, 95, 99)
RESULTS = Path("benchmarks/results")
PUBLIC_URL, TOKEN = "https://talk.example.org", "0123456789abcdef0123456789abcdef"
SERVED = ("live", "realtime", "twilio", "telnyx", "asterisk")


def _caller(url: str, stream: Stream) -> Caller:
    headers, opening = stream.opening(url)
    return Caller(url, opening, headers=headers, hear=stream.hear(), settle_s=stream.settle_s)


async def _calls(
    url: str,
    count: int,
    stream: Stream,
    processes: Sequence[int],
    gateways: Sequence[int],
    warm_up_s: float,
) -> tuple[list[Caller], list[float]]:
    """All calls at once, and the CPU seconds that `processes`, `gateways`, this process and the machine's
    hypervisor used while they talked after the warm-up."""

    def used() -> tuple[float, ...]:
        return cpu_seconds(processes), cpu_seconds(gateways), time.process_time(), stolen_seconds()

    callers = [_caller(url, stream) for _ in range(count)]
    await asyncio.gather(*(caller.open() for caller in callers))
    period_s = FRAME_SECONDS / stream.per_frame
    talking = [
        asyncio.ensure_future(caller.talk(stream.messages, random.random() * FRAME_SECONDS, period_s))
        for caller in callers
    ]
    await asyncio.sleep(warm_up_s)
    before = used()
    await asyncio.sleep(len(stream.messages) * period_s - warm_up_s)
    after = used()
    await asyncio.gather(*talking)
    return callers, [end - begin for begin, end in zip(before, after, strict=True)]


def measure(
    url: str,
    count: int,
    stream: Stream,
    processes: Sequence[int],
    gateways: Sequence[int] = (),
    warm_up_s: float = WARM_UP_S,
) -> dict[str, float]:
    """One run of `count` sessions; the keys say their units. `gateways`: those of `processes` that are."""
    run = _calls(url, count, stream, processes, gateways, warm_up_s)
    calls, (cpu, gateway, clients, stolen) = uvloop.run(run)
    first = round(warm_up_s / FRAME_SECONDS)
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
    seconds = len(stream.messages) / stream.per_frame * FRAME_SECONDS - warm_up_s
    result = {f"delay_p{p}_ms": round(1_000 * float(np.percentile(delays, p)), 2) for p in PERCENTILES}
    missing = expected - len(delays)
    late = sum(delay > FRAME_SECONDS for delay in delays)
    result["on_time_share"] = round(1 - (late + missing) / expected, 5)
    result["heard_on_time_share"] = round(1 - (gaps + missing) / expected, 5)
    result["cpu_ms_per_session_second"] = round(1_000 * cpu / (count * seconds), 2)
    if gateways:
        result["gateway_cpu_ms_per_session_second"] = round(1_000 * gateway / (count * seconds), 2)
    result["clients_cpu_ms_per_session_second"] = round(1_000 * clients / (count * seconds), 2)
    result["stolen_share"] = round(stolen / (seconds * (os.cpu_count() or 1)), 3)
    return result


def _processes(app: str, *kinds: str) -> list[int]:
    """Gateways and replicas of an application, by the titles Serve gives them."""
    found = []
    titles = tuple(f"ray::ServeReplica:{app}:{kind}" for kind in kinds or ("gateway", "replica"))
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            title = (entry / "cmdline").read_bytes().decode(errors="replace")
            if title.startswith(titles):
                found.append(int(entry.name))
    return found


@contextlib.contextmanager
def _cluster(gateways: int, floor: bool, more: Mapping[str, Any]) -> Iterator[int]:
    """Ray and Serve behind HAProxy with the service, with `more` settings, and where asked for the floor; the
    port clients connect to."""
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
        **more,
    }
    settings = Settings(**chosen)
    serve.run(build(settings), name="service", route_prefix="/service")
    if floor:
        serve.run(build_floor(settings), name="floor", route_prefix="/floor")
    time.sleep(3)  # for HAProxy to know both
    try:
        yield port
    finally:
        serve.shutdown()
        ray.shutdown()


def _beside_the_floor(options: argparse.Namespace) -> dict[str, Any]:
    """Each number of sessions: both applications and their ratios."""
    stream, runs = chat_stream(speech(options.seconds)), dict[str, Any]()
    with _cluster(options.gateways, floor=True, more={}) as port:
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
    return runs


def _beside_chat(options: argparse.Namespace) -> dict[str, Any]:
    """Each number of sessions: chat and the protocols by turns, and what each adds to chat."""
    frames, runs = sound(options.seconds), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        token = Path(folder) / "twilio"
        token.touch(0o600)
        token.write_text(TOKEN + "\n")
        webhook = Webhook(PUBLIC_URL, TOKEN)
        more = {"protocols": SERVED, "public_url": PUBLIC_URL, "twilio_token_file": token}
        streams = {name: stream_of(name, frames, webhook) for name in ("chat", *options.protocol)}
        with _cluster(options.gateways, floor=False, more=more) as port:
            processes, gateways = _processes("service"), _processes("service", "gateway")
            for count in (count for count in options.sessions for _ in range(options.rounds)):
                for name, stream in streams.items():
                    url = f"ws://127.0.0.1:{port}/service{stream.path}"
                    run = measure(url, count, stream, processes, gateways, GIVEN_BACK_S)
                    print(f"{count:4d} sessions {name:13s} {json.dumps(run)}", flush=True)
                    runs.setdefault(str(count), {}).setdefault(name, []).append(run)
    return {count: _over_chat(of, streams) for count, of in runs.items()}


def _over_chat(runs: dict[str, list[dict[str, float]]], streams: dict[str, Stream]) -> dict[str, Any]:
    """Of one number of sessions: medians of the rounds, and of each round's difference to its own chat."""
    result: dict[str, Any] = {}
    for name, rounds in runs.items():
        one = {key: round(statistics.median(run[key] for run in rounds), 5) for key in rounds[0]}
        added = [
            run["delay_p50_ms"] - chat["delay_p50_ms"] for run, chat in zip(rounds, runs["chat"], strict=True)
        ]
        key = "gateway_cpu_ms_per_session_second"
        times = [run[key] / chat[key] for run, chat in zip(rounds, runs["chat"], strict=True)]
        one["delay_p50_over_chat_ms"] = round(statistics.median(added), 2)
        one["format_delay_ms"] = round(1_000 * streams[name].delay_s, 1)
        one["gateway_cpu_times_chat"] = round(statistics.median(times), 2)
        one["sessions_per_gateway_core"] = round(1_000 / one[key])
        result[name] = one
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n")[0])
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=1, help="of each number of sessions")
    parser.add_argument("--gateways", type=int, default=1, help="of the service, and of the floor")
    others = [name for name in PROTOCOLS if name != "chat"]
    parser.add_argument("--protocol", nargs="+", choices=others, default=[], help="beside chat, no floor")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/serving.json, -protocols.json"
    )
    options = parser.parse_args()
    least_s = GIVEN_BACK_S if options.protocol else WARM_UP_S
    if options.seconds <= least_s:
        parser.error(f"--seconds: more than {least_s:g}, which are not counted")
    name = "serving-protocols" if options.protocol else "serving"
    runs = _beside_chat(options) if options.protocol else _beside_the_floor(options)
    result = {"benchmark": name, "machine": machine("ray", "uvloop", "websockets")}
    result |= {"gateways": options.gateways, "sessions": runs}
    publish(result, options.output or RESULTS / f"{name}.json")


if __name__ == "__main__":
    main()
