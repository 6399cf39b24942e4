"""How one session's client may come back to it: what it shows then, and what it has missed.

The client is sent a token with each slot. A session that goes on is told to its former keeper once its new
slot is ready, and given back if it never is.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import Any

from deployments import metrics
from deployments.gateway.resumes import Resumes, Taken
from deployments.metrics import Metrics
from deployments.wire.messages import NOTHING_HELD, Held
from personaplex.errors import LogRefused
from personaplex.sessionlog import SessionRecorder

TEXTS_KEPT = 128  # pieces of text; more than a client can have missed


class Resumption:
    """One session's. Without `resumes` its client cannot come back."""

    def __init__(self, session: str, resumes: Resumes | None, published: Metrics) -> None:
        self._session, self._resumes, self._metrics = session, resumes, published
        self.held = NOTHING_HELD  # what the client has, as replicas are told
        self._taken: Taken | None = None  # what the session goes on from, until it does
        self._texts: deque[tuple[int, str]] = deque(maxlen=TEXTS_KEPT)

    def begin(self) -> None:
        """A new session."""
        if self._resumes is not None:
            self.held = Held(0)

    def go_on(self, taken: Taken, heard: int, read: int) -> dict[str, Any]:
        """A session whose client has come back, after it had heard `heard` frames of the agent and read
        the text of `read`. Gives what the client is told of it."""
        self.held = Held(taken.counter, used=True)
        self._taken = taken
        self._texts.extend(taken.texts)
        frames = taken.log.frames
        lost = [text for frame, text in taken.texts if frame >= read]
        return {"frame": frames, "lost_frames": max(0, frames - heard), "lost_text": "".join(lost)}

    def shown(self, generation: int) -> None:
        """The client is heard, so it has got the token of this generation."""
        if self.held.used:
            self.held = Held(generation)

    def said(self, frame: int, text: str) -> None:
        """A piece of text was sent with this frame."""
        self._texts.append((frame, text))

    def continued(self) -> None:
        """The session goes on here. Without effect on a new one."""
        if self._taken is not None:
            self._taken.confirm()
            self._taken = None
            self._metrics.add(metrics.RESUMES, outcome="continued")

    def give_back(self) -> None:
        """The session has ended. Without effect unless it should have gone on and has not."""
        if self._taken is not None:
            self._taken.give_back()
            self._taken = None
            self._metrics.add(metrics.RESUMES, outcome="failed")

    def ticket(self, generation: int) -> dict[str, Any]:
        """What the client is sent to come back with."""
        if self._resumes is None:
            return {}
        token = self._resumes.token(self._session, generation)
        return {"resume": token, "grace_s": self._resumes.grace_s}

    def keep(self, recorder: SessionRecorder, generation: int) -> bool:
        """Keeps the log of a session that has lost its client; False where nobody can come back."""
        if self._resumes is None:
            return False
        with contextlib.suppress(LogRefused):  # the sound of its last frame is not known
            log = recorder.log()
            self._resumes.keep(self._session, log, generation, self.held.generation, self._texts)
        return True
