"""Every series the service publishes: names, units, buckets, and where each is observed.

Fleet series go through Ray (`ray.serve.metrics`), which adds deployment, replica and application to them and
exports them with the prefix `ray_` (counters also get `_total`). Labels are closed sets: the names of our own
errors, the places and phases below, the labels of an operator's keys. Nothing a client sends is ever a label.

Ray forgets a gauge two or three export intervals after it was set, though the process that set it is still
there. So every process sets its gauges again and again, whether they changed or not (`Metrics.keep`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from ray.serve import metrics

from personaplex.errors import PersonaplexError

# Seconds. Ticks and latencies have a hard deadline at one frame, 0.08.
TICK_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.16, 0.32, 1.0)
LATENCY_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.24, 0.4, 0.8, 2.0)
GAP_BUCKETS = (0.02, 0.05, 0.1, 0.16, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0)
READY_BUCKETS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 1.5, 3.0, 10.0, 30.0, 60.0, 120.0)

EXPORT_MS = "RAY_metrics_report_interval_ms"  # Ray's own setting, 10 s unless set and never under 1 s
REFRESH_S = max(1.0, float(os.environ.get(EXPORT_MS, 10_000)) / 1e3) / 2

SAMPLED = 4  # one in so many frames is measured: over Ray an observation costs as much as the frame's Ogg

LEFT = "left"  # the client went
FAILED = "failed"  # an error of our own that no class stands for


@dataclass(frozen=True)
class Series:
    """One series. `kind`: counter, gauge or histogram."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


# Gateway
SESSIONS_OPEN = Series(
    "personaplex_sessions_open", "gauge", "Sessions a gateway holds, from the upgrade to the end of its work."
)
SESSIONS_LIVE = Series("personaplex_sessions_live", "gauge", "Sessions past the handshake.")
SESSIONS_QUEUED = Series("personaplex_sessions_queued", "gauge", "Sessions waiting for a slot.")
CALLERS = Series("personaplex_callers", "gauge", "Keys and addresses that hold a counted session.")
TASKS = Series(
    "personaplex_gateway_tasks",
    "gauge",
    "Tasks of a gateway's event loop; without sessions it goes back to what it was.",
)
SESSIONS_ADMITTED = Series("personaplex_sessions_admitted", "counter", "Sessions that got a slot.")
SESSIONS_REFUSED = Series(
    "personaplex_sessions_refused",
    "counter",
    "Sessions that ended before the handshake, by cause and protocol (chat, live, realtime ...).",
    ("cause", "protocol"),
)
SESSIONS_ENDED = Series(
    "personaplex_sessions_ended", "counter", "Sessions that were live.", ("cause", "protocol")
)
READY_SECONDS = Series(
    "personaplex_session_ready_seconds",
    "histogram",
    "From the upgrade to the handshake, by phase: lease (a slot was free) or queue (none was), connect, "
    "prefill, handshake (all of it).",
    ("phase",),
    READY_BUCKETS,
)
FRAME_SECONDS = Series(
    "personaplex_frame_latency_seconds",
    "histogram",
    "Added by the service: from a user's decoded frame to the agent's frame that answers it; one in four.",
    (),
    LATENCY_BUCKETS,
)
TRANSCODE_SECONDS = Series(
    "personaplex_transcode_seconds",
    "histogram",
    "Opus and Ogg work of one frame, both ways; one in four.",
    (),
    (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05),
)

UNDERRUNS = Series(
    "personaplex_underruns", "counter", "Pages that left too late to follow the one before: gaps in speech."
)
STREAM_ERRORS = Series(
    "personaplex_stream_errors",
    "counter",
    "Faults of clients, by kind: packet (Opus, concealed), page (Ogg, dropped), resync (Ogg, junk), message "
    "(empty, text or unknown: ignored).",
    ("kind",),
)
PROMPT_CHARACTERS = Series(
    "personaplex_prompt_characters",
    "histogram",
    "Length of role texts.",
    (),
    (50, 100, 200, 400, 800, 1_600, 3_200),
)
RECORDS = Series(
    "personaplex_records",
    "counter",
    "Records, by result: kept, failed (the disk was full, gone or too slow; the session went on unrecorded), "
    "uploaded, upload_failed (tried again), expired, look_failed (the folder could not be looked after).",
    ("result",),
)

