"""How many sessions one process of the load test drives on one core, and how punctual it stays.

    python -m benchmarks.driver [--sessions 100] [--seconds 30] [--output benchmarks/results/driver.json]

The server does nothing but send one page every 80 ms to each session, in a process of its own. The load test
is Locust as people run it, headless, in one process; CPU time is that process's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from benchmarks.machine import machine, publish
from loadtest.speech import DEFAULT, Speech, new_stream
from personaplex.config import FRAME_SECONDS
from personaplex.session.moshi import Audio, Handshake, Message, Metadata, encode

LOCUSTFILE = Path(__file__).parent.parent / "loadtest" / "locustfile.py"
RAMP_S = 5.0
KEPT = ("good_share", "sent_late_share", "interval_p50_ms", "interval_p99_ms")


async def _talk(socket: ServerConnection, speech: Speech) -> None:
    """One session as a service would hold it, without listening to what is said."""
    muxer = new_stream()
    pages = speech.pages(muxer, start=0)
    try:
        head: list[Message] = [Metadata({"type": "session"}), Handshake(), *map(Audio, speech.headers(muxer))]
        for message in head:
            await socket.send(encode(message))
        due = time.monotonic()
        while True:
            due += FRAME_SECONDS
            await asyncio.sleep(due - time.monotonic())
            await socket.send(encode(Audio(next(pages))))
    except ConnectionClosed:
        pass


async def _serve(ready: Connection) -> None:
    speech = Speech.load([DEFAULT])

    async def handle(socket: ServerConnection) -> None:
        talking = asyncio.create_task(_talk(socket, speech))
        try:
            async for _ in socket:
                pass
        finally:
            talking.cancel()

    async with serve(handle, "127.0.0.1", 0, compression=None, max_queue=None) as server:
        ready.send(server.sockets[0].getsockname()[1])
        await asyncio.get_running_loop().create_future()


def _server(ready: Connection) -> None:
    asyncio.run(_serve(ready))


def measure(sessions: int, seconds: float) -> dict[str, Any]:
    here, there = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=_server, args=(there,), daemon=True)
    server.start()
    try:
        port = here.recv()
        with tempfile.TemporaryDirectory() as folder:
            stem = Path(folder) / "driver"
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [
                *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless"),
                *("--host", f"ws://127.0.0.1:{port}", "--output", str(stem)),
                *("--arrivals", f"{RAMP_S}@{sessions / RAMP_S}", "--lengths", f"fixed:{seconds}"),
            ]
            command.append("--require")  # nothing: the figures are the result
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            figures = json.loads(stem.with_suffix(".json").read_text())["summary"]
    finally:
        server.terminate()
        server.join()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    per_second = 1e3 * cpu / (figures["session_hours"] * 3_600)
    return {
        "sessions": figures["offered"],
        "cpu_ms_per_session_second": round(per_second, 3),
        "sessions_per_core": round(1e3 / per_second),
        **{name: figures[name] for name in KEPT},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sessions", type=int, default=100, help="about so many at once")
    parser.add_argument("--seconds", type=float, default=30.0, help="each")
    parser.add_argument("--output", type=Path, help="write the result here as JSON")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    result = {"benchmark": "driver", "machine": machine(), "load_before": load}
    result |= measure(options.sessions, options.seconds)
    publish(result, options.output)


if __name__ == "__main__":
    main()
