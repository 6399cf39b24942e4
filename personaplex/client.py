"""Talks to a PersonaPlex service from a terminal: `python -m personaplex.client --help`.

Streams a recording in real time (or the microphone), keeps what the agent says on the time line of what was
said, and reports how prompt it was. Works with this project's service and with NVIDIA's own server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from personaplex import cli

if __name__ == "__main__":
    cli.guard_imports("client")

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from personaplex.audio.device import Device
from personaplex.audio.recorder import Recorder, Rhythm
from personaplex.audio.transcoder import Transcoder
from personaplex.client_io import (
    CONNECT_ERRORS,
    Report,
    chat_url,
    check_outputs,
    ending,
    keep,
    load_recording,
    parser,
    refusal,
    tls_context,
)
from personaplex.config import FRAME_SECONDS, FRAME_SIZE, Pcm
from personaplex.errors import BadAudio, PersonaplexError
from personaplex.outputs import check_room, wav_bytes
from personaplex.session.core import LIVE
from personaplex.session.events import Close, PeerClosed, Tick
from personaplex.session.moshi import MESSAGE_LIMIT
from personaplex.session.pacer import SLACK_S
from personaplex.session.peer import (
    ClientCore,
    Complain,
    Connected,
    HangUp,
    Live,
    Notice,
    OwnAudio,
    PeerEvent,
    Play,
    Received,
    ReceivedText,
    Send,
    Show,
)

TAIL_S = 3.0  # longest wait for the last answers after a recording has ended
_OPEN_TIMEOUT_S = 20.0
_CLOSE_TIMEOUT_S = 2.0


class Conversation:
    """One session over one WebSocket: `run` does everything, `report` and `heard` hold what came of it."""

    def __init__(
        self,
        source: Callable[[], AsyncIterator[Pcm]],
        *,
        play: Callable[[Pcm], None] = lambda frame: None,
        show: Callable[[str], None] = lambda text: None,
        tell: Callable[[str], None] = lambda notice: None,
    ) -> None:
        """`source` gives our frames at their own pace, from the handshake on. `play` takes each frame heard,
        `show` each piece of the transcript, `tell` what a person may want to know meanwhile.
        """
        self.report = Report()
        self.heard: Recorder | None = None
        self._source, self._play, self._show, self._inform = source, play, show, tell
        self._core, self._transcoder = ClientCore(), Transcoder()
        self._live = asyncio.Event()
        self._answered = asyncio.Event()  # as many frames were heard as were sent
        self._arrivals: list[float] = []
        self._began = self._first_sent = 0.0
        self._complaint = ""

    async def run(self, url: str, headers: Mapping[str, str], tls: ssl.SSLContext | None) -> None:
        """Holds the conversation until the source ends and was answered, or the service ends it.

        Raises the typed error of whatever cut it short.
        """
        self._began = time.monotonic()
        try:
            socket = await connect(
                url,
                ssl=tls,
                additional_headers=headers,
                compression=None,
                max_size=MESSAGE_LIMIT,
                open_timeout=_OPEN_TIMEOUT_S,
                close_timeout=_CLOSE_TIMEOUT_S,
            )
        except CONNECT_ERRORS as error:
            raise refusal(error) from error
        self.report.connect_s = time.monotonic() - self._began
        try:
            async with socket:
                await self._tell(socket, Connected())
                await self._converse(socket)
        finally:
            self.report.rhythm = Rhythm.of(self._arrivals)
        if self._core.error:
            raise self._core.error

    async def _converse(self, socket: ClientConnection) -> None:
        helpers = [asyncio.create_task(self._speak(socket)), asyncio.create_task(self._watch(socket))]
        try:
            await self._listen(socket)
        finally:
            for helper in helpers:
                helper.cancel()
            ends = await asyncio.gather(*helpers, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _listen(self, socket: ClientConnection) -> None:
        try:
            while True:
                message = await socket.recv()
                await self._tell(
                    socket, Received(message) if isinstance(message, bytes) else ReceivedText(message)
                )
        except ConnectionClosed as closed:
            wished = self._core.state.name in ("CLOSING", "CLOSED")
            await self._tell(socket, PeerClosed())
            if not wished:
                code = closed.rcvd.code if closed.rcvd else 1006
                reason = self._complaint or (closed.rcvd.reason if closed.rcvd else "")
                raise ending(code, reason) from closed

    async def _speak(self, socket: ClientConnection) -> None:
        await self._live.wait()
        try:
            for page in self._transcoder.headers():
                await self._tell(socket, OwnAudio(page))
            async for frame in self._source():
                if self._core.state is not LIVE:
                    return
                if self.heard is None:
                    self._first_sent = time.monotonic()
                    self.heard = Recorder(self._first_sent)
                await self._tell(socket, OwnAudio(self._transcoder.send(frame)))
                self.report.frames_sent += 1
            self._check_answered()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._answered.wait(), TAIL_S)
        finally:
            await self._tell(socket, HangUp())

    async def _watch(self, socket: ClientConnection) -> None:
        await self._live.wait()
        while (deadline := self._core.deadline()) is not None:
            await asyncio.sleep(max(0.0, deadline - time.monotonic()))
            await self._tell(socket, Tick())

    async def _tell(self, socket: ClientConnection, event: PeerEvent) -> None:
        """Hands an event to the core and does what it asks for."""
        now = time.monotonic()
        for command in self._core.receive(event, now):
            match command:
                case Send(data):
                    with contextlib.suppress(ConnectionClosed):  # _listen reports the reason
                        await socket.send(data)
                case Close(code, reason):
                    await socket.close(code, reason)
                case Live():
                    self.report.handshake_s = now - self._began
                    self._live.set()
                case Play(data):
                    self._hear(data, now)
                case Show(text):
                    self.report.transcript += text
                    self._show(text)
                case Notice(data):
                    self._notice(data)
                case Complain(message):
                    self._complaint = message

    def _hear(self, data: bytes, now: float) -> None:
        frames = self._transcoder.receive(data)
        if not frames or self.heard is None:
            return
        if not self._arrivals:
            self.report.first_audio_s = now - self._first_sent
        self._arrivals.append(now)
        for frame in frames:
            self.heard.add(frame, now)
            self._play(frame)
        self.report.frames_heard += len(frames)
        self.report.underruns = self.heard.underruns
        self._check_answered()

    def _check_answered(self) -> None:
        # Our encoder's look-ahead keeps part of our last frame back, and so does the agent's.
        if self.report.frames_heard >= self.report.frames_sent - 2:
            self._answered.set()
        else:
            self._answered.clear()

    def _notice(self, data: Mapping[str, Any]) -> None:
        if data.get("type") == "queue" and data.get("position"):
            self._inform(f"waiting for a free slot, position {data.get('position')}")
        elif data.get("type") == "session":
            self.report.session = dict(data)
            self._inform("connected; warming up")


async def paced(pcm: Pcm) -> AsyncIterator[Pcm]:
    """Frames of float32 [samples], one per 80 ms by the clock and never two at once; zeros fill the last."""
    count = -(-len(pcm) // FRAME_SIZE)
    frames = np.zeros((count, FRAME_SIZE), np.float32)
    frames.reshape(-1)[: len(pcm)] = pcm
    due = time.monotonic()
    for frame in frames:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        now = time.monotonic()
        due = (due if now - due <= SLACK_S else now) + FRAME_SECONDS
        yield frame


async def microphone(device: Device, ready: asyncio.Event) -> AsyncIterator[Pcm]:
    """Frames as the device delivers them; `ready` is set for each."""
    while True:
        await ready.wait()
        ready.clear()
        while (frame := device.read()) is not None:
            yield frame


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 when the conversation ended as wished, 1 for an error, 2 for a command line that
    makes no sense, 130 for an interrupt.

    An interrupt is how a microphone session is meant to end. However it ends, what was heard is kept.
    """
    return cli.run(lambda: _main(parser().parse_args(argv)), "client")


