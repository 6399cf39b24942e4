"""Sessions that talk all the time, each for a while, then another one in its place."""

from __future__ import annotations

import asyncio
import random
import time

import numpy as np
import websockets
from serving import Service, connect, speech

from personaplex.config import FRAME_SECONDS, FRAME_SIZE

from .ledger import Entry, Ledger

PIECE = 5  # frames between two looks at the clock
LAST_ANSWERS_S = 3.0


class Crowd:
    """Sessions one after another, `count` at a time, until `until`, each at most `longest_s` and at least
    half of that; what they are is the kind's."""

    def __init__(self, service: Service, ledger: Ledger, until: float, longest_s: float, seed: int) -> None:
        self._service, self._ledger, self._until, self._longest_s = service, ledger, until, longest_s
        self._dice = random.Random(seed)
        self._sound = np.tile(speech(9.6), 2)

    @property
    def live(self) -> int:
        """Sessions that talk."""
        raise NotImplementedError

    def stop(self) -> None:
        """No further session begins; those that talk end soon."""
        self._until = min(self._until, time.monotonic() + 1.0)

    async def run(self, count: int) -> None:
        await asyncio.gather(*(self._one_after_another() for _ in range(count)))

    async def _one_after_another(self) -> None:
        raise NotImplementedError


class Callers(Crowd):
    """Stock clients, which never come back."""

    def __init__(self, service: Service, ledger: Ledger, until: float, longest_s: float, seed: int) -> None:
        super().__init__(service, ledger, until, longest_s, seed)
        self._live = 0

    @property
    def live(self) -> int:
        return self._live

    async def _one_after_another(self) -> None:
        while time.monotonic() < self._until:
            entry = self._ledger.begin()
            try:
                await self._talk(entry, self._dice.uniform(self._longest_s / 2, self._longest_s))
            except (AssertionError, TimeoutError, asyncio.TimeoutError):
                entry.failure = entry.failure or "it was never live, or not answered"
            except (OSError, websockets.WebSocketException) as error:
                entry.failure = entry.failure or f"not connected: {type(error).__name__}"
            entry.ended = time.monotonic()

    async def _talk(self, entry: Entry, seconds: float) -> None:
        async with connect(self._service, seed=entry.number) as client:
            entry.heard = client.heard
            await client.headers()
            await client.until(lambda heard: heard.live, 60.0)
            self._live += 1
            try:
                began = time.monotonic()
                end = began + seconds
                start = self._dice.randrange(60)
                while time.monotonic() < min(end, self._until) and not client.ended:
                    at = (start + entry.frames_sent) % 120 * FRAME_SIZE
                    piece = np.roll(self._sound, -at)[: PIECE * FRAME_SIZE]
                    await client.speak(piece)
                    entry.frames_sent += PIECE
                    await asyncio.sleep(began + entry.frames_sent * FRAME_SECONDS - time.monotonic())
                await asyncio.sleep(0 if client.ended else LAST_ANSWERS_S)
            except websockets.ConnectionClosed:
                pass  # its code says why
            finally:
                self._live -= 1
            if client.ended:
                entry.failure = f"{client.heard.code} {client.heard.reason}"