KEY_SECONDS = Series(
    "personaplex_key_seconds",
    "counter",
    "Seconds of conversation by the label of the key, as the keys file gives it.",
    ("label",),
)
OWN_VOICES = Series(
    "personaplex_own_voices",
    "counter",
    "Uploads of own voices, by result: made, or the class of the error that refused it.",
    ("result",),
)
KEYS_RELOADS = Series(
    "personaplex_keys_reloads",
    "counter",
    "Readings of a keys file that has changed, by result: loaded or failed (the old keys stay).",
    ("result",),
)
TRANSCRIPTION_LAG = Series(
    "personaplex_transcription_lag_seconds",
    "histogram",
    "From the end of a piece of the user's speech to its words.",
    (),
    (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0),
)
TRANSCRIPTION_BACKLOG = Series(
    "personaplex_transcription_backlog_seconds", "gauge", "Speech at or on its way to a transcriber."
)
TRANSCRIPTION_DROPPED = Series(
    "personaplex_transcription_dropped_seconds",
    "counter",
    "Speech without a text, by reason: behind (transcribers cannot keep up), unavailable (there is none, or "
    "it did not answer), detector (the gateway had no time to listen).",
    ("reason",),
)

FAILOVERS = Series(
    "personaplex_failovers",
    "counter",
    "Searches for another replica for a live session, by outcome: continued (another replica went on), "
    "recovered (its own answered again first), refused (none knows its log), no_capacity, failed.",
    ("outcome",),
)
RESUMES = Series(
    "personaplex_resumes",
    "counter",
    "Clients that came back to a session, by outcome: continued, refused (no session for this token), failed "
    "(no slot, or none that could go on).",
    ("outcome",),
)
MOVES = Series(
    "personaplex_moves",
    "counter",
    "Sessions to be brought from a replica that goes to another one, by outcome: continued, refused (none "
    "knows its log), no_capacity, failed; after the last three they stayed.",
    ("outcome",),
)
DETACHED = Series(
    "personaplex_sessions_detached", "gauge", "Sessions without a slot whose clients may come back."
)
FAILOVER_SECONDS = Series(
    "personaplex_failover_seconds",
    "histogram",
    "Of those that continued, by phase: detection, slot (lease and connection), rebuild (log sent to slot "
    "live), answer (to the first frame), gap (all of it, from the last answer of the old replica to the "
    "first of the new one), catch_up (from slot live until no frame waits any more).",
    ("phase",),
    GAP_BUCKETS,
)

# Transcriber
TRANSCRIBER_READY = Series("personaplex_transcriber_ready", "gauge", "1 with its model loaded, else 0.")
TRANSCRIPTION_FACTOR = Series(
    "personaplex_transcription_real_time_factor",
    "histogram",
    "Seconds of work for a second of speech.",
    (),
    (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0),
)
TRANSCRIPTION_SPEECH = Series(
    "personaplex_transcription_speech_seconds", "counter", "Speech that was transcribed."
)
TRANSCRIPTION_WORK = Series(
    "personaplex_transcription_work_seconds", "counter", "Time that transcribing it took."
)

# Both
FRAMES_DROPPED = Series(
    "personaplex_frames_dropped",
    "counter",
    "Frames lost by the service, by place: early (no slot was ready yet), link_in and link_out (media link), "
    "inbox, pacer, silence.",
    ("place",),
)

# Replica
SLOTS_TOTAL = Series("personaplex_slots", "gauge", "Slots of the replica.")
SLOTS_USED = Series("personaplex_slots_used", "gauge", "Slots held by a lease.")
TICK_SECONDS = Series("personaplex_tick_seconds", "histogram", "One engine step.", (), TICK_BUCKETS)
TICK_SLOTS = Series(
    "personaplex_tick_slots", "histogram", "Sessions in one engine step.", (), (1, 2, 4, 8, 16, 32, 64, 128)
)
PREFILL_SECONDS = Series(
    "personaplex_prefill_seconds", "histogram", "One piece of one prompt.", (), TICK_BUCKETS
)
REBUILD_SECONDS = Series(
    "personaplex_rebuild_seconds",
    "histogram",
    "From a session's log in the replica to a slot that goes on with it, the wait for others included.",
    (),
    READY_BUCKETS,
)
FRAMES_LATE = Series(
    "personaplex_frames_late", "counter", "Frames answered more than 80 ms after the replica got them."
)
TICKS_LATE = Series("personaplex_ticks_late", "counter", "Engine steps that took longer than a frame, 80 ms.")
INBOX_FRAMES = Series(
    "personaplex_inbox_frames", "gauge", "Frames that wait in all inboxes while a step runs."
)
VOICE_CACHE = Series(
    "personaplex_voice_cache",
    "counter",
    "Prompts begun, by whether the voice was in the cache: hit or miss.",
    ("result",),
)
POSITIONS = Series("personaplex_positions", "gauge", "Positions of keys and values that open sessions hold.")
DEVICE_BYTES = Series("personaplex_device_bytes", "gauge", "Accelerator memory in use.")
LOAD_SECONDS = Series(
    "personaplex_load_seconds", "gauge", "What it took to load the weights and warm up, once at the start."
)

