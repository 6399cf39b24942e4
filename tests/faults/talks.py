"""Sessions of our own client, which comes back after a lost connection, and what each of them heard."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from serving import Service
from websockets.asyncio.client import ClientConnection

from personaplex.client_call import Conversation, _Line, paced
from personaplex.config import FRAME_SECONDS, FRAME_SIZE, Pcm
from personaplex.errors import PersonaplexError
from personaplex.persona import Persona
from personaplex.session.moshi import Audio, Metadata, Text
from personaplex.session.peer import OwnAudio, PeerEvent

from .callers import Crowd
from .ledger import Entry, Ledger

AGAIN_S = 0.5  # until a session is tried again that could not begin


@dataclass
class Leg:
    """One connection of a conversation, once the service has told its details. `frame`: the first that it
    gives. `heard`: what the client had heard before, `lost`: what it was told to have missed. `sent`: the
    pieces of its Ogg stream."""

    frame: int
    heard: int
    lost: int
    sent: list[bytes] = field(default_factory=list)


class Talk(Conversation):
    """One conversation that writes down what happens to it."""

    def __init__(self, entry: Entry, source: AsyncIterator[Pcm]) -> None:
        super().__init__(lambda: source)
        self.entry = entry
        self.legs: list[Leg] = []
        self._loss: tuple[float, float] | None = None  # when it was noticed, and the last page before it
        self._last_page_at = 0.0

    @property
    def live(self) -> bool:
        """Whether it has a slot, as far as it knows."""
        return self._live.is_set()

    @property
    def session(self) -> str:
        return str(self.report.session.get("session", ""))

    @property
    def persona(self) -> Persona:
        """As the service said it."""
        told = self.report.session
        seeds = {"text_seed": told["text_seed"], "audio_seed": told["audio_seed"]}
        return Persona(told["voice"], sampling=dataclasses.replace(Persona().sampling, **seeds))

    def cut(self) -> bool:
        """The network is gone, in whatever state the connection is; False when there is none."""
        socket = self._line.socket
        if socket is None or socket.transport is None or socket.transport.is_closing():
            return False
        socket.transport.abort()
        return True

    async def _come_back(self, url: str, open_socket: Any, lost: PersonaplexError) -> ClientConnection:
        if self._loss is None:
            now = time.monotonic()
            self._loss = now, self._last_page_at or now
        self.entry.losses += 1
        return await super()._come_back(url, open_socket, lost)

    def _hear(self, data: bytes, now: float) -> None:
        before = self.report.frames_heard
        super()._hear(data, now)
        self.entry.heard.messages.append((now, Audio(data)))
        if self.report.frames_heard > before:
            self._last_page_at = now
            if self._loss is not None:
                noticed, last_page = self._loss
                self.entry.outages.append((noticed, now - last_page - FRAME_SECONDS))
                self._loss = None

    def _write(self, text: str) -> None:
        super()._write(text)
        self.entry.heard.messages.append((time.monotonic(), Text(text)))

    async def _notice(self, line: _Line, data: Mapping[str, Any]) -> None:
        if data.get("type") == "session":
            resumed = data.get("resumed") or {"frame": 0, "lost_frames": 0}
            self.legs.append(Leg(resumed["frame"], self._next_page, resumed["lost_frames"]))
        self.entry.heard.messages.append((time.monotonic(), Metadata(data)))
        await super()._notice(line, data)

    async def _tell(self, line: _Line, event: PeerEvent) -> None:
        if isinstance(event, OwnAudio) and line is self._line and self.legs:
            self.legs[-1].sent.append(event.page)
        await super()._tell(line, event)


class Talks(Crowd):
    """Conversations of our own client, which comes back."""

    def __init__(self, service: Service, ledger: Ledger, until: float, longest_s: float, seed: int) -> None:
        super().__init__(service, ledger, until, longest_s, seed)
        self.done: list[Talk] = []
        self._running: set[Talk] = set()

    @property
    def live(self) -> int:
        return len(self.running())

    def running(self) -> list[Talk]:
        """Those that are past their handshake, on a connection that they think is open."""
        return [talk for talk in self._running if talk.live]

    def cut_one(self) -> bool:
        """The network of one at random is gone; False when nobody has a connection."""
        talks = list(self._running)
        self._dice.shuffle(talks)
        return any(talk.cut() for talk in talks)

    async def _one_after_another(self) -> None:
        while time.monotonic() < self._until:
            entry = self._ledger.begin()
            seconds = self._dice.uniform(self._longest_s / 2, self._longest_s)
            talk = Talk(entry, self._speak(time.monotonic() + seconds))
            self._running.add(talk)
            try:
                await talk.run(f"{self._service.chat}?status=1&seed={entry.number}", {}, None)
            except (PersonaplexError, OSError) as error:
                if talk.report.connect_s is None:
                    self._running.discard(talk)
                    self._ledger.refuse(entry, type(error).__name__)
                    await asyncio.sleep(AGAIN_S)
                    continue
                entry.failure = f"{type(error).__name__}: {error}"
            finally:
                self._running.discard(talk)
                self.done.append(talk)
            entry.frames_sent, entry.resumes = talk.report.frames_sent, talk.report.resumes
            entry.ended = time.monotonic()

    async def _speak(self, end: float) -> AsyncIterator[Pcm]:
        start = self._dice.randrange(120) * FRAME_SIZE
        said = np.tile(self._sound[start : start + 120 * FRAME_SIZE], 1 + int(self._longest_s / 9.6))
        async for frame in paced(said):
            if time.monotonic() >= min(end, self._until):
                return
            yield frame
