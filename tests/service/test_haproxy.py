"""HAProxy in front of the service: a conversation through it, and nothing of it left afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ports import free_port
from rawsocket import SOURCE, Raw, Target
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE
from serving import Client, Service, connect, speech

from deployments import connections, haproxy
from deployments.processes import below, lives
from deployments.settings import HAPROXY_SWITCH
from personaplex.errors import ConfigError
from personaplex.server import main

LEASH = [sys.executable, "-c", "from deployments.haproxy import main; main()"]
RUN = "import subprocess, sys; subprocess.run(sys.argv[1:])"
CONFIG = """
global
    stats socket {folder}/admin.sock
defaults
    mode http
    option httplog
    timeout connect 1s
    timeout client 1s
    timeout server 1s
frontend prometheus
    bind :{metrics}
listen one
    bind 127.0.0.1:{port}
listen stats
  bind *:{stats}
"""


def _no_haproxy() -> bool:
    try:
        haproxy.real_binary()
    except ConfigError:
        return True
    return sys.platform != "linux"


needs_haproxy = pytest.mark.skipif(_no_haproxy(), reason="no HAProxy for this platform")


def test_services_side_by_side_share_no_port_and_no_file(tmp_path: Path) -> None:
    one, other = (haproxy.environment(tmp_path / name, 1_865.0) for name in ("a", "b"))
    for name in (*haproxy.PORTS, *haproxy.FILES):
        assert one[name] != other[name]
    assert len({one[name] for name in haproxy.PORTS}) == len(haproxy.PORTS)
    assert int(one["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > 1_865
    assert int(one["RAY_SERVE_PORT_QUARANTINE_S"]) > int(one["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"])


def test_https_is_refused_rather_than_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--haproxy", "--ssl", str(tmp_path), "--model", "echo"]) == 2
    assert "no https" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_environment_is_as_before_when_the_command_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr("deployments.command._serve", lambda *_: seen.append(dict(os.environ)))
    monkeypatch.setenv(haproxy.PORTS[0], "9101")
    before = dict(os.environ)
    assert main(["--haproxy", "--port", str(free_port()), "--model", "echo"]) == 0
    (during,) = seen
    assert during[HAPROXY_SWITCH] == "1"
    assert during[haproxy.PORTS[0]] == "9101", "what an operator sets stays"
    folder = Path(during["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
    assert not folder.exists()
    # 56 characters of Ray's node id, and HAProxy's suffix while it renews the socket
    assert len(str(folder / ("n" * 56) / "metrics.sock.1234567.tmp")) < 108
    assert dict(os.environ) == before


@needs_haproxy
def test_haproxy_goes_when_its_parent_is_killed(tmp_path: Path) -> None:
    (port, *others), config = [free_port() for _ in range(3)], tmp_path / "haproxy.cfg"
    config.write_text(CONFIG.format(folder=tmp_path, port=port, metrics=others[0], stats=others[1]))
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys; subprocess.run(sys.argv[1:])",
            *LEASH,
            "-db",
            "-f",
            config,
        ]
    )
    _until(lambda: _listens(port))
    assert {f"127.0.0.1:{other}" for other in others} <= _addresses(), "its doors for operators"
    parent.kill()
    parent.wait()
    _until(lambda: not _listens(port))
    assert not _listens(port)


def _addresses() -> set[str]:
    """Addresses of this machine at which something listens, by IPv4."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    found = set()
    for _, local, _, state, *_ in rows:
        address, _, port = local.partition(":")
        if state == "0A":
            found.add(f"{socket.inet_ntoa(bytes.fromhex(address)[::-1])}:{int(port, 16)}")
    return found