ALL = tuple(value for value in list(globals().values()) if isinstance(value, Series))

# Any: Ray annotates label tuples as of length one.
_KINDS: Mapping[str, Any] = {
    "counter": metrics.Counter,
    "gauge": metrics.Gauge,
    "histogram": metrics.Histogram,
}
_PAGE_KINDS: Mapping[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class Metrics:
    """Publishes series from one process; made inside a Serve replica, so that they carry its labels.

    With `page` they are kept for `text` too, without Ray's prefix and labels: for one machine, one process.
    """

    def __init__(self, *series: Series, page: bool = False) -> None:
        self._published: dict[str, Any] = {one.name: _create(one) for one in series}
        self._levels: dict[str, float] = {}  # of the gauges, as last set
        self._registry = CollectorRegistry()
        self._shown: dict[str, Any] = {one.name: _show(one, self._registry) for one in series if page}

    def add(self, series: Series, amount: float = 1.0, **labels: str) -> None:
        if amount > 0:
            self._published[series.name].inc(amount, tags=labels)
            if self._shown:
                self._on_page(series, labels).inc(amount)

    def set(self, series: Series, value: float) -> None:
        """Of gauges, which have no labels. One that is as it was costs nothing."""
        if self._levels.get(series.name) == value:
            return
        self._levels[series.name] = value
        self._published[series.name].set(value)
        if self._shown:
            self._on_page(series, {}).set(value)

    def observe(self, series: Series, value: float, **labels: str) -> None:
        self._published[series.name].observe(value, tags=labels)
        if self._shown:
            self._on_page(series, labels).observe(value)

    async def keep(self, measure: Callable[[], None] = lambda: None) -> None:
        """Calls `measure`, which may set gauges, and sets every gauge again, for ever; to be run as a task of
        the process that publishes them."""
        while True:
            await asyncio.sleep(REFRESH_S)
            measure()
            for name, value in self._levels.items():
                self._published[name].set(value)

    def text(self) -> bytes:
        """The page, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _on_page(self, series: Series, labels: Mapping[str, str]) -> Any:
        shown = self._shown[series.name]
        return shown.labels(**labels) if labels else shown


def gateway_metrics(page: bool = False) -> Metrics:
    return Metrics(
        SESSIONS_OPEN,
        SESSIONS_LIVE,
        SESSIONS_QUEUED,
        CALLERS,
        TASKS,
        SESSIONS_ADMITTED,
        SESSIONS_REFUSED,
        SESSIONS_ENDED,
        READY_SECONDS,
        FRAME_SECONDS,
        TRANSCODE_SECONDS,
        FRAMES_DROPPED,
        UNDERRUNS,
        STREAM_ERRORS,
        PROMPT_CHARACTERS,
        RECORDS,
        KEY_SECONDS,
        KEYS_RELOADS,
        OWN_VOICES,
        TRANSCRIPTION_LAG,
        TRANSCRIPTION_BACKLOG,
        TRANSCRIPTION_DROPPED,
        FAILOVERS,
        FAILOVER_SECONDS,
        RESUMES,
        MOVES,
        page=page,
    )


def replica_metrics() -> Metrics:
    return Metrics(
        SLOTS_TOTAL,
        SLOTS_USED,
        DETACHED,
        TICK_SECONDS,
        TICK_SLOTS,
        PREFILL_SECONDS,
        REBUILD_SECONDS,
        FRAMES_LATE,
        FRAMES_DROPPED,
        TICKS_LATE,
        INBOX_FRAMES,
        VOICE_CACHE,
        POSITIONS,
        DEVICE_BYTES,
        LOAD_SECONDS,
    )


def transcriber_metrics() -> Metrics:
    return Metrics(TRANSCRIBER_READY, TRANSCRIPTION_FACTOR, TRANSCRIPTION_SPEECH, TRANSCRIPTION_WORK)


def cause(error: PersonaplexError | None) -> str:
    """The `cause` label of an ended session: the class of our own error, or that the client left."""
    return LEFT if error is None else type(error).__name__


def _show(series: Series, registry: CollectorRegistry) -> Any:
    extra = {"buckets": series.buckets} if series.kind == "histogram" else {}
    return _PAGE_KINDS[series.kind](series.name, series.help, series.labels, registry=registry, **extra)


def _create(series: Series) -> Any:
    extra = {"boundaries": list(series.buckets)} if series.kind == "histogram" else {}
    return _KINDS[series.kind](series.name, description=series.help, tag_keys=series.labels, **extra)
