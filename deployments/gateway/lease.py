"""One call for a slot: an attempt up to its first item, a lease from its grant on, until the slot is free."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException, RequestCancelledError

from deployments.wire.messages import Grant
from personaplex.errors import PersonaplexError, SessionLost

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldSlot:
    """A slot of this gateway's; `since` by the monotonic clock."""

    session: str
    replica: str
    since: float


class Lease:
    """A granted slot. Ends when the replica says so; `release` gives back one that was never used."""

    def __init__(self, grant: Grant, response: Any) -> None:
        self.grant = grant
        self._response = response
        self._released = False
        self._end = asyncio.ensure_future(self._watch())

    def on_end(self, call: Callable[[bool], None]) -> None:
        """Calls `call` once the slot is held no more; with True where its session is over, False where the
        slot was given back unused or the replica is lost.

        A session is over when the replica says so, or when Serve ends the call together with the request that
        it belongs to, which is what happens when a WebSocket closes.
        """

        def done(end: asyncio.Future[bool]) -> None:
            if end.cancelled():
                call(not self._released)
            else:
                call(end.exception() is None and end.result())

        self._end.add_done_callback(done)

    async def wait_freed(self, timeout_s: float) -> bool:
        """Waits until the slot is free; False when that took longer than `timeout_s`."""
        done, _ = await asyncio.wait({self._end}, timeout=timeout_s)
        return bool(done)

    def release(self) -> None:
        """Gives the slot back whatever its state. Idempotent."""
        if not self._end.done():
            self._released = True
            cancel(self._response)
            self._end.cancel()

    async def _watch(self) -> bool:
        # A replica that dies ends the media link too, and that is where the session learns of it.
        try:
            while True:
                await self._response.__anext__()
        except (StopAsyncIteration, RequestCancelledError):  # the latter: Serve, with the request
            return True
        except (RayError, RayServeException):
            return False


class Attempt:
    """One call for a lease, up to its first item."""

    def __init__(self, response: Any, closed: asyncio.Future[None]) -> None:
        self.response = response
        self._first: asyncio.Future[Any] = asyncio.ensure_future(response.__anext__())
        self._closed = closed

    async def wait(self, timeout_s: float) -> bool:
        """Whether the first item came in time. Raises SessionLost when `closed` came before it."""
        await asyncio.wait(
            {self._first, self._closed}, timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED
        )
        if self._closed.done() and not self._first.done():
            raise SessionLost("the server is being stopped; please connect again")
        return self._first.done()

    def result(self, *, warn: bool) -> Grant | None:
        """The grant, or None when another try may do better; then one line of log if `warn`."""
        try:
            first = self._first.result()
        except (RayError, RayServeException, StopAsyncIteration) as error:
            if warn:
                logger.warning("a lease could not be had, trying again: %s", type(error).__name__)
            return None
        return first if isinstance(first, Grant) else None

    def cancel(self) -> None:
        self._first.add_done_callback(_forget)  # Serve makes an error of its own of a cancelled call
        self._first.cancel()
        cancel(self.response)


def _forget(done: asyncio.Future[Any]) -> None:
    if not done.cancelled():
        done.exception()


def cancel(response: Any) -> None:
    """Cancels a streaming call; one that failed before raises its old error here, and nobody needs it."""
    with contextlib.suppress(RayError, RayServeException, asyncio.CancelledError, PersonaplexError):
        response.cancel()
