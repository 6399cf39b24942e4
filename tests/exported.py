"""The metrics of a running application, as Ray exports them to Prometheus."""

from __future__ import annotations

import re
import time
import urllib.request

import ray
from serving import Service

from deployments import metrics
from deployments.metrics import Series

HELD = (metrics.SESSIONS_OPEN, metrics.SESSIONS_LIVE, metrics.SESSIONS_QUEUED, metrics.CALLERS)  # by sessions
_SAMPLE = re.compile(r"(\w+)(?:\{([^}]*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parse(text: str, labels: tuple[str, ...]) -> Samples:
    """Values by name and by those of their labels that are in `labels`; equal ones add up."""
    samples: Samples = {}
    for line in text.splitlines():
        match = _SAMPLE.fullmatch(line)
        if match:
            kept = frozenset(pair for pair in _LABEL.findall(match[2] or "") if pair[0] in labels)
            samples[match[1], kept] = samples.get((match[1], kept), 0.0) + float(match[3])
    return samples


def value(samples: Samples, series: Series, **labels: str) -> float:
    """The value of a gauge or counter, the count of a histogram; 0 when it is not there."""
    suffix = {"counter": "_total", "gauge": "", "histogram": "_count"}[series.kind]
    for prefix in ("ray_", ""):
        key = (prefix + series.name + suffix, frozenset(labels.items()))
        if key in samples:
            return samples[key]
    return 0.0


def gauges(service: Service, *wanted: Series) -> dict[str, float]:
    """Gauges by name as the gateway has them now, from its own page; KeyError where one is not there."""
    samples = parse(service.get("metrics").text, ())
    return {one.name: samples[one.name, frozenset()] for one in wanted}


class FleetMetrics:
    """The series of one application, as Prometheus would read them from Ray on this machine."""

    def __init__(self, service: Service) -> None:
        node = ray.nodes()[0]
        self._url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        self._application = service.name

    def read(self) -> Samples:
        text = urllib.request.urlopen(self._url, timeout=5).read().decode()
        lines = [line for line in text.splitlines() if f'application="{self._application}"' in line]
        return parse("\n".join(lines), ("cause", "phase", "place", "kind", "result", "outcome", "protocol"))

    def wait(self, *wanted: tuple[Series, dict[str, str]]) -> Samples:
        """The samples once every one of `wanted` is above 0; Ray exports every few seconds."""
        deadline = time.monotonic() + 60
        while True:
            samples = self.read()
            missing = [(one.name, labels) for one, labels in wanted if not value(samples, one, **labels) > 0]
            if not missing:
                return samples
            assert time.monotonic() < deadline, missing
            time.sleep(0.5)
