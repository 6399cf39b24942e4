"""What the tests of commands and of the operator's tool share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Say
from kube.apiserver import ApiServer
from kube.world import Clock, connected

from k8s.cluster import Cluster


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Say:
    return Say(capsys, caplog)


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cluster(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> Iterator[Cluster]:
    """The operator's connection to `server`."""
    with connected(server, tmp_path, monkeypatch, clock) as found:
        yield found
