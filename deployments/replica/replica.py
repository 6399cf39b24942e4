"""The replica deployment: one engine with its thread, leases over Serve, media over TCP.

The lease call ends when its slot is free (`sessions.py`), so Serve never counts a slot as free before it is.
When the engine fails, no new session is taken and the health check fails: Serve then replaces the process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments import garbage, logs, metrics
from deployments.keysync import KeySync
from deployments.parts import ReplicaSettings
from deployments.replica.models import load
from deployments.replica.questions import Questions
from deployments.replica.reporter import Reporter
from deployments.replica.sessions import Sessions
from deployments.settings import AUTO
from deployments.wire.link import listen
from deployments.wire.messages import Grant, LeaseRequest, Refusal, ReplicaStatus
from deployments.wire.tls import replica_context
from personaplex.engine.interface import Loaded, Stepper

logger = logging.getLogger(__name__)

_ANYWHERE = ("0.0.0.0", "::")


class Replica:
    """Made by Serve, one per process; every method runs on its event loop but `_load`."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: ReplicaSettings, fleet: DeploymentHandle[Any]
    ) -> None:
        logs.configure(settings.log_level, settings.log_format)
        self._settings = settings
        self._name = serve.get_replica_context().replica_tag
        self._metrics = metrics.replica_metrics()
        self._keys = KeySync(fleet)
        self._sessions = Sessions(
            settings, self._load, self._metrics, self._publish_slots, self._keys.keyring, self._name
        )
        self._engine = self._sessions.engine
        began = time.monotonic()
        started = asyncio.wrap_future(self._engine.start())
        self._slots = self._sessions.slots = await asyncio.wait_for(started, settings.load_timeout_s)
        self._sessions.questions = Questions(
            self._loaded.engine.count_tokens, settings.prompt_tokens, self._engine.encode
        )
        tls = None
        if settings.media_tls != "off":
            tls, self._sessions.certificate = await asyncio.to_thread(replica_context, settings.media_tls_dir)
        self._host = settings.media_host or _node_address()
        await asyncio.wait_for(self._keys.known(), settings.load_timeout_s)
        self._server, self._port = await listen(
            self._sessions.accept,
            self._host,
            settings.media_port_min,
            settings.media_port_max,
            tls=tls,
            tls_timeout_s=settings.lease_timeout_s,
        )
        self._reporter = Reporter(fleet, self._status, self._sessions.close)
        self._publish_slots()
        loaded = time.monotonic() - began
        self._metrics.set(metrics.LOAD_SECONDS, loaded)
        self._keeping = asyncio.ensure_future(self._metrics.keep())
        garbage.settle()
        logger.info("replica ready: %d slots, %.1f s to load", self._slots, loaded)

    async def lease(self, request: LeaseRequest) -> AsyncIterator[Grant | Refusal]:
        """Holds one slot; see the module. Serve admits at most `slots` of these calls at a time."""
        if not self._sessions.accepting or self._name in request.excluded:
            yield Refusal()
            return
        token, holder = self._sessions.holders.hold(request)
        host, port = self._address()
        try:
            yield Grant(host, port, token, self._name, self._slots)
            await holder.freed.wait()
        finally:
            self._sessions.holders.drop(token)

    async def check_health(self) -> None:
        """Raises EngineFault when the engine's thread has ended or is stuck."""
        self._engine.check(self._settings.stall_limit_s)

    async def record_routing_stats(self) -> dict[str, Any]:
        return {"accepting": self._sessions.accepting, "voices": list(self._engine.usage.voices)}

    async def __del__(self) -> None:
        if hasattr(self, "_reporter"):
            self._keeping.cancel()
            self._keys.close()
            await self._reporter.close()
            self._server.close()
            await asyncio.to_thread(self._engine.stop)

    def _status(self) -> ReplicaStatus:
        return ReplicaStatus(
            replica=self._name,
            node=_node_address(),
            pid=os.getpid(),
            model=self._loaded.name,
            voices=tuple(self._loaded.voices),
            slots=self._slots,
            accepting=self._sessions.accepting,
            sessions=self._sessions.holders.statuses(),
            detached=self._sessions.comebacks.kept.statuses,
            media=self._address(),
            engine={
                "model": self._loaded.name if self._settings.model == AUTO else self._settings.model,
                "repo": self._settings.hf_repo,
                "revision": self._settings.hf_revision,
                "dtype": self._settings.dtype,
                "weights": self._settings.weights,
                "kv": self._settings.kv,
                "lora": self._settings.lora.name if self._settings.lora else "",
            },
        )

    def _address(self) -> tuple[str, int]:
        """Where gateways make their links."""
        return _node_address() if self._host in _ANYWHERE else self._host, self._port

    def _load(self) -> Stepper:
        # On the engine's thread, which is to own the device.
        self._loaded: Loaded = load(self._settings)
        return self._loaded.engine

    def _publish_slots(self) -> None:
        self._reporter.changed()
        self._metrics.set(metrics.SLOTS_TOTAL, self._slots)
        self._metrics.set(metrics.SLOTS_USED, self._sessions.holders.used)
        self._metrics.set(metrics.DETACHED, len(self._sessions.comebacks.kept))


def _node_address() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
