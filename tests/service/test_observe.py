"""A real Prometheus reads a live service and evaluates the chart's rules over it."""

from __future__ import annotations

import asyncio
import shutil

import pytest
import ray
from exported import FleetMetrics
from ports import free_port
from serving import Service, connect, speech

from deployments import metrics
from loadtest import observe
from personaplex.errors import ConfigError

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is missing: apt-get install prometheus"
)


@needs_prometheus
def test_prometheus_sees_a_live_conversation(echo_app: Service, capsys: pytest.CaptureFixture[str]) -> None:
    async def talk_and_look() -> int:
        async with connect(echo_app) as client:
            await client.talk(speech(1.6))
            wanted = (metrics.SLOTS_USED, {}), (metrics.SESSIONS_LIVE, {})
            await asyncio.to_thread(FleetMetrics(echo_app).wait, *wanted)
            node = ray.nodes()[0]
            target = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
            options = ["--port", str(free_port()), "--target", target, "--timeout", "40"]
            return await asyncio.to_thread(observe.main, ["--once", *options])

    assert asyncio.run(talk_and_look()) == 0
    printed = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])
    assert float(printed["slots used"]) >= 1
    assert float(printed["sessions live"]) >= 1
    assert float(printed["slots"]) - float(printed["slots used"]) == float(printed["rule: free slots"])


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert observe.main(["--once"]) == 1
    assert "apt-get install prometheus" in capsys.readouterr().err


@needs_prometheus
def test_a_port_that_is_taken_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        observe.prometheus(["127.0.0.1:9"], port := free_port()),
        pytest.raises(ConfigError, match="port"),
        observe.prometheus(["127.0.0.1:9"], port),
    ):
        pass
