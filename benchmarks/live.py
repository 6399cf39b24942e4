"""A live service in processes of its own, for benchmarks that talk to it as clients do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deployments.haproxy import free_ports
from deployments.processes import below

START_TIMEOUT_S = 120.0
REPLICA = "ray::ServeReplica:default:"  # what Serve calls each process of a deployment
ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}
# HAProxy's own, which are fixed otherwise: one that is still leaving would be in the way
PORTS = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT")


@contextlib.contextmanager
def service(
    model: str,
    settings: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    checkout: Path | None = None,
) -> Iterator[str]:
    """`python -m personaplex.server` behind HAProxy, on a free port; gives its base address, without path.

    `checkout`: a folder with another version of this repository, which is started instead of this one. Raises
    SystemExit when it does not come up.
    """
    port, *others = free_ports(1 + len(PORTS))
    ports = {name: str(number) for name, number in zip(PORTS, others, strict=True)}
    flags = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    with tempfile.TemporaryFile("w+") as words:
        process = subprocess.Popen(
            [sys.executable, "-m", "personaplex.server", "--port", str(port), "--model", model, *flags],
            env={**os.environ, **ENVIRONMENT, **ports, **_imports(checkout), **(environment or {})},
            cwd=checkout,
            stdout=subprocess.DEVNULL,
            stderr=words,
        )
        try:
            base = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + START_TIMEOUT_S
            while info(base) is None:
                if process.poll() is not None or time.monotonic() > deadline:
                    words.seek(0)
                    raise SystemExit("the service did not start:\n" + "".join(words.readlines()[-20:]))
                time.sleep(0.5)
            yield base
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _imports(checkout: Path | None) -> dict[str, str]:
    """So that every process of the service finds the code of `checkout` before what is installed."""
    return {} if checkout is None else {"PYTHONPATH": str(checkout)}


def processes() -> dict[str, list[int]]:
    """The processes of the running service that this one started, by deployment: `gateway`, `replica`, ..."""
    found: dict[str, list[int]] = {}
    for pid in below(os.getpid()):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            name = Path(f"/proc/{pid}/cmdline").read_text()
            if name.startswith(REPLICA):  # and behind it, in a call, the method's name
                deployment = re.match(r"\w*", name.removeprefix(REPLICA))
                assert deployment is not None
                found.setdefault(deployment[0], []).append(pid)
    return found


def info(base: str) -> dict[str, Any] | None:
    """What the service says of itself; None while it says nothing, or has no replica."""
    try:
        with urllib.request.urlopen(f"{base}/api/info", timeout=5) as answer:
            data: dict[str, Any] = json.load(answer)
    except (OSError, urllib.error.URLError, ValueError):
        return None
    return data if data["replicas"] else None
