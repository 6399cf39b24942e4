"""What the media link's authentication and TLS cost a gateway: `python -m benchmarks.link [--output FILE]`.

Two processes, as on one machine: a gateway's end of SESSIONS links and a replica's, which answers every frame
with a reply of the real size. Each session sends a frame every 80 ms. Measured are the gateway's CPU over
that time and the way of a frame there and back; and, apart, what it takes to open a link. With and without
TLS alternate, round by round, in the same run; a ratio is of the medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import machine, publish
from deployments.wire import messages
from deployments.wire.handshake import GatewayHandshake, Keyring, ReplicaHandshake
from deployments.wire.link import Link, connect, listen
from deployments.wire.messages import MessageKind
from deployments.wire.tls import gateway_context, replica_context
from personaplex.config import FRAME_SECONDS, FRAME_SIZE

SESSIONS = 64  # what one gateway holds
OPENED = 100  # links, one after the other
SECRET = bytes(range(32))
END: dict[str, Any] = {"outbox": 75, "stall_s": 10.0}


def replica(pipe: Connection, secure: bool) -> None:
    """The replica's process: says its port and answers frames until it is told to end."""
    pcm = np.random.default_rng(0).standard_normal(FRAME_SIZE).astype(np.float32)
    tokens = np.arange(17)

    def answer(link: Link, kind: MessageKind, payload: bytes) -> None:
        if kind is MessageKind.FRAME:
            timestamp, _ = messages.unpack_frame(payload)
            reply = messages.Reply(0, pcm, tokens, "", timestamp)
            link.send_frame(MessageKind.REPLY, messages.pack_reply(reply))

    async def serve() -> None:
        tls, certificate = replica_context(None) if secure else (None, b"")

        def make() -> Link:
            handshake = ReplicaHandshake(Keyring(SECRET), "r")
            return Link(answer, lambda _: None, handshake=handshake, certificate=certificate, **END)

        server, port = await listen(make, "127.0.0.1", tls=tls)
        pipe.send(port)
        await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        server.close()

    asyncio.run(serve())


async def talk(port: int, secure: bool, seconds: float) -> dict[str, float]:
    """SESSIONS sessions for `seconds`; the gateway's share of a core and the way of a frame."""
    took: list[float] = []

    def hear(link: Link, kind: MessageKind, payload: bytes) -> None:
        took.append((time.monotonic_ns() // 1_000 - messages.unpack_reply(payload).timestamp) % 2**32 / 1e3)

    links = [await _open(port, secure, hear) for _ in range(SESSIONS)]
    pcm = np.random.default_rng(1).standard_normal(FRAME_SIZE).astype(np.float32)

    async def speak(number: int, link: Link, began: float, count: int) -> None:
        for frame in range(count):
            due = began + FRAME_SECONDS * (frame + number / SESSIONS)
            await asyncio.sleep(due - time.monotonic())
            payload = messages.pack_frame(time.monotonic_ns() // 1_000 % 2**32, pcm)
            link.send_frame(MessageKind.FRAME, payload)

    began, cpu = time.monotonic(), time.process_time()
    count = round(seconds / FRAME_SECONDS)
    await asyncio.gather(*(speak(number, link, began, count) for number, link in enumerate(links)))
    used, passed = time.process_time() - cpu, time.monotonic() - began
    await asyncio.sleep(0.1)
    dropped = sum(link.dropped for link in links)
    for link in links:
        link.close()
    found = np.percentile(took, (50, 99))
    return {
        "core": used / passed,
        "frame_p50_ms": float(found[0]),
        "frame_p99_ms": float(found[1]),
        "unanswered": SESSIONS * count - len(took) + dropped,
    }


async def opening(port: int, secure: bool) -> dict[str, float]:
    """Milliseconds, and CPU milliseconds of the gateway, to open a link."""
    took, cpu = [], time.process_time()
    for _ in range(OPENED):
        began = time.monotonic()
        link = await _open(port, secure, lambda *_: None)
        took.append(1e3 * (time.monotonic() - began))
        link.close()
    return {
        "open_p50_ms": statistics.median(took),
        "open_cpu_ms": 1e3 * (time.process_time() - cpu) / OPENED,
    }


async def _open(port: int, secure: bool, hear: Any) -> Link:
    tls = gateway_context(None) if secure else None
    handshake = GatewayHandshake(Keyring(SECRET), "r")
    return await connect("127.0.0.1", port, hear, lambda _: None, handshake=handshake, tls=tls, **END)


def round_of(secure: bool, seconds: float) -> dict[str, float]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=replica, args=(there, secure))
    process.start()
    try:
        port = here.recv()

        async def both() -> dict[str, float]:
            return {**await opening(port, secure), **await talk(port, secure, seconds)}

        return asyncio.run(both())
    finally:
        here.send(None)
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    began = os.getloadavg()[0]
    rounds: dict[str, list[dict[str, float]]] = {"off": [], "own": []}
    for _ in range(options.rounds):
        for name, found in rounds.items():
            found.append(round_of(name == "own", options.seconds))
            print(name, json.dumps({key: round(value, 4) for key, value in found[-1].items()}), flush=True)
    medians = {
        name: {key: round(statistics.median(one[key] for one in found), 4) for key in found[0]}
        for name, found in rounds.items()
    }
    result = {
        "benchmark": "link",
        "machine": machine("numpy"),
        "sessions": SESSIONS,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "load_average": [round(began, 1), round(os.getloadavg()[0], 1)],  # of the machine, before and after
        "median": medians,
        "tls_core": round(medians["own"]["core"] - medians["off"]["core"], 4),
        "tls_frame_p50_ms": round(medians["own"]["frame_p50_ms"] - medians["off"]["frame_p50_ms"], 4),
        "each": rounds,
    }
    publish(result, options.output)


if __name__ == "__main__":
    main()
