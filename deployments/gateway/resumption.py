"""How one session's client may come back to it: what it shows then, and what it has missed.

The client is sent a token with each slot. A session that goes on is told to its former keeper once its new
slot is ready, and given back if it never is.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

from deployments import metrics
from deployments.gateway.resumes import Own, Resumes, Taken
from deployments.metrics import Metrics
from deployments.wire.detached import TEXTS_KEPT
from deployments.wire.messages import NOTHING_HELD, Address, Held
from personaplex.errors import LogRefused, SessionTaken
from personaplex.sessionlog import SessionRecorder


class Resumption:
    """One session's. Without `resumes` its client cannot come back."""

    def __init__(self, session: str, resumes: Resumes | None, published: Metrics, own: Own) -> None:
        self._session, self._resumes, self._metrics, self._own = session, resumes, published, own
        self.held = NOTHING_HELD  # what the client has, as replicas are told
        self._wanted = False  # the client has something to come back with
        self._over = False  # here
        self._taken: Taken | None = None  # what the session goes on from, until it does
        self._texts: deque[tuple[int, str]] = deque(maxlen=TEXTS_KEPT)

    def begin(self) -> None:
        """A new session."""
        if self._resumes is not None:
            self.held = Held(0)

    def go_on(
        self, taken: Taken, heard: int, read: int, on_lost: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """A session whose client has come back, after it had heard `heard` frames of the agent and read
        the text of `read`. Gives what the client is told of it. `on_lost` is called when it has come back by
        yet another connection before the session goes on here. Raises SessionTaken when it has already."""
        if taken.lost:
            raise SessionTaken
        self.held = Held(taken.generation + 1, back=taken.counter)
        self._taken = taken
        taken.on_lost = on_lost
        self._enter()
        self._texts.extend(taken.texts)
        frames = taken.log.frames
        lost = [text for frame, text in taken.texts if frame >= read]
        return {"frame": frames, "lost_frames": max(0, frames - heard), "lost_text": "".join(lost)}

    def shown(self) -> None:
        """The client is heard, so it has got the token that its connection began with."""
        if self.held.back >= 0:
            if self._resumes is not None:
                self._resumes.use(self._session, self.held.generation)
            self.held = self.held.heard()

    def said(self, frame: int, text: str) -> None:
        """A piece of text was sent with this frame."""
        self._texts.append((frame, text))

    def ready(self) -> None:
        """The session begins or goes on here: the client is told what to come back with."""
        self._enter()
        if self._taken is not None:
            self._taken.confirm()
            self._taken = None
            self._metrics.add(metrics.RESUMES, outcome="continued")

    def end(self) -> None:
        """The session has ended here. Idempotent."""
        self._over = True
        if self._resumes is not None:
            self._resumes.leave(self._session, self._own)
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

    def keep(self, recorder: SessionRecorder, generation: int, place: Address | None) -> bool:
        """Keeps the log of a session that has lost its client, whose last slot was at `place` and had this
        generation; False where nobody can come back, or where it was kept before."""
        if self._resumes is None or not self._wanted or self._over:
            return False
        self._over = True
        self._resumes.leave(self._session, self._own)
        with contextlib.suppress(LogRefused):  # the sound of its last frame is not known
            log = recorder.log()
            self._resumes.keep(self._session, log, generation, self.held, self._texts, place)
        return True

    def _enter(self) -> None:
        self._wanted = True
        if self._resumes is not None and not self._over:
            self._resumes.enter(self._session, self._own)
