"""Clients that others wrote, unmodified, against a real service on this machine: `make test-clients`.

Each gets an environment of its own under .cache/clients, made on first use; the service is
`python -m personaplex.server` with the engine that says back what it hears. A client passes when it hears its
own speech again. Agent frameworks (frameworks.py) and the telephone (telephone.py) have verdicts of their
own. The result, with versions, is written into docs/clients.md; with `--only NAME ...` it is printed alone.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import websockets

from benchmarks.live import service
from clients import frameworks, telephone
from clients.soundcard import FRAME_SECONDS, FRAME_SIZE, SAMPLE_RATE, Pcm, likeness
from personaplex.audio.transcoder import Transcoder

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache" / "clients"
DOCUMENT = ROOT / "docs" / "clients.md"
BEGIN, END = "<!-- written by make test-clients -->", "<!-- end -->"
BEGIN_FRAMEWORKS = "<!-- frameworks, written by make test-clients -->"
BEGIN_TELEPHONE = "<!-- telephone, written by make test-clients -->"
DECODER, TELEPHONE = "opus-recorder", "telephone"  # names beside those of CLIENTS and FRAMEWORKS
OPUS_RECORDER = "opus-recorder@8.0.5"

SAID_S = 6.0
LIKE = 0.6  # correlation of speech that went through Opus twice; of other speech it is under 0.3
WHOLE = 0.9  # of the time said, heard


@dataclasses.dataclass(frozen=True)
class Client:
    """`commands`: arguments of pip, one install each."""

    name: str
    what: str
    commands: tuple[tuple[str, ...], ...]


CLIENTS = (
    Client(
        "moshi",
        "Kyutai's Python client (`moshi.client`), with a sound card of ours",
        # Its model's dependencies are 3 GB that a client does not use.
        (("--no-deps", "moshi==0.2.13"), ("aiohttp>=3.10.5,<3.12", "numpy>=1.26,<2.3", "sphn>=0.2,<0.3")),
    ),
    Client("sphn", "a client made of Kyutai's Ogg and Opus", (("sphn", "websockets", "numpy"),)),
    Client("fujielab", "`MoshiClient` of its library", (("fujielab-moshi-client==0.1.2",),)),
    Client("livekit", "the plugin's realtime session", (("livekit-plugins-nvidia[personaplex]==1.8.9",),)),
)


@dataclasses.dataclass(frozen=True)
class Result:
    client: str
    version: str
    what: str
    like: float
    heard_s: float
    error: str = ""

    @property
    def passed(self) -> bool:
        return self.like >= LIKE and self.heard_s >= WHOLE * SAID_S


def environment(client: Client) -> Path:
    """The Python of the client's own environment; made when it is not there or was left half made."""
    folder = CACHE / client.name
    python, done = folder / "bin" / "python", folder / json.dumps(client.commands).replace("/", "_")[-80:]
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for words in client.commands:
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *words], check=True)
        done.touch()
    return python


def decoder_worker(*, fetch: bool) -> Path | None:
    """opus-recorder's decoder, from npm if it may be fetched; None where it or node is not to be had."""
    folder = CACHE / "npm"
    worker = folder / "node_modules" / "opus-recorder" / "dist" / "decoderWorker.min.js"
    if fetch and not worker.exists() and shutil.which("npm"):
        folder.mkdir(parents=True, exist_ok=True)
        install = ["npm", "install", "--silent", "--no-save", "--prefix", str(folder), OPUS_RECORDER]
        subprocess.run(install, check=False)
    return worker if worker.exists() and shutil.which("node") else None


def decoded(worker: Path, pages: list[bytes]) -> Pcm:
    """What NVIDIA's page plays of `pages`, float32 [samples] at 24 kHz."""
    data = b"".join(struct.pack("<I", len(page)) + page for page in pages)
    command = ["node", str(HERE / "decoder.cjs"), str(worker)]
    done = subprocess.run(command, input=data, capture_output=True, check=True, timeout=60)
    return np.frombuffer(done.stdout, np.float32)


def call(client: Client, url: str, speech: Path) -> Result:
    """One conversation of `client`."""
    heard = speech.with_suffix(f".{client.name}")
    command = [str(environment(client)), str(HERE / "call.py"), client.name, url, str(speech), str(heard)]
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=bare)
    if done.returncode:
        return Result(client.name, "?", client.what, 0.0, 0.0, done.stderr.strip().splitlines()[-1])
    return judged(client.name, done.stdout.split()[-1], client.what, speech, np.fromfile(heard, np.float32))


def judged(name: str, version: str, what: str, speech: Path, heard: Pcm) -> Result:
    like = likeness(np.fromfile(speech, np.float32), heard) if len(heard) > SAMPLE_RATE else 0.0
    return Result(name, version, what, round(like, 2), round(len(heard) / SAMPLE_RATE, 2))


