"""Every series moves where it should, on a live service; logs and spans of a session say what happened."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import FleetMetrics, Samples, parse, value
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serving import CLUSTER_ENVIRONMENT, Service, connect, running, speech

from deployments import logs, metrics
from deployments.gateway import tracing
from deployments.gateway.stats import SessionStats
from deployments.gateway.tracing import Trace
from deployments.metrics import Series
from personaplex.audio.transcoder import Transcoder
from personaplex.config import FRAME_SECONDS
from personaplex.errors import ConfigError, SessionLost
from personaplex.session.pacer import SLACK_S, Pacer

SLOW = {  # every step takes longer than a frame
    "table": "steps",
    "source": "derived",
    "contexts": [0],
    "batches": [1],
    "tick_ms": [[130]],
    "prefill_positions": [1],
    "prefill_ms": [1],
}
# As Ray keeps a gauge for two intervals after its last export; and once more as long.
FORGOTTEN_S = 4.5 * int(CLUSTER_ENVIRONMENT[metrics.EXPORT_MS]) / 1e3


@pytest.fixture(scope="module")
def service(cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    table = tmp_path_factory.mktemp("steps") / "slow.json"
    table.write_text(json.dumps(SLOW))
    engine = {"model": "simulated", "step_times": table, "slots": 1, "burst_s": 0.16}
    with running(cluster, **engine, metrics_page=True, session_limit_s=90.0) as service:
        yield service


def page(service: Service) -> Samples:
    return parse(service.get("metrics").text, ("cause", "phase", "place", "kind", "protocol"))


async def troubled_session(service: Service) -> None:
    """Speech with a damaged page, junk and a packet that is none, while a second caller waits in line."""
    async with connect(service) as first:
        await first.headers()
        await first.until(lambda heard: heard.live)
        assert value(page(service), metrics.SESSIONS_LIVE) == 1
        async with connect(service) as second:
            await second.until(lambda heard: heard.queue)
            assert value(page(service), metrics.SESSIONS_QUEUED) == 1
            assert value(page(service), metrics.SESSIONS_OPEN) == 2
            assert value(page(service), metrics.TASKS) > 2
            frames = np.split(speech(1.6), 20)
            for number, frame in enumerate(frames):
                data = first.transcoder.send(frame)
                if number == 3:
                    data = data[:-1] + bytes([data[-1] ^ 1])  # its checksum is wrong now
                if number == 6:
                    data = b"junk" + data
                await first.send(data)
                await first.socket.send("not in the protocol")
                await asyncio.sleep(FRAME_SECONDS)
            await first.until(lambda heard: len(heard.pages) > 5)
            await first.socket.close()
            await second.headers()
            await second.until(lambda heard: heard.live)
    async with connect(service, voice_prompt="nobody") as unknown:
        await unknown.until_closed()


def test_every_series_of_a_live_service_moves(service: Service) -> None:
    asyncio.run(troubled_session(service))
    samples = FleetMetrics(service).wait(
        (metrics.SESSIONS_ADMITTED, {}),
        (metrics.SESSIONS_REFUSED, {"cause": "UnknownVoice", "protocol": "chat"}),
        (metrics.SESSIONS_ENDED, {"cause": "left", "protocol": "chat"}),
        *((metrics.READY_SECONDS, {"phase": phase}) for phase in ("lease", "queue", "connect", "prefill")),
        (metrics.READY_SECONDS, {"phase": "handshake"}),
        (metrics.FRAME_SECONDS, {}),
        (metrics.TRANSCODE_SECONDS, {}),
        (metrics.UNDERRUNS, {}),
        (metrics.STREAM_ERRORS, {"kind": "page"}),
        (metrics.STREAM_ERRORS, {"kind": "resync"}),
        (metrics.STREAM_ERRORS, {"kind": "message"}),
        (metrics.PROMPT_CHARACTERS, {}),
        (metrics.FRAMES_DROPPED, {"place": "inbox"}),
        (metrics.SLOTS_TOTAL, {}),
        (metrics.TICK_SECONDS, {}),
        (metrics.TICK_SLOTS, {}),
        (metrics.TICKS_LATE, {}),
        (metrics.PREFILL_SECONDS, {}),
        (metrics.FRAMES_LATE, {}),
        (metrics.INBOX_FRAMES, {}),
        (metrics.VOICE_CACHE, {"result": "miss"}),
        (metrics.VOICE_CACHE, {"result": "hit"}),
        (metrics.LOAD_SECONDS, {}),
    )
    gateway = (
        metrics.SESSIONS_OPEN,
        metrics.SESSIONS_LIVE,
        metrics.SESSIONS_QUEUED,
        metrics.CALLERS,
        metrics.TASKS,
    )
    for series in (*gateway, metrics.SLOTS_USED, metrics.DEVICE_BYTES):
        assert ("ray_" + series.name, frozenset()) in samples
    assert value(samples, metrics.SESSIONS_ADMITTED) == 3  # the unknown voice, too, got as far as a slot
    assert value(samples, metrics.TICKS_LATE) == value(samples, metrics.TICK_SECONDS)


def test_slots_and_positions_are_seen_while_they_are_held(service: Service) -> None:
    async def hold() -> Samples:
        async with connect(service) as client:
            await client.headers()
            await client.until(lambda heard: heard.live)
            await client.speak(speech(0.8))
            return await asyncio.to_thread(
                FleetMetrics(service).wait, (metrics.SLOTS_USED, {}), (metrics.POSITIONS, {})
            )

    samples = asyncio.run(hold())
    assert value(samples, metrics.SLOTS_USED) == 1
    assert value(samples, metrics.POSITIONS) > 125  # the voice's prompt at least


def test_the_page_is_there_only_where_it_is_asked_for(echo_app: Service, service: Service) -> None:
    assert value(page(service), metrics.SESSIONS_ADMITTED) > 0
    assert echo_app.get("metrics").status_code == 404


def test_gauges_stay_while_nothing_changes(service: Service) -> None:
    """Longer than Ray keeps what is set once; the load time was, when the replica started."""
    (replica,) = service.replicas()
    started = Path(f"/proc/{replica.pid}").stat().st_ctime
    time.sleep(max(0.0, started + FORGOTTEN_S - time.time()))
    samples = FleetMetrics(service).read()
    assert value(samples, metrics.LOAD_SECONDS) > 0
    assert value(samples, metrics.SLOTS_TOTAL) == 1
    assert ("ray_" + metrics.SESSIONS_LIVE.name, frozenset()) in samples


LABELS = {"cause", "phase", "place", "kind", "result", "outcome", "protocol", "label", "reason"}


def test_names_are_prometheus_names_and_labels_are_closed_sets() -> None:
    for series in metrics.ALL:
        assert re.fullmatch(r"personaplex_[a-z]+(_[a-z]+)*", series.name)
        assert not series.name.endswith("_total"), "Prometheus adds it"
        assert (series.kind == "histogram") == bool(series.buckets)
        assert list(series.buckets) == sorted(series.buckets)
        assert set(series.labels) <= LABELS
    assert FRAME_SECONDS in metrics.TICK_BUCKETS
    assert FRAME_SECONDS in metrics.LATENCY_BUCKETS


def test_a_page_that_leaves_too_late_is_counted_as_a_gap() -> None:
    pacer = Pacer()
    now = 0.0
    for gap in (0.0, 0.08, 0.069 + SLACK_S, 0.08, 0.5, 0.08):
        now += gap
        pacer.push(b"page", now)
        pacer.release(now)
    assert pacer.late == 1  # the first page and one within the slack are in time


# Logs and spans


class Recorded:
    """Takes the place of the published series."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, dict[str, str]]] = []

    def add(self, series: Series, amount: float = 1.0, **labels: str) -> None:
        self.seen.append((series.name, amount, labels))

    observe = set = add


