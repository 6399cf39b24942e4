"""A simulated telephone carrier: its side of Twilio's Media Streams and of Telnyx's dialect of them.

Sends what the carriers document and takes nothing else: a message that a carrier would refuse raises
CarrierError. What it is sent is played at the rate of the line, so `clear` drops what was not played yet and
a `mark` comes back once everything before it was.

No carrier was at hand to compare it with. What stands for one are Pipecat's parser and serializers, which
talk to the real ones: `make test-clients` has it call a server of Pipecat's before it calls ours. Runs in any
environment that has websockets.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import websockets

PIECE_S = 0.02
SILENCE = {"PCMU": b"\xff", "PCMA": b"\xd5"}
PIECE_BYTES = 160  # at 8 kHz, one byte a sample
LINE_BYTES_PER_S = 8_000


class CarrierError(Exception):
    """The server sent what no carrier takes."""


@dataclasses.dataclass(frozen=True)
class Dialect:
    """Names of a carrier's fields."""

    name: str
    stream: str
    sequence: str


TWILIO = Dialect("twilio", "streamSid", "sequenceNumber")
TELNYX = Dialect("telnyx", "stream_id", "sequence_number")
DIALECTS = {one.name: one for one in (TWILIO, TELNYX)}


class Line:
    """What the caller hears: pieces one after the other, in the time of `clock`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.messages: list[str] = []  # of media, as they came
        self.buffered_s = 0.0  # at the most
        self.cleared = 0
        self._clock, self._ends = clock, 0.0
        self._marks: list[tuple[float, str]] = []  # when each is due
        self._pieces: list[tuple[float, bytes]] = []  # when each begins

    @property
    def heard(self) -> bytes:
        return b"".join(data for _, data in self._pieces)

    def play(self, data: bytes) -> None:
        now = self._clock()
        begins = max(now, self._ends)
        self._ends = begins + len(data) / LINE_BYTES_PER_S
        self._pieces.append((begins, data))
        self.buffered_s = max(self.buffered_s, self._ends - now)

    def mark(self, name: str) -> None:
        self._marks.append((max(self._clock(), self._ends), name))

    def clear(self) -> None:
        """Drops what was not begun; marks behind it are due."""
        now = self._clock()
        self.cleared += 1
        self._pieces = [piece for piece in self._pieces if piece[0] <= now]
        self._marks = [(min(now, due), name) for due, name in self._marks]
        self._ends = now

    def due_marks(self) -> list[str]:
        now = self._clock()
        due = [name for at, name in self._marks if at <= now]
        self._marks = [mark for mark in self._marks if mark[0] > now]
        return due


class Call:
    """One call's messages. `encoding`: PCMU, or PCMA, which Twilio does not have."""

    def __init__(self, dialect: Dialect, encoding: str = "PCMU", line: Line | None = None) -> None:
        self.line = line or Line()
        self.stream = "MZ00000000000000000000000000000001"
        self._dialect, self._encoding = dialect, encoding
        self._sequence = 0
        self._chunk = 1  # of the next piece

    # To the server

    def connected(self) -> str:
        return json.dumps({"event": "connected", "protocol": "Call", "version": "1.0.0"})

    def start(self, parameters: Mapping[str, str] = {}) -> str:
        if self._dialect is TWILIO:
            form: dict[str, Any] = {"encoding": "audio/x-mulaw", "sampleRate": 8_000, "channels": 1}
            ids = {"streamSid": self.stream, "accountSid": "AC1", "callSid": "CA1", "tracks": ["inbound"]}
            fields = {**ids, "mediaFormat": form, "customParameters": dict(parameters)}
        else:
            form = {"encoding": self._encoding, "sample_rate": 8_000, "channels": 1}
            ids = {"user_id": "u1", "call_control_id": "v3:c1", "from": "+14155550100", "to": "+14155550101"}
            fields = {**ids, "media_format": form, "custom_parameters": dict(parameters)}
        return self._numbered("start", start=fields)

    def media(self, data: bytes, number: int | None = None) -> str:
        """The caller's next 20 ms, or piece `number`."""
        chunk = self._chunk if number is None else number
        self._chunk = chunk + 1
        stamp = round(1_000 * PIECE_S) * (chunk - 1)
        piece = {"track": "inbound", "chunk": str(chunk), "timestamp": str(stamp)}
        return self._numbered("media", media={**piece, "payload": base64.b64encode(data).decode()})

    def silence(self) -> str:
        return self.media(SILENCE[self._encoding] * PIECE_BYTES)

    def dtmf(self, digit: str) -> str:
        return self._numbered("dtmf", dtmf={"track": "inbound_track", "digit": digit})

    def mark(self, name: str) -> str:
        return self._numbered("mark", mark={"name": name})

    def stop(self) -> str:
        return self._numbered("stop", stop={"accountSid": "AC1", "callSid": "CA1"})

    def _numbered(self, event: str, **fields: Any) -> str:
        self._sequence += 1
        names = {self._dialect.sequence: str(self._sequence), self._dialect.stream: self.stream}
        return json.dumps({"event": event, **names, **fields})

    # From the server

    def take(self, message: str | bytes) -> None:
        """Plays or obeys one message. Raises CarrierError for one that no carrier takes."""
        if isinstance(message, bytes):
            raise CarrierError("a binary message")
        try:
            event = json.loads(message)
        except ValueError as error:
            raise CarrierError(f"no JSON: {message[:80]!r}") from error
        kind = event.pop("event", None)
        if self._dialect is TWILIO and event.pop("streamSid", None) != self.stream:
            raise CarrierError(f"{kind} of another stream")
        if kind == "media":
            self.line.play(_payload(event))
            self.line.messages.append(message)
        elif kind == "mark" and set(event) == {"mark"} and set(event["mark"]) == {"name"}:
            self.line.mark(event["mark"]["name"])
        elif kind == "clear" and not event:
            self.line.clear()
        else:
            raise CarrierError(f"{kind} with {sorted(event)}")


