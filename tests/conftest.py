"""What all tests share: one thread for torch, since 2 cores are all a test run may count on.

Triton's kernels run in its interpreter where there is no GPU; it looks at the variable when it is imported.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

from deployments.logs import LOGGERS

if TYPE_CHECKING:
    from serving import Service

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of a shell in the background ignores it
# For Ray, which looks when it is imported: listen on 127.0.0.1, and ask for a token everywhere.
os.environ |= {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def own_loggers() -> None:
    """A gateway or replica made within a test's process, for a module of tests too, sends our log lines to
    stderr and nowhere else. Each test begins with loggers as Python makes them."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(logging.NOTSET)
        logger.propagate, logger.handlers = True, []


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Ray and Serve on this machine, started once for all tests that ask; the address without a scheme."""
    from serving import ray_cluster

    with ray_cluster() as address:
        yield address


@pytest.fixture(scope="session")
def echo_app(cluster: str) -> Iterator[Service]:
    """An application that says back what it hears, for all modules that need no other settings."""
    from serving import running

    with running(cluster, model="echo", slots=4) as service:
        yield service