@contextlib.contextmanager
def captured(form: logs.Form) -> Iterator[io.StringIO]:
    """What a process of the service logs in `form`."""
    logger = logging.getLogger("deployments")
    kept, propagate = logger.handlers[:], logger.propagate
    logger.handlers.clear()
    stream = io.StringIO()
    try:
        logs.configure("info", form)
        handler = logger.handlers[0]
        assert isinstance(handler, logging.StreamHandler)
        handler.setStream(stream)
        yield stream
    finally:
        logger.handlers[:], logger.propagate = kept, propagate


def ended(trace: Trace | None = None, error: SessionLost | None = None) -> Any:
    recorded = Recorded()
    account = SessionStats("abc", recorded, trace)  # type: ignore[arg-type]
    account.phase("lease", 0.02)
    account.note(replica="r1", prompt_characters=12)
    account.live()
    account.close(error, Pacer(), Transcoder(), 0)
    return recorded


def test_the_last_line_of_a_session_is_json_with_what_a_bug_report_needs() -> None:
    with captured("json") as stream:
        ended(error=SessionLost("gone"))
    line = json.loads(stream.getvalue())
    assert line["message"].startswith("session abc ended: SessionLost")
    expected = {"session": "abc", "cause": "SessionLost", "replica": "r1", "lease_s": 0.02}
    assert {key: line[key] for key in expected} == expected
    assert {"talked_s", "frames_in", "frames_out", "underruns", "stream_errors"} <= set(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])


def test_text_logs_show_the_message_only() -> None:
    with captured("text") as stream:
        ended()
    assert stream.getvalue().rstrip().endswith("session abc ended: left, 0.0 s, 0 frames in, 0 out")


def test_json_lines_keep_an_exception_on_one_line() -> None:
    with captured("json") as stream:
        try:
            raise ValueError("no")
        except ValueError:
            logging.getLogger("deployments.test").exception("it failed")
    assert stream.getvalue().count("\n") == 1
    assert "ValueError: no" in json.loads(stream.getvalue())["exception"]


def test_a_session_becomes_a_span_with_its_phases_below_it() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    ended(Trace(provider.get_tracer("test")), SessionLost("gone"))
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"session", "lease", "conversation"}
    root = spans["session"]
    assert all(spans[name].parent.span_id == root.context.span_id for name in ("lease", "conversation"))
    assert root.attributes["cause"] == "SessionLost"
    assert root.status.status_code.name == "ERROR"
    assert abs(root.end_time / 1e9 - time.time()) < 60  # the wall clock, not the monotonic one
    assert spans["lease"].end_time - spans["lease"].start_time == pytest.approx(0.02e9, rel=0.01)


def test_tracing_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    with pytest.raises(ConfigError, match=r"personaplex-serve\[tracing\]"):
        tracing.connect()