async def record(url: str, said: Pcm) -> list[bytes]:
    """Payloads of the audio messages that answer `said`, headers first."""
    sender, pages = Transcoder(), list[bytes]()

    async def listen(socket: Any) -> None:
        async for message in socket:
            if message[0] == 1:
                pages.append(message[1:])

    async with websockets.connect(url) as socket:
        assert await socket.recv() == b"\x00"
        listening = asyncio.ensure_future(listen(socket))
        for page in sender.headers():
            await socket.send(b"\x01" + page)
        began = time.monotonic()
        for number, frame in enumerate(said.reshape(-1, FRAME_SIZE)):
            await asyncio.sleep(max(0.0, began + number * FRAME_SECONDS - time.monotonic()))
            await socket.send(b"\x01" + sender.send(frame))
        await asyncio.sleep(1.0)
        await socket.close()
        await asyncio.gather(listening, return_exceptions=True)
    return pages


def page_decoder(url: str, speech: Path) -> Result:
    what = "the decoder worker that NVIDIA's page plays with, under node"
    worker = decoder_worker(fetch=True)
    if worker is None:
        return Result(DECODER, "?", what, 0.0, 0.0, "no node or no npm")
    version = json.loads((worker.parents[1] / "package.json").read_text())["version"]
    pages = asyncio.run(record(url, np.fromfile(speech, np.float32)))
    return judged(DECODER, version, what, speech, decoded(worker, pages))


def table(results: list[Result]) -> str:
    """The results as Markdown."""
    when = f"{datetime.date.today()}, Python {platform.python_version()}"
    rows = [
        f"Last run: {when}, {SAID_S:g} s of speech each.",
        "",
        "| client | version | what ran | heard | likeness | |",
        "|---|---|---|---|---|---|",
    ]
    for one in results:
        verdict = "passes" if one.passed else f"**fails** {one.error}"
        figures = f"{one.heard_s:.1f} s | {one.like:.2f}"
        rows.append(f"| {one.client} | {one.version} | {one.what} | {figures} | {verdict} |")
    return "\n".join(rows)


def publish(results: str, begin: str = BEGIN) -> None:
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(begin)
    DOCUMENT.write_text(f"{before}{begin}\n{results}\n{END}{rest.partition(END)[2]}")


def talks(names: list[str]) -> list[Result]:
    """Conversations of the clients of /api/chat with one service, all at once."""
    chosen = [one for one in CLIENTS if one.name in names]
    for client in chosen:
        environment(client)
    with tempfile.TemporaryDirectory() as folder, service("echo", {"slots": 8}) as base:
        speech = said(Path(folder))
        time.sleep(2.0)  # the proxy learns of the service
        url = f"{base.replace('http', 'ws')}/api/chat"
        with ThreadPoolExecutor() as pool:
            calls = [pool.submit(call, client, url, speech) for client in chosen]
            if DECODER in names:
                calls.append(pool.submit(page_decoder, url, speech))
            return [one.result() for one in calls]


def telephone_calls(_: list[str]) -> list[telephone.Verdict]:
    python = environment(Client("pipecat", "", (frameworks.PIPECAT,)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {"slots": 8, "protocols": "twilio,telnyx", **telephone.settings(folder)}
        with service("echo", settings) as base:
            time.sleep(2.0)
            return telephone.verdicts(python, base.removeprefix("http://"), said(folder))


def framework_sessions(names: list[str]) -> list[frameworks.Verdict]:
    return frameworks.verdicts(lambda name, packages: environment(Client(name, "", (packages,))), names)


def said(folder: Path) -> Path:
    """A file of SAID_S of speech."""
    frames = Transcoder().receive((ROOT / "tests" / "data" / "mic.ogg").read_bytes())
    speech = folder / "speech.f32"
    speech.write_bytes(np.concatenate(frames[: round(SAID_S / FRAME_SECONDS)]).tobytes())
    return speech


@dataclasses.dataclass(frozen=True)
class Part:
    """Of the document: the clients that `run` runs, whose verdicts `table` shows behind `begin`."""

    begin: str
    names: tuple[str, ...]
    run: Callable[[list[str]], list[Any]]
    table: Callable[[list[Any]], str]


PARTS = (
    Part(BEGIN, (*(one.name for one in CLIENTS), DECODER), talks, table),
    Part(
        BEGIN_FRAMEWORKS,
        tuple(one.name for one in frameworks.FRAMEWORKS),
        framework_sessions,
        frameworks.table,
    ),
    Part(BEGIN_TELEPHONE, (TELEPHONE,), telephone_calls, telephone.table),
)


def main() -> int:
    every = [name for part in PARTS for name in part.names]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decoder-only", action="store_true", help="only fetch opus-recorder, for make test")
    parser.add_argument("--only", nargs="+", choices=every, help="run these, and leave the document as it is")
    options = parser.parse_args()
    if options.decoder_only:
        decoder_worker(fetch=True)
        return 0
    passed = True
    for part in PARTS:
        names = [name for name in part.names if name in (options.only or every)]
        if not names:
            continue
        found = part.run(names)
        passed &= all(one.passed for one in found)
        print(part.table(found), end="\n\n", flush=True)
        if not options.only:
            publish(part.table(found), part.begin)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
