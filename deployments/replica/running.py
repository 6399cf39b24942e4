"""The log of one running session, kept where its frames are answered: what is left of it when its gateway is
lost, and what is handed over when its client comes back by another way.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from deployments.wire.messages import Held
from personaplex.config import Pcm
from personaplex.sessionlog import SessionRecorder

FED_LIMIT = 1_024  # frames on their way through the engine
TEXTS_KEPT = 128  # pieces of text; more than a client can have missed


class RunningLog:
    """Made with the session; frames go in as they are fed, replies as they come."""

    def __init__(self, recorder: SessionRecorder, generation: int, held: Held) -> None:
        """`recorder`: holds what went before, in a session that goes on. `held`: what its client comes back
        with."""
        self.recorder = recorder
        self.generation = generation
        self.texts: deque[tuple[int, str]] = deque(maxlen=TEXTS_KEPT)
        self._held = held
        self._fed: deque[tuple[int, Pcm]] = deque(maxlen=FED_LIMIT)

    @property
    def held(self) -> int:
        """Generation of the token that the client is known to hold."""
        return self._held.generation

    def takes(self, counter: int) -> bool:
        """Whether this is the counter of a token that the client holds."""
        return counter in (self.generation, self.held)

    def fed(self, timestamp: int, pcm: Pcm) -> None:
        """A frame of the user was handed to the engine."""
        self._fed.append((timestamp, pcm))
        if self._held.used:  # it is heard over its new connection, so it has got what that one began with
            self._held = Held(self.generation)

    def answered(self, timestamp: int, tokens: npt.NDArray[np.integer], text: str) -> None:
        """The engine answered the frame with this timestamp. Those before it were dropped on the way."""
        pcm = None
        if any(at == timestamp for at, _ in self._fed):
            at = None
            while at != timestamp:
                at, pcm = self._fed.popleft()
        if text:
            self.texts.append((len(self.recorder.tokens), text))
        self.recorder.answered(pcm, tokens)
