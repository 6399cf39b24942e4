"""`python -m personaplex.server` as a process of its own, for tests that watch or kill parts of it."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests
from ports import free_port
from serving import Service

from deployments import ingress
from deployments.processes import below

SLOTS = 4


class Hosted:
    """`personaplex.server` and everything below it."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port
        self.said: list[tuple[float, str]] = []  # lines, with the time each came
        self.service = Service("", f"127.0.0.1:{port}")

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append((time.monotonic(), line))

    def find(self, words: str, since: float = 0.0) -> float | None:
        """When a line with `words` first came at or after `since`."""
        return next((at for at, line in list(self.said) if at >= since and words in line), None)

    def named(self) -> dict[int, str]:
        """The service's processes, by the names Ray gives them."""
        found = {}
        for pid in below(self.process.pid):
            with contextlib.suppress(OSError):
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
        return found

    def pid(self, name: str) -> int:
        return next(pid for pid, command in self.named().items() if command.startswith(name))


GATEWAY, REPLICA = "ray::ServeReplica:default:gateway", "ray::ServeReplica:default:replica"
PROXY = "ray::ProxyActor"


@contextlib.contextmanager
def hosted(*flags: str, limits: bool = True) -> Iterator[Hosted]:
    """A service with SLOTS slots that is ready for sessions; gone at the end with everything below it.
    Without `limits` its proxies are as Serve makes them."""
    port = free_port()
    command = [sys.executable, "-m", "personaplex.server", "--model", "echo", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--slots", str(SLOTS), *flags]
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if not limits:
        environment[ingress.VARIABLE] = ""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        host = Hosted(process, port)
        reader = threading.Thread(target=host.read)
        reader.start()
        try:
            until(lambda: host.find("Open ") or process.poll() is not None, 120.0)
            assert process.poll() is None, host.said
            until(lambda: healthy(host, limits=limits), 30.0)
            yield host
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            reader.join(10)


def until(condition: Callable[[], Any], timeout_s: float) -> float:
    """Seconds until `condition()` is true; AssertionError after `timeout_s`."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, "waited in vain"
        time.sleep(0.02)
    return time.monotonic() - began


def healthy(host: Hosted, *, limits: bool = True) -> bool:
    """Whether sessions can be taken, by a proxy with its limits, or by one without."""
    with contextlib.suppress(requests.RequestException):
        limited = host.service.get("healthz").json()["proxy_limits"]
        return bool(limited is limits and host.service.info()["slots"])
    return False


def resident(pid: int) -> int:
    """Bytes of memory of one process; 0 for one that is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def cpu(pid: int) -> float:
    """Seconds of CPU one process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Memory:
    """Watches every process of a service while it is entered; `peak_mb` is the most one grew."""

    def __init__(self, host: Hosted) -> None:
        self._idle = {pid: resident(pid) for pid in host.named()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peak_mb = 0.0

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            grown = max(resident(pid) - idle for pid, idle in self._idle.items())
            self.peak_mb = max(self.peak_mb, grown / 1e6)


def open_to_the_network(host: Hosted) -> list[str]:
    """Where the service's processes listen that is not loopback, as `address port command`.

    Serve's own gRPC port of each of its processes is always there: Serve offers no address for it.
    """
    sockets = {}
    for table, loopback in (("tcp", "0100007F"), ("tcp6", "0000000000000000FFFF00000100007F")):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = row.split()
            address, _, port = local.partition(":")
            if state == "0A" and address not in (loopback, "00000000000000000000000001000000"):
                sockets[f"socket:[{rest[5]}]"] = f"{address} {int(port, 16)}"
    found = []
    for pid, command in host.named().items():
        for entry in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                where = sockets.get(os.readlink(entry))
                if where is not None:
                    found.append(f"{where} {command[:60]}")
    return sorted(set(found))
