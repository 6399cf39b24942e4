"""The log of one running session, kept where its frames are answered: what is left of it when its gateway is
lost, and what is handed over when its client comes back by another way.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from deployments.wire.detached import TEXTS_KEPT
from deployments.wire.messages import Held
from personaplex.config import Pcm
from personaplex.sessionlog import SessionRecorder

FED_LIMIT = 1_024  # frames on their way through the engine


class RunningLog:
    """Made with the session; frames go in as they are fed, replies as they come."""

    def __init__(self, recorder: SessionRecorder, generation: int, held: Held) -> None:
        """`recorder`: holds what went before, in a session that goes on. `held`: what its client comes back
        with."""
        self.recorder = recorder
        self.generation = generation
        self.ready = False  # its gateway was told so, and tells the client what to come back with
        self.texts: deque[tuple[int, str]] = deque(maxlen=TEXTS_KEPT)
        self.held = held
        self._fed: deque[tuple[int, Pcm]] = deque(maxlen=FED_LIMIT)

    @property
    def wanted(self) -> bool:
        """Whether anybody may come back for it: nobody does for a session that never began."""
        return self.ready or self.held.back >= 0 or len(self.recorder.tokens) > 0

    def takes(self, counter: int) -> bool:
        """Whether this is the counter of a token that the client may hold."""
        return self.held.takes(counter, self.generation)

    def fed(self, timestamp: int, pcm: Pcm) -> None:
        """A frame of the user was handed to the engine."""
        self._fed.append((timestamp, pcm))
        self.held = self.held.heard()

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
