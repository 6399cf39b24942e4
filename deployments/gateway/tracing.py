"""OpenTelemetry spans of a session's life, off unless the setting `tracing` asks for them.

Spans are made when a session has ended, from times already taken, so that tracing costs a live session
nothing: one span `session`, and below it its phases and `conversation`. Where they go is set by
OpenTelemetry's own environment (OTEL_EXPORTER_OTLP_ENDPOINT and others).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from personaplex.errors import ConfigError

SERVICE = "personaplex-gateway"


@dataclass(frozen=True)
class Phase:
    """A named stretch of time, in seconds of the monotonic clock."""

    name: str
    begin: float
    end: float


class Trace:
    """Hands sessions to an OpenTelemetry tracer."""

    def __init__(self, tracer: Any) -> None:
        """`tracer`: opentelemetry.trace.Tracer."""
        self._tracer = tracer

    def session(
        self, whole: Phase, phases: Sequence[Phase], fields: Mapping[str, Any], *, failed: bool
    ) -> None:
        """One ended session. `fields` become attributes of its span."""
        from opentelemetry import trace
        from opentelemetry.trace import StatusCode

        offset = time.time_ns() - time.monotonic_ns()
        root = self._tracer.start_span(
            whole.name, start_time=_nanoseconds(whole.begin, offset), attributes=dict(fields)
        )
        if failed:
            root.set_status(StatusCode.ERROR)
        within = trace.set_span_in_context(root)
        for phase in phases:
            begin, end = _nanoseconds(phase.begin, offset), _nanoseconds(phase.end, offset)
            self._tracer.start_span(phase.name, context=within, start_time=begin).end(end)
        root.end(_nanoseconds(whole.end, offset))


def connect() -> Trace:
    """A trace that exports by OTLP over HTTP. Raises ConfigError when OpenTelemetry is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError("tracing needs OpenTelemetry: pip install 'personaplex-serve[tracing]'") from error
    provider = TracerProvider(resource=Resource.create({"service.name": SERVICE}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Trace(provider.get_tracer("personaplex"))


def _nanoseconds(seconds: float, offset: int) -> int:
    """Of the wall clock, from seconds of the monotonic one."""
    return round(seconds * 1e9) + offset
