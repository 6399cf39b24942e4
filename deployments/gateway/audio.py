"""The transcoding step of one session: the client's stream to frames, the agent's frames to its format.

Everything runs on the event loop, which nothing here blocks for longer than `feed_bytes` of the stream take:
a longer piece is decoded bit by bit, with other sessions in between.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from deployments import metrics
from deployments.gateway.protocols.translator import Codec
from deployments.metrics import Metrics
from personaplex.audio.transcoder import NOT_OGG_AFTER_S
from personaplex.config import Pcm
from personaplex.errors import PersonaplexError, ProtocolError, SessionLost
from personaplex.session.core import Limits
from personaplex.session.events import AgentAudio, AudioHeard, Event, Failed

logger = logging.getLogger(__name__)

UNDECODED_LIMIT = 524_288  # bytes that may wait to be decoded, times `burst_share`: 8 s of Opus at 510 kb/s
QUIET = 1e-6  # mean square of speech nobody misses: -60 dBFS
HEARD_EVERY_S = 0.5  # between two AudioHeard while audio comes


class AudioStep:
    """Made with its session. `emit` takes events, `on_frame` the client's frames, float32 [1920] each."""

    def __init__(
        self,
        transcoder: Codec,
        limits: Limits,
        published: Metrics,
        emit: Callable[[Event], None],
        on_frame: Callable[[Pcm], None],
    ) -> None:
        self.transcoder = transcoder
        self._undecoded_limit = round(UNDECODED_LIMIT * limits.burst_share)
        self._metrics, self._emit, self._on_frame = published, emit, on_frame
        self._loop = asyncio.get_running_loop()
        self._stopped = False
        self._undecoded: deque[bytes] = deque()
        self._undecoded_bytes = 0
        self._watch: asyncio.TimerHandle | None = None
        self._decode_seconds = 0.0  # since the last encoded frame
        self._heard_at = float("-inf")  # when AudioHeard was last emitted

    def feed(self, data: bytes) -> None:
        """Takes bytes of the client's stream, from its first byte on."""
        idle = not self._undecoded
        self._undecoded_bytes += len(data)
        if self._undecoded_bytes > self._undecoded_limit:
            words = f"more than {self._undecoded_limit // 1024} KiB of audio wait to be decoded"
            self._fail(ProtocolError(words))
            return
        step = self.transcoder.feed_bytes
        self._undecoded.extend(data[start : start + step] for start in range(0, len(data), step))
        if idle:
            self._decode_next()

    def encode(self, number: int, pcm: Pcm, stale: bool) -> None:
        """Emits agent frame `number`, float32 [1920], as a page. A `stale` one is left out when it is quiet:
        that makes up for a wait nobody chose."""
        began = time.perf_counter()
        page = self.transcoder.send(pcm)
        if number % metrics.SAMPLED == 0:
            spent = self._decode_seconds + time.perf_counter() - began
            self._metrics.observe(metrics.TRANSCODE_SECONDS, spent)
        self._decode_seconds = 0.0
        quiet = float(np.dot(pcm, pcm)) < QUIET * len(pcm)
        if quiet and stale:
            self._metrics.add(metrics.FRAMES_DROPPED, place="silence")
        else:
            self._emit(AgentAudio(page, quiet))

    def stop(self) -> None:
        """Nothing is decoded any more."""
        self._stopped = True

    def _decode_next(self) -> None:
        if self._stopped or not self._undecoded:
            return
        data = self._undecoded.popleft()
        self._undecoded_bytes -= len(data)
        try:
            self._decode(data)
        except Exception:  # the root of a callback: nothing would be decoded any more, and nobody told
            logger.exception("audio could not be decoded")
            self._fail(SessionLost("the server failed; please connect again"))
        if self._undecoded:
            self._loop.call_soon(self._decode_next)

    def _decode(self, data: bytes) -> None:
        began = time.perf_counter()
        try:
            frames = self.transcoder.receive(data)
        except PersonaplexError as error:
            self._fail(error)
            return
        self._decode_seconds += time.perf_counter() - began
        for frame in frames:
            self._on_frame(frame)
        if frames and began - self._heard_at >= HEARD_EVERY_S:
            self._heard_at = began
            self._emit(AudioHeard())
        if self.transcoder.astray and self._watch is None:
            self._watch = self._loop.call_later(NOT_OGG_AFTER_S, self._check_stream)

    def _check_stream(self) -> None:
        """A stream that is not Ogg is refused in time, whether more of it comes or not."""
        self._watch = None
        if not self._stopped:
            self._decode(b"")

    def _fail(self, error: PersonaplexError) -> None:
        self._undecoded.clear()
        self._emit(Failed(error))