def test_what_serve_leaves_open_is_closed() -> None:
    """Serve's own template, so that another Serve is noticed here first."""
    served = HAPROXY_CONFIG_TEMPLATE.replace("{{ config.metrics_port }}", "9101").replace(
        "{{ config.stats_port }}", "8404"
    )
    once = haproxy.closed(served)
    assert "bind 127.0.0.1:9101" in once
    assert "bind 127.0.0.1:8404" in once
    assert "httplog" not in once
    assert "%HPO" in once
    defaults = once[once.index("defaults\n") : once.index("frontend ")]
    assert "    timeout http-request 10s\n    option forwardfor\n" in defaults
    assert haproxy.REQUEST_TIMEOUT_S == connections.REQUEST_TIMEOUT_S
    assert len(once.splitlines()) == len(served.splitlines()) + 2
    assert haproxy.closed(once) == once
    with pytest.raises(ConfigError, match="statistics"):
        haproxy.closed(served.replace("listen stats", "listen other"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells whose child a process is")
def test_an_orphan_below_is_found_and_ended_and_who_is_spared_is_not() -> None:
    script = """
import os, subprocess, time
from deployments.processes import adopt_orphans, below, end_all_below
other = subprocess.Popen(["sleep", "60"])
adopt_orphans()
parent = subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60"])
while len(below(os.getpid())) < 4:
    time.sleep(0.01)
parent.kill()
parent.wait()
assert len(below(os.getpid())) == 3, "its children are ours now"
end_all_below(spared={other.pid})
assert below(os.getpid()) == [other.pid]
other.kill()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0, done.stderr


@needs_haproxy
def test_a_conversation_goes_through_it_and_a_clean_end_leaves_nothing() -> None:
    """The service is ended while the session lives, which kept HAProxy and its ports once."""

    async def talk(port: int, process: subprocess.Popen[str]) -> Client:
        async with connect(Service("", f"127.0.0.1:{port}")) as client:
            await client.talk(speech(0.8))
            process.send_signal(signal.SIGTERM)
            await client.until_closed()
        return client

    port = free_port()
    options = ("queue_limit=0", "sessions_per_address=1", "unlimited_networks=127.0.0.1")
    with _server(port, *options, "allowed_origins=https://a.example") as process:
        _check_refusals(Target("127.0.0.1", port))
        family = below(process.pid)
        assert "haproxy" in [Path(f"/proc/{pid}/comm").read_text().strip() for pid in family]
        assert asyncio.run(talk(port, process)).heard.pages
        assert process.wait(30) == 0
        _until(lambda: not any(map(lives, family)))
        assert not _listens(port)


def _check_refusals(target: Target) -> None:
    """HAProxy hands on a gateway's refusals as they are, and the client's own address with the upgrade."""
    with contextlib.ExitStack() as stack:

        def upgrade(*headers: str, source: str = SOURCE, path: str = target.path) -> str:
            raw = stack.enter_context(Raw(dataclasses.replace(target, path=path), source))
            return raw.upgrade(*headers)

        assert upgrade("Origin: https://b.example").startswith("HTTP/1.1 403")
        assert upgrade(path="/api/chat?seed=x").startswith("HTTP/1.1 400")
        assert upgrade().startswith("HTTP/1.1 101")
        own_limit = upgrade("X-Forwarded-For: 203.0.113.9")
        assert own_limit.startswith("HTTP/1.1 429")
        assert "retry-after: " in own_limit.lower()
        assert upgrade(source="127.0.0.3").startswith("HTTP/1.1 101"), (
            "another client, through the same proxy"
        )
        full = upgrade(source="127.0.0.1")
        assert full.startswith("HTTP/1.1 503"), full
        assert "retry-after: " in full.lower()
        plain = stack.enter_context(Raw(target))
        plain.request()
        assert plain.head().startswith("HTTP/1.1 426")
        slow = stack.enter_context(Raw(target))
        slow.request(end=False)
        slow.socket.settimeout(haproxy.REQUEST_TIMEOUT_S + 5)
        assert slow.head().startswith("HTTP/1.1 408")


@contextlib.contextmanager
def _server(port: int, *settings: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "personaplex.server", "--haproxy", "--model", "echo"]
    with subprocess.Popen(
        [*command, "--port", str(port), "--slots", "2", *(f"--set={one}" for one in settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **{name: str(free_port()) for name in haproxy.PORTS}},
    ) as process:
        assert process.stdout is not None
        said = list[str]()
        reader = threading.Thread(target=lambda stream: said.extend(stream), args=(process.stdout,))
        reader.start()
        try:
            _until(lambda: any(line.startswith("Open ") for line in said) or process.poll() is not None, 90.0)
            assert process.poll() is None, said
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            reader.join(30)


def _until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
