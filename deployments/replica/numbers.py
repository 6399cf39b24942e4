"""What a replica publishes of its engine: one observation a batch, totals by what they have grown."""

from __future__ import annotations

from deployments import metrics
from deployments.metrics import Metrics, Series
from personaplex.engine.events import Batch, Opened
from personaplex.engine.loop import EngineLoop


class EngineNumbers:
    """Of one engine, through `published`."""

    def __init__(self, published: Metrics, engine: EngineLoop) -> None:
        self._metrics, self._engine = published, engine
        self._published: dict[str, int] = {}  # totals as last published

    def publish(self, batch: Batch) -> None:
        """After each batch of the engine."""
        if batch.work == "tick":
            self._metrics.observe(metrics.TICK_SECONDS, batch.seconds)
            self._metrics.observe(metrics.TICK_SLOTS, batch.slots)
        elif batch.work == "prefill":
            self._metrics.observe(metrics.PREFILL_SECONDS, batch.seconds)
        elif batch.work == "rebuild":
            for event in batch.events:
                if isinstance(event, Opened):
                    self._metrics.observe(metrics.REBUILD_SECONDS, event.prefill_s)
        counters, usage = self._engine.counters, self._engine.usage
        self._publish_total(metrics.FRAMES_DROPPED, counters.frames_dropped, place="inbox")
        self._publish_total(metrics.FRAMES_LATE, counters.frames_late)
        self._publish_total(metrics.TICKS_LATE, counters.ticks_late)
        self._publish_total(metrics.VOICE_CACHE, usage.voice_hits, result="hit")
        self._publish_total(metrics.VOICE_CACHE, usage.voice_misses, result="miss")
        for series, value in (
            (metrics.INBOX_FRAMES, counters.frames_waiting),
            (metrics.POSITIONS, usage.positions),
            (metrics.DEVICE_BYTES, usage.device_bytes),
        ):
            self._metrics.set(series, value)

    def _publish_total(self, series: Series, total: int, **labels: str) -> None:
        """Adds to a counter what a total has grown by."""
        key = series.name + "".join(labels.values())
        self._metrics.add(series, total - self._published.get(key, 0), **labels)
        self._published[key] = total