def _payload(event: Mapping[str, Any]) -> bytes:
    media = event.get("media")
    if set(event) != {"media"} or not isinstance(media, dict) or set(media) != {"payload"}:
        raise CarrierError(f"media with {sorted(event)}, {media}")
    try:
        data = base64.b64decode(media["payload"], validate=True)
    except (TypeError, ValueError) as error:
        raise CarrierError(f"a payload that is not base64: {media['payload']!r:.80}") from error
    if not data:
        raise CarrierError("media without sound")
    return data


def pieces(sound: bytes) -> list[bytes]:
    """Of 20 ms each; the last may be shorter."""
    return [sound[at : at + PIECE_BYTES] for at in range(0, len(sound), PIECE_BYTES)]


async def talk(
    socket: websockets.ClientConnection,
    call: Call,
    said: Sequence[bytes],
    *,
    parameters: Mapping[str, str] = {},
    digits: str = "",
    stay_s: float = 0.5,
) -> None:
    """Says the pieces in real time, presses `digits` meanwhile, is silent for `stay_s` and hangs up. Returns
    early when the server does. Raises CarrierError as `take` does."""
    await socket.send(call.connected())
    await socket.send(call.start(parameters))
    listening = asyncio.ensure_future(_listen(socket, call))
    began = time.monotonic()
    try:
        for number in range(len(said) + round(stay_s / PIECE_S)):
            await asyncio.wait({listening}, timeout=max(0.0, began + number * PIECE_S - time.monotonic()))
            if listening.done():
                break
            await socket.send(call.media(said[number]) if number < len(said) else call.silence())
            for digit in digits[number : number + 1]:
                await socket.send(call.dtmf(digit))
            for name in call.line.due_marks():
                await socket.send(call.mark(name))
        await socket.send(call.stop())
        await asyncio.wait({listening}, timeout=2.0)  # the server may hang up first
    except websockets.ConnectionClosed:
        pass
    finally:
        await socket.close()
        await listening


async def _listen(socket: websockets.ClientConnection, call: Call) -> None:
    """Until the connection is closed, by either side."""
    try:
        while True:
            call.take(await socket.recv())
    except websockets.ConnectionClosed:
        return
    except CarrierError:
        await socket.close()
        raise
