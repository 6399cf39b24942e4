"""The telephone with Pipecat as the foreign end: part of `make test-clients`.

No carrier can be reached from a test, and Pipecat's serializers are the server's side of the protocol, not
the carrier's. So there are two steps. First the simulated carrier (carrier.py) calls a bot of Pipecat's: its
messages must be what a server written for the real carrier reads, and everything that server sends must be
what it takes. Then the same carrier calls this service, with Pipecat's code for the sound at its end.

A call to Pipecat passes when every byte came back as it was said, the digit was read, and the stream and its
parameters were. A call to us passes when at least nine tenths of the sound came back, like what Pipecat makes
of it without a service between; the carrier never had to hold more than BUFFERED_S; and we closed with 1000.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import requests
import websockets
from ports import free_port
from twilio.request_validator import RequestValidator

from clients import carrier
from clients.soundcard import Pcm
from personaplex.audio.g711 import A_LAW, MU_LAW

HERE = Path(__file__).parent
ACCOUNT = "0123456789abcdef0123456789abcdef"
PUBLIC = "https://talk.example.org"
CALLS = (("twilio", "PCMU"), ("telnyx", "PCMU"), ("telnyx", "PCMA"))
LIKE = 0.95  # of sound that was filtered twice more
WHOLE = 0.9
BUFFERED_S = 0.5
PARAMETERS = {"from_number": "+14155550100"}


@dataclasses.dataclass(frozen=True)
class Verdict:
    dialect: str
    encoding: str
    version: str
    what: str
    heard_s: float
    like: float
    buffered_s: float
    error: str = ""

    @property
    def passed(self) -> bool:
        return not self.error


def settings(folder: Path) -> dict[str, Any]:
    """Of a service that takes the calls."""
    token = folder / "twilio"
    token.write_text(ACCOUNT + "\n")
    token.chmod(0o600)
    return {"public_url": PUBLIC, "twilio_token_file": str(token)}


def verdicts(python: Path, base: str, speech: Path) -> list[Verdict]:
    """`python` is Pipecat's, `base` HOST:PORT of a service that says back what it hears, `speech` float32."""
    found = []
    for dialect, encoding in CALLS:
        with tempfile.TemporaryDirectory() as folder:
            found.append(_attempt(_to_pipecat, python, dialect, encoding, Path(folder), speech))
            found.append(_attempt(_to_us, python, dialect, encoding, Path(folder), speech, base))
    return found


def _attempt(run: Any, python: Path, dialect: str, encoding: str, *rest: Any) -> Verdict:
    try:
        return run(python, dialect, encoding, *rest)
    except Exception as error:  # a client's failure is a result
        words = str(error).strip().splitlines() or [type(error).__name__]
        return Verdict(dialect, encoding, "?", run.__doc__, 0.0, 0.0, 0.0, words[-1][:200])


def _to_pipecat(python: Path, dialect: str, encoding: str, folder: Path, speech: Path) -> Verdict:
    """a bot of Pipecat's, called by the simulated carrier"""
    port, result = free_port(), folder / "served.json"
    law = MU_LAW if encoding == "PCMU" else A_LAW
    sound = law.encode(_telephone(np.fromfile(speech, np.float32)))
    command = [str(python), str(HERE / "phone.py"), "serve", dialect, str(port), str(result)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        call = asyncio.run(_call(f"ws://127.0.0.1:{port}/", dialect, encoding, sound, server))
        server.wait(20)
    finally:
        server.kill()
        _, words = server.communicate()
    if not result.exists():
        raise RuntimeError(words or "it did not end")
    told = json.loads(result.read_text())
    line = call.line
    wrong = [
        name
        for name, as_it_was in (
            ("the sound", sound in line.heard),
            ("the carrier", told["kind"] == dialect),
            ("the stream", told["stream"] == call.stream),
            ("the parameters", dialect != "twilio" or told["body"] == PARAMETERS),
            ("the digit", told["digits"] == "1"),
        )
        if not as_it_was
    ]
    heard_s = len(line.heard) / carrier.LINE_BYTES_PER_S
    error = f"{', '.join(wrong)} did not come through" if wrong else ""
    like = float(sound in line.heard)
    what = str(_to_pipecat.__doc__)
    return Verdict(dialect, encoding, told["version"], what, heard_s, like, line.buffered_s, error)


async def _call(
    url: str, dialect: str, encoding: str, sound: bytes, server: subprocess.Popen[str]
) -> carrier.Call:
    call = carrier.Call(carrier.DIALECTS[dialect], encoding)
    deadline = time.monotonic() + 60
    while True:
        try:
            socket = await websockets.connect(url)
            break
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)
    await carrier.talk(socket, call, carrier.pieces(sound), parameters=PARAMETERS, digits="1", stay_s=1.0)
    return call


