"""One conversation with a service, over as many connections as it takes; see `client.py` for the command."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from personaplex.audio.device import Device
from personaplex.audio.ogg import page_number
from personaplex.audio.recorder import Recorder, Rhythm
from personaplex.audio.transcoder import Transcoder
from personaplex.client_io import (
    CONNECT_ERRORS,
    Report,
    ending,
    refusal,
)
from personaplex.client_resume import (
    LEAVE_CODE,
    LOST_CODES,
    SETTLED_S,
    TRY_TIMEOUT_S,
    Ticket,
    pauses,
    resume_url,
    worth_retrying,
)
from personaplex.config import FRAME_SECONDS, FRAME_SIZE, Pcm
from personaplex.errors import NoCapacity, PersonaplexError, SessionLost
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
from personaplex.transcript import Transcript

TAIL_S = 3.0  # longest wait for the last answers after a recording has ended
_OPEN_TIMEOUT_S = 20.0
_CLOSE_TIMEOUT_S = 2.0


@dataclass
class _Line:
    """One connection of a conversation."""

    socket: ClientConnection | None = None  # None before the first
    began: float = field(default_factory=time.monotonic)
    core: ClientCore = field(default_factory=ClientCore)
    headers_sent: bool = False  # of our stream
    hung_up: bool = False  # by us: the conversation is over
    leaving: bool = False  # by us: the conversation goes on over another one
    code: int = 1006  # how the server closed it
    reason: str = ""
    complaint: str = ""  # the server's words before it closed


class Conversation:
    """One session, over as many WebSockets as it takes: `run` does everything, `report` and `heard` hold what
    came of it."""

    def __init__(
        self,
        source: Callable[[], AsyncIterator[Pcm]],
        *,
        play: Callable[[Pcm], None] = lambda frame: None,
        show: Callable[[str], None] = lambda text: None,
        tell: Callable[[str], None] = lambda notice: None,
        last_words_s: float = 0.0,
    ) -> None:
        """`source` gives our frames at their own pace, from the handshake on; it is asked for none while the
        connection is lost. `play` takes each frame heard, `show` each piece of the transcript, `tell` what a
        person may want to know meanwhile. `last_words_s`: after the last answer, the wait for the text of
        what we said last, where the service tells it.
        """
        self.report = Report()
        self.transcript = Transcript()
        self.heard: Recorder | None = None
        self._last_words_s = last_words_s
        self._source, self._play, self._show, self._inform = source, play, show, tell
        self._transcoder = Transcoder()
        self._line = _Line()
        self._live = asyncio.Event()
        self._answered = asyncio.Event()  # as many frames were heard as were sent
        self._ticket: Ticket | None = None
        self._until: float | None = None  # we try to come back, after a loss; None while we are live
        self._next_page = 0  # of the agent's stream
        self._read = 0  # pages of which the text is complete, or was told after a loss: it follows its page
        self._lost = (0, 0)  # pages that were lost last, and which was the next before them
        self._unheard = 0  # our frames that were lost on the way, so that nothing answers them
        self._arrivals: list[float] = []
        self._began = self._first_sent = 0.0

    async def run(self, url: str, headers: Mapping[str, str], tls: ssl.SSLContext | None) -> None:
        """Holds the conversation until the source ends and was answered, or the service ends it. A connection
        that is lost is made again, where the service allows it.

        Raises the typed error of whatever cut it short.
        """

        async def open_socket(address: str, timeout_s: float) -> ClientConnection:
            return await connect(
                address,
                ssl=tls,
                additional_headers=headers,
                compression=None,
                max_size=MESSAGE_LIMIT,
                open_timeout=timeout_s,
                close_timeout=_CLOSE_TIMEOUT_S,
            )

        self._began = time.monotonic()
        try:
            socket = await open_socket(url, _OPEN_TIMEOUT_S)
        except CONNECT_ERRORS as error:
            raise refusal(error) from error
        self.report.connect_s = time.monotonic() - self._began
        speaking = asyncio.create_task(self._speak())
        try:
            while (lost := await self._hold(socket, speaking)) is not None:
                socket = await self._come_back(url, open_socket, lost)
        finally:
            speaking.cancel()
            await asyncio.gather(speaking, return_exceptions=True)
            self.report.rhythm = Rhythm.of(self._arrivals)

    async def _hold(self, socket: ClientConnection, speaking: asyncio.Task[None]) -> PersonaplexError | None:
        """One connection, to its end: None for an end that was wished, else the error of a loss from which we
        may come back. Raises any other."""
        self._line = line = _Line(socket)
        async with socket:
            watching = asyncio.create_task(self._watch(line))
            listening = asyncio.create_task(self._listen(line))
            try:
                await self._tell(line, Connected())
                await asyncio.wait({listening, speaking}, return_when=asyncio.FIRST_COMPLETED)
                if speaking.done():
                    speaking.result()  # raises what it ended with
                await listening
            finally:
                self._live.clear()
                watching.cancel()
                listening.cancel()
                await asyncio.gather(watching, listening, return_exceptions=True)
        return self._judge(line)

    def _judge(self, line: _Line) -> PersonaplexError | None:
        """What the end of a connection means, see `_hold`."""
        error = line.core.error
        if line.leaving:
            error = SessionLost("the server is being stopped")
        elif error is None and line.hung_up:
            return None
        elif error is None:
            error = ending(line.code, line.complaint or line.reason)
        lost = line.leaving or isinstance(line.core.error, SessionLost) or line.code in LOST_CODES
        if self._ticket is None or not lost:
            raise error
        return error

    async def _come_back(
        self,
        url: str,
        open_socket: Callable[[str, float], Awaitable[ClientConnection]],
        lost: PersonaplexError,
    ) -> ClientConnection:
        """A new connection to the same session. Raises SessionLost when there is none to be had."""
        assert self._ticket is not None
        now, leaving, full = time.monotonic(), self._line.leaving, isinstance(lost, NoCapacity)
        at_once = now - self._line.began > SETTLED_S if leaving else not full
        why = "no slot is free" if full else "the connection was lost"
        self._inform(f"one moment: {'the service asks us over' if leaving else why}")
        if self._until is None:
            self._until = now + self._ticket.grace_s
        elif now > self._until:  # let in, but not served
            raise SessionLost(f"{lost}; the conversation could not be continued")
        address = resume_url(url, self._ticket, self._next_page, self._read)
        for pause in pauses(random.Random(), at_once=at_once):
            await asyncio.sleep(pause)
            try:
                return await open_socket(address, TRY_TIMEOUT_S)
            except CONNECT_ERRORS as error:
                refused = refusal(error)
                if not worth_retrying(refused) or time.monotonic() > self._until:
                    words = f"{lost}; the conversation could not be continued: {refused}"
                    raise SessionLost(words) from error
        raise AssertionError("the pauses never end")

    async def _listen(self, line: _Line) -> None:
        assert line.socket is not None
        try:
            while True:
                message = await line.socket.recv()
                await self._tell(
                    line, Received(message) if isinstance(message, bytes) else ReceivedText(message)
                )
        except ConnectionClosed as closed:
            await self._tell(line, PeerClosed())
            line.code, line.reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")

    async def _speak(self) -> None:
        await self._live.wait()
        async for frame in self._source():
            await self._live.wait()
            line = self._line
            if not line.headers_sent:
                line.headers_sent = True
                for page in self._transcoder.headers():
                    await self._tell(line, OwnAudio(page))
            if self.heard is None:
                self._first_sent = time.monotonic()
                self.heard = Recorder(self._first_sent)
            await self._tell(line, OwnAudio(self._transcoder.send(frame)))
            self.report.frames_sent += 1
        self._check_answered()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._answered.wait(), TAIL_S)
        if self.report.session.get("transcription") is True:
            await asyncio.sleep(self._last_words_s)
        await self._live.wait()
        self._line.hung_up = True
        await self._tell(self._line, HangUp())

    async def _watch(self, line: _Line) -> None:
        await self._live.wait()
        while (deadline := line.core.deadline()) is not None:
            await asyncio.sleep(max(0.0, deadline - time.monotonic()))
            await self._tell(line, Tick())

    async def _tell(self, line: _Line, event: PeerEvent) -> None:
        """Hands an event to the core and does what it asks for."""
        now = time.monotonic()
        assert line.socket is not None
        for command in line.core.receive(event, now):
            match command:
                case Send(data):
                    with contextlib.suppress(ConnectionClosed):  # _listen reports the reason
                        await line.socket.send(data)
                case Close(code, reason):
                    await line.socket.close(code, reason)
                case Live():
                    if self.report.handshake_s is None:
                        self.report.handshake_s = now - self._began
                    self._until = None
                    self._live.set()
                case Play(data):
                    self._hear(data, now)
                case Show(text):
                    self._write(text)
                case Notice(data):
                    await self._notice(line, data)
                case Complain(message):
                    line.complaint = message

    def _write(self, text: str) -> None:
        self._read = max(self._read, self._next_page)
        self.report.transcript += text
        self.transcript.add_agent(self._next_page - 1, text)
        self._show(text)

    def _hear(self, data: bytes, now: float) -> None:
        self._read = max(self._read, min(self._next_page, page_number(data)))
        self._next_page = max(self._next_page, page_number(data) + 1)
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
        # Each connection begins with that anew.
        report = self.report
        wanted = report.frames_sent - self._unheard - 2 * (1 + report.resumes)
        if report.frames_heard + report.frames_lost >= wanted:
            self._answered.set()
        else:
            self._answered.clear()

    async def _notice(self, line: _Line, data: Mapping[str, Any]) -> None:
        kind = data.get("type")
        self._ticket = Ticket.of(data) or self._ticket  # a new one after each resume, failover and move
        self.transcript.add_notice(data)
        if kind == "queue" and data.get("position"):
            wait = data.get("wait_s")
            about = f", about {wait} s" if isinstance(wait, int) else ""
            self._inform(f"waiting for a free slot, position {data.get('position')}{about}")
        elif kind == "session":
            self.report.session = {name: value for name, value in data.items() if name != "resume"}
            self._resumed(data.get("resumed"))
        elif kind == "window":
            self._inform("from here on the agent forgets the beginning of the conversation")
        elif kind == "ending":
            self._inform(f"the session ends in {data.get('in_s')} s")
        elif kind == "reconnect" and self._ticket is not None and line.socket is not None:
            line.leaving = True
            await line.socket.close(LEAVE_CODE)

    def _resumed(self, details: Any) -> None:
        if not isinstance(details, Mapping):
            if self.report.resumes == 0 and self.report.handshake_s is None:
                self._inform("connected; warming up")
            return
        lost, answered = details.get("lost_frames"), details.get("frame")
        self.report.resumes += 1
        self._lose(lost if isinstance(lost, int) else 0)
        self._inform("the conversation goes on")
        if isinstance(text := details.get("lost_text"), str) and text:
            self._write(text)
        if isinstance(answered, int):
            self._unheard = max(0, self.report.frames_sent - answered)
            self._read = max(self._read, answered)

    def _lose(self, frames: int) -> None:
        """So many frames of the agent were lost since the last one that was heard."""
        before, at = self._lost
        again = before if at == self._next_page else 0  # told already, over a connection that brought nothing
        self.report.frames_lost += frames - again
        self._lost = frames, self._next_page


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
