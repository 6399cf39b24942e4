"""Statistics of one session in a gateway: how long its phases took, what was lost, how it ended.

Kept while the session lasts and given once at its end: to the metrics, to the log as one line with what a bug
report needs, and as spans to a tracer, if there is one. Nothing a client said or wrote is in it.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from deployments import metrics
from deployments.gateway.protocols.translator import Codec
from deployments.gateway.tracing import Phase, Trace
from deployments.metrics import Metrics
from personaplex.errors import PersonaplexError
from personaplex.session.pacer import Pacer

logger = logging.getLogger(__name__)


class SessionStats:
    """Made when the client is accepted. Times are seconds of the monotonic clock."""

    def __init__(self, session: str, published: Metrics, trace: Trace | None, protocol: str = "chat") -> None:
        self.began = time.monotonic()
        self.queued = False
        self._session, self._metrics, self._trace = session, published, trace
        self._protocol = protocol
        self._phases: list[Phase] = []
        self._live_at: float | None = None
        self._ended_at: float | None = None
        self._details: dict[str, Any] = {}

    @property
    def talked_s(self) -> float:
        """Seconds of conversation until now or its end; 0 before the handshake."""
        end = time.monotonic() if self._ended_at is None else self._ended_at
        return 0.0 if self._live_at is None else end - self._live_at

    def note(self, **details: Any) -> None:
        """Facts for log and trace: numbers and names of our own."""
        self._details.update(details)

    def phase(self, name: str, seconds: float) -> None:
        """One step on the way to the handshake that has just ended and took `seconds`."""
        now = time.monotonic()
        self._phases.append(Phase(name, now - seconds, now))
        self._metrics.observe(metrics.READY_SECONDS, seconds, phase=name)

    def live(self) -> None:
        """The handshake is on its way."""
        self._live_at = time.monotonic()
        self._metrics.observe(metrics.READY_SECONDS, self._live_at - self.began, phase="handshake")

    def close(self, error: PersonaplexError | None, pacer: Pacer, transcoder: Codec, ignored: int) -> None:
        """The end; `error` is why our side ended it, None when the client left. `ignored`: its messages of no
        use."""
        self._ended_at = now = time.monotonic()
        cause = metrics.cause(error)
        series = metrics.SESSIONS_REFUSED if self._live_at is None else metrics.SESSIONS_ENDED
        self._metrics.add(series, cause=cause, protocol=self._protocol)
        self._metrics.add(metrics.FRAMES_DROPPED, pacer.dropped, place="pacer")
        self._metrics.add(metrics.FRAMES_DROPPED, pacer.trimmed, place="silence")
        self._metrics.add(metrics.UNDERRUNS, pacer.late)
        counters = transcoder.counters
        for kind, count in (
            ("packet", counters.concealed),
            ("page", transcoder.dropped_pages),
            ("resync", transcoder.resyncs),
            ("message", ignored),
        ):
            self._metrics.add(metrics.STREAM_ERRORS, count, kind=kind)
        took = {f"{phase.name}_s": round(phase.end - phase.begin, 4) for phase in self._phases}
        fields = {
            "session": self._session,
            "protocol": self._protocol,
            "cause": cause,
            "seconds": round(now - self.began, 2),
            "talked_s": round(self.talked_s, 2),
            **took,
            "frames_in": counters.frames_in,
            "frames_out": counters.frames_out,
            "frames_dropped": pacer.dropped,
            "underruns": pacer.late,
            "stream_errors": counters.concealed + transcoder.dropped_pages + transcoder.resyncs,
            "ignored": ignored,
            **self._details,
        }
        text = "session %s ended: %s, %.1f s, %d frames in, %d out"
        words = (self._session, cause, now - self.began, counters.frames_in, counters.frames_out)
        logger.info(text, *words, extra={"fields": fields})
        if self._trace is not None:
            phases = [*self._phases]
            if self._live_at is not None:
                phases.append(Phase("conversation", self._live_at, now))
            self._trace.session(Phase("session", self.began, now), phases, fields, failed=error is not None)