def _to_us(python: Path, dialect: str, encoding: str, folder: Path, speech: Path, base: str) -> Verdict:
    """this service, called by the same carrier; sound coded and decoded by Pipecat"""
    url, headers, parameters = f"ws://{base}/telnyx/media", dict[str, str](), dict[str, str]()
    if dialect == "twilio":
        url, (headers, parameters) = f"ws://{base}/twilio/media", ring(base)
    result = folder / "called.json"
    words = ["call", dialect, encoding, url, json.dumps(headers), json.dumps(parameters)]
    command = [str(python), str(HERE / "phone.py"), *words, str(speech), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if not result.exists():
        raise RuntimeError(done.stderr or "no result")
    told = json.loads(result.read_text())
    said_s = len(np.fromfile(speech, np.float32)) / 24_000
    wrong = [
        words
        for words, right in (
            (f"likeness under {LIKE:g}", told["like"] >= LIKE),
            ("not all of it was heard", told["heard_s"] >= WHOLE * said_s),
            (f"the carrier had to hold more than {BUFFERED_S:g} s", told["buffered_s"] <= BUFFERED_S),
            (f"closed with {told['code']}", told["code"] == 1000),
        )
        if not right
    ]
    figures = told["heard_s"], told["like"], told["buffered_s"]
    return Verdict(dialect, encoding, told["version"], str(_to_us.__doc__), *figures, ", ".join(wrong))


def webhook(base: str, query: str = "", account: str = ACCOUNT) -> requests.Response:
    """Calls the number's webhook as Twilio does, signed by Twilio's own library."""
    fields = {"CallSid": "CA1", "From": "+14155550100"}
    signature = RequestValidator(account).compute_signature(f"{PUBLIC}/twilio/voice{query}", fields)
    url = f"http://{base}/twilio/voice{query}"
    return requests.post(url, data=fields, headers={"X-Twilio-Signature": signature}, timeout=10)


def ring(base: str, query: str = "") -> tuple[dict[str, str], dict[str, str]]:
    """The headers and the parameters of the stream that the webhook tells Twilio to open."""
    answer = webhook(base, query)
    answer.raise_for_status()
    assert answer.headers["content-type"].startswith("text/xml")
    (stream,) = ElementTree.fromstring(answer.text).iter("Stream")
    url = stream.attrib["url"]
    assert url == f"{PUBLIC.replace('https', 'wss')}/twilio/media"
    parameters = {one.attrib["name"]: one.attrib["value"] for one in stream}
    return {"X-Twilio-Signature": RequestValidator(ACCOUNT).compute_signature(url, {})}, parameters


def _telephone(pcm: Pcm) -> Any:
    """int16 at 8 kHz. Every third sample of a running mean: crude, and enough for sound that is compared
    with itself."""
    mean = np.convolve(pcm, np.full(5, 0.2, np.float32), "same")[::3]
    return np.clip(np.rint(mean * 32_767), -32_768, 32_767).astype(np.int16)


def table(found: list[Verdict]) -> str:
    lines = [
        "| carrier | codec | version | what was called | heard | likeness | held at the carrier | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in found:
        result = "passes" if one.passed else f"**fails**: {one.error}"
        figures = f"{one.heard_s:.1f} s | {one.like:.2f} | {1_000 * one.buffered_s:.0f} ms"
        lines.append(
            f"| {one.dialect} | {one.encoding} | {one.version} | {one.what} | {figures} | {result} |"
        )
    return "\n".join(lines)
