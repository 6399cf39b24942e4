"""Faults of a local service's processes: SIGKILL, SIGSTOP for a while, links that are cut, full disks.

A link is cut by shutting down the replica's own socket, of which Linux gives a copy to root (pidfd_getfd):
the process lives on and hears of it as of any broken connection.

A full disk is a limit of zero bytes for whatever these processes write into a file: each write fails, as on a
full disk, with an OSError, but nothing else on the machine is hurt.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import requests
from hosted import GATEWAY, PROXY, REPLICA, Hosted

_PIDFD_GETFD = 438  # on every architecture
_ESTABLISHED = "01"


def replicas(host: Hosted) -> list[int]:
    """Processes of the replicas."""
    return _named(host, REPLICA)


def gateways(host: Hosted) -> list[int]:
    return _named(host, GATEWAY)


def proxies(host: Hosted) -> list[int]:
    """Whatever holds the clients' sockets: HAProxy where there is one, else Serve's own proxy."""
    found = [pid for pid, command in host.named().items() if Path(command.split(" ")[0]).name == "haproxy"]
    return found or _named(host, PROXY)


def _named(host: Hosted, name: str) -> list[int]:
    return [pid for pid, command in host.named().items() if command.startswith(name)]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def stop(pid: int, seconds: float) -> None:
    """The process stands still for so long."""
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def fill_disks(pids: list[int], seconds: float) -> None:
    """No file takes another byte from these processes for so long."""
    before = {pid: resource.prlimit(pid, resource.RLIMIT_FSIZE) for pid in pids}
    try:
        for pid, (_, hard) in before.items():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
        time.sleep(seconds)
    finally:
        for pid, limits in before.items():
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


def move(host: Hosted, key: str, session: str) -> str:
    """Has one session brought to another replica; what came of it."""
    answer = requests.post(
        f"http://{host.service.base}/api/admin/moves",
        json={"session": session},
        headers={"authorization": f"Bearer {key}"},
        timeout=60,
    )
    if not answer.ok:
        return f"HTTP {answer.status_code}"
    (moved,) = answer.json()["sessions"]
    return str(moved["outcome"])


def cut(pid: int, ports: range) -> int:
    """Cuts the process' connections at these local ports; how many there were. Raises OSError where the
    kernel gives no copies of sockets."""
    inodes, count = set(_established(ports)), 0
    pidfd = os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                if os.readlink(entry) in inodes:
                    _shut_down(pidfd, int(entry.name))
                    count += 1
    finally:
        os.close(pidfd)
    return count


def _established(ports: range) -> Iterator[str]:
    for row in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *rest = row.split()
        if state == _ESTABLISHED and int(local.partition(":")[2], 16) in ports:
            yield f"socket:[{rest[5]}]"


def _shut_down(pidfd: int, number: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    copy = libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
    if copy < 0:
        raise OSError(ctypes.get_errno(), "the kernel gives no copy of another process' socket")
    with socket.socket(fileno=copy) as sock:
        sock.shutdown(socket.SHUT_RDWR)