def _main(options: argparse.Namespace) -> int:
    url = chat_url(options)
    try:
        check_outputs(options)
        said = load_recording(options.input_wav, options.tail, options.channel) if options.input_wav else None
        if options.output_wav and said is not None:
            check_room(options.output_wav, wav_bytes(len(said)))
    except (BadAudio, OSError) as error:
        cli.complain(cli.reason(error))
        return cli.FAILED
    return _talk(options, url, said)


def _talk(options: argparse.Namespace, url: str, said: Pcm | None) -> int:
    kept: list[Conversation] = []
    code = 0
    try:
        asyncio.run(_converse(options, url, said, kept))
    except KeyboardInterrupt:
        code = cli.INTERRUPTED if said is not None else 0
    except (PersonaplexError, OSError) as error:
        cli.complain(cli.reason(error))
        code = cli.FAILED
    for conversation in kept:
        report = conversation.report
        print("\n" * bool(report.transcript), end="")
        _inform(report.lines())
        for failure in keep(report, conversation.heard, options, 0 if said is None else len(said)):
            cli.complain(failure)
            code = code or cli.FAILED
    return code


async def _converse(
    options: argparse.Namespace, url: str, said: Pcm | None, kept: list[Conversation]
) -> None:
    """Holds one conversation; it is in `kept` from its beginning, so that an interrupt does not lose it."""
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    loop, ready = asyncio.get_running_loop(), asyncio.Event()

    def notify() -> None:
        loop.call_soon_threadsafe(ready.set)

    with contextlib.ExitStack() as stack:
        if said is not None:
            conversation = Conversation(lambda: paced(said), show=_show, tell=_inform)
        else:
            device = stack.enter_context(Device(notify))
            conversation = Conversation(
                lambda: microphone(device, ready), play=device.play, show=_show, tell=_inform
            )
        kept.append(conversation)
        await conversation.run(url, headers, tls_context(url, options.insecure))


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _inform(notice: str) -> None:
    print(notice, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
