"""Own voices at a gateway: who may have one, the way from an upload to a voice, and back for its session.

The bytes of an upload are read in a child process (recording.py), become codes at a replica (asking.py) and
stay, as codes, with the fleet until their time (wire/voicestore.py), where the gateway of the session finds
them. The gateway that took the upload keeps them too, for the time in which the fleet is away; so a voice
that was taken back at another gateway is gone there, and here at its time. Recordings are kept nowhere.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from deployments import metrics
from deployments.gateway.asking import Asking
from deployments.gateway.keys import Key, KeyTable
from deployments.gateway.recording import LONGEST_S, UPLOAD_LIMIT, Recordings
from deployments.metrics import Metrics
from deployments.wire.voicestore import VoiceStore
from personaplex.errors import Forbidden, NoCapacity, PersonaplexError, TooManySessions, UnknownVoice
from personaplex.persona import Persona, own_digest, own_voice

logger = logging.getLogger(__name__)

UPLOADS, PER_S = 10, 60.0  # of one caller
REMEMBERED = 10_000  # callers
FLEET_TIMEOUT_S = 2.0


class UploadRate:
    """At most UPLOADS in any PER_S for each caller."""

    def __init__(self) -> None:
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def count(self, caller: str, now: float) -> None:
        """One more. Raises TooManySessions, which says when."""
        times = self._times.setdefault(caller, deque())
        self._times.move_to_end(caller)
        while times and now - times[0] >= PER_S:
            times.popleft()
        if len(times) >= UPLOADS:
            words = f"this caller has uploaded {UPLOADS} recordings within {PER_S:.0f} s"
            raise TooManySessions(words, times[0] + PER_S - now, "uploads")
        times.append(now)
        while len(self._times) > REMEMBERED:
            self._times.popitem(last=False)


class OwnVoices:
    """One gateway's. `fleet` is a handle with `put_voice`, `get_voice` and `delete_voice`."""

    def __init__(
        self,
        fleet: Any,
        asking: Asking,
        published: Metrics,
        *,
        allowed: bool,
        ttl_s: float,
        table: Callable[[], KeyTable],
    ) -> None:
        """`allowed`: for keys that do not say, and where no key is asked for."""
        self._fleet, self._asking, self._metrics = fleet, asking, published
        self._allowed, self._ttl_s, self._table = allowed, ttl_s, table
        self._recordings, self._rate, self._here = Recordings(), UploadRate(), VoiceStore()

    def describe(self) -> dict[str, Any]:
        """For `/api/info`."""
        allowed = "yes" if self._allowed else "keys" if self._table().any_own_voices() else "no"
        return {"allowed": allowed, "seconds": LONGEST_S, "bytes": UPLOAD_LIMIT, "ttl_s": self._ttl_s}

    def allowed(self, key: Key | None) -> bool:
        """Whether the holder of this key may have own voices."""
        chosen = None if key is None else key.own_voices
        return self._allowed if chosen is None else chosen

    def check(self, key: Key | None, caller: str) -> None:
        """Before the first byte of an upload. Raises Forbidden, TooManySessions."""
        self._refuse(key)
        self._rate.count(caller, time.monotonic())

    async def make(self, data: bytes, key: Key | None) -> dict[str, Any]:
        """A voice of a recording; the answer to its upload. Raises BadAudio, NoCapacity."""
        try:
            recording = await self._recordings.read(data)
            digest, packed = await self._asking.encode(recording.pcm)
            await self._keep(_holder(key), digest, packed)
        except PersonaplexError as error:
            self._metrics.add(metrics.OWN_VOICES, result=type(error).__name__)
            raise
        self._metrics.add(metrics.OWN_VOICES, result="made")
        return {
            "voice": own_voice(digest),
            "seconds": round(recording.seconds, 2),
            "loudness": recording.loudness,
            "expires_s": self._ttl_s,
            "problems": recording.problems,
        }

    async def bring(self, persona: Persona, key: Key | None) -> Persona:
        """A session's persona with the voice it brings, if it names one. Raises Forbidden, UnknownVoice."""
        digest = own_digest(persona.voice)
        if not digest:
            return persona
        self._refuse(key)
        voice = await self._find(_holder(key), digest)
        if voice is None:
            raise UnknownVoice("there is no such own voice here, or not any more: upload the recording again")
        return dataclasses.replace(persona, own=voice)

    async def forget(self, digest: str, key: Key | None) -> None:
        """Takes a voice back. Raises Forbidden, NoCapacity while the fleet cannot be told."""
        self._refuse(key)
        self._here.delete(_holder(key), digest)
        await self._ask("delete_voice", _holder(key), digest)

    def _refuse(self, key: Key | None) -> None:
        if not self.allowed(key):
            raise Forbidden(
                "own voices are not allowed here" if key is None else "this key has no own voices"
            )

    async def _keep(self, holder: str, digest: str, packed: bytes) -> None:
        await self._ask("put_voice", holder, digest, packed, self._ttl_s)
        self._here.put(holder, digest, packed, self._ttl_s, time.monotonic())

    async def _find(self, holder: str, digest: str) -> bytes | None:
        """From the fleet, or from here while it is away or was restarted."""
        here = self._here.get(holder, digest, time.monotonic())
        try:
            found: bytes | None = await self._ask("get_voice", holder, digest)
        except NoCapacity:
            return here
        return here if found is None else found

    async def _ask(self, method: str, *args: Any) -> Any:
        try:
            answer = _answer(getattr(self._fleet, method).remote(*args))
            return await asyncio.wait_for(answer, FLEET_TIMEOUT_S)
        except (RayError, RayServeException, asyncio.TimeoutError) as error:
            logger.info("the fleet could not be asked about own voices: %s", type(error).__name__)
            raise NoCapacity("voices cannot be looked up now") from error


def _holder(key: Key | None) -> str:
    return "" if key is None else key.holder


async def _answer(response: Any) -> Any:
    return await response
