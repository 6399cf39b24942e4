"""Media links from one gateway to the replicas: with the application's keys, and over TLS where it is set."""

from __future__ import annotations

from deployments.keysync import KeySync
from deployments.parts import GatewaySettings
from deployments.wire.handshake import GatewayHandshake
from deployments.wire.link import Link, OnLost, OnMessage, connect
from deployments.wire.messages import Grant
from deployments.wire.tls import gateway_context


class ReplicaLinks:
    """One gateway's."""

    def __init__(self, settings: GatewaySettings, keys: KeySync) -> None:
        self._settings, self._keys = settings, keys
        self._tls = None if settings.media_tls == "off" else gateway_context(settings.media_tls_dir)

    async def connect(self, grant: Grant, on_message: OnMessage, on_lost: OnLost) -> Link:
        """A link for the session that was granted a slot. Raises OSError."""
        return await self.reach(grant.replica, grant.host, grant.port, on_message, on_lost)

    async def reach(self, replica: str, host: str, port: int, on_message: OnMessage, on_lost: OnLost) -> Link:
        """A link to a replica, for a session or a question. Raises OSError."""
        return await connect(
            host,
            port,
            on_message,
            on_lost,
            handshake=GatewayHandshake(await self._keys.known(), replica),
            outbox=self._settings.burst_frames,
            stall_s=self._settings.stall_limit_s,
            tls=self._tls,
        )
