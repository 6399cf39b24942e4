"""Tells when a replica owes an answer for too long.

A process that stood still itself, or is far behind, must not blame the replica: a timer that rings late
starts the time again, and before the replica is named what has come meanwhile is read once more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

LATE_S = 0.25  # of a timer: this process stood still
SECOND_LOOK_S = 0.02


class SilenceWatch:
    """Calls `on_silent` once no answer came for `limit_s` while `owed()`, and again after each `limit_s`
    more.

    `asked` and `heard` cost nothing but the time they take to read the clock: one timer, set anew at most
    once every `limit_s`.
    """

    def __init__(self, limit_s: float, owed: Callable[[], bool], on_silent: Callable[[], None]) -> None:
        self._limit_s, self._owed, self._on_silent = limit_s, owed, on_silent
        self.since = time.monotonic()  # the last answer, or the first question after it
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._looked = False

    def asked(self) -> None:
        """A frame was sent that is the only one without an answer."""
        self.since = time.monotonic()
        self._arm(self._limit_s)

    def heard(self) -> None:
        """An answer came."""
        self.since = time.monotonic()
        self._looked = False

    def restart(self) -> None:
        """Counts from now, whatever was owed before."""
        self.heard()
        if self._owed():
            self._arm(self._limit_s)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, in_s: float) -> None:
        if self._timer is None:
            self._due = time.monotonic() + in_s
            self._timer = self._loop.call_later(in_s, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if not self._owed():
            return
        now = time.monotonic()
        if now - self._due > LATE_S:
            self.since = now
        left = self.since + self._limit_s - now
        if left > 0:
            self._arm(left)
        elif not self._looked:
            self._looked = True
            self._arm(SECOND_LOOK_S)
        else:
            self._looked = False
            self._on_silent()
            self._arm(self._limit_s)
