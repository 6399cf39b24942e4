"""How the two ends of a media link prove to each other that they belong to one application.

    replica -> gateway   MAGIC | ids of the secrets it knows, two of 8 bytes | nonce, 32 bytes
    gateway -> replica   MAGIC | id of the secret used, 8 bytes | nonce, 32 bytes | proof of the gateway
    replica -> gateway   MAGIC | proof of the replica

A proof is HMAC-SHA256 under the application's secret over the prover's role, both nonces and the identity of
the link: the replica's name and, over TLS, the digest of the certificate it showed. So no secret travels, a
proof is of use in one connection and one direction only, and whoever relays a TLS link with a certificate of
its own proves nothing. The gateway proves first: a stranger gets no proof to work on. Proofs are compared in
constant time. Sans I/O: bytes in, bytes out; no message of the link is sent or read before the end.

Without TLS this authenticates the two ends, not every later byte: whoever can change packets between them
can still do so. `media_tls` closes that.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Callable
from typing import Protocol

from personaplex.errors import ProtocolError

SECRET_BYTES = 32
MAGIC = b"PPL1"  # read as the length of a message it is impossible, so that other versions fail at once
_ID_BYTES, _NONCE_BYTES, _PROOF_BYTES = 8, 32, hashlib.sha256().digest_size
_CHALLENGE = struct.Struct(f"<4s{_ID_BYTES}s{_ID_BYTES}s{_NONCE_BYTES}s")
_ANSWER = struct.Struct(f"<4s{_ID_BYTES}s{_NONCE_BYTES}s{_PROOF_BYTES}s")
_CONFIRMATION = struct.Struct(f"<4s{_PROOF_BYTES}s")
CHALLENGE_BYTES = _CHALLENGE.size
_NO_ID = bytes(_ID_BYTES)
_GATEWAY, _REPLICA = b"gateway", b"replica"
_REFUSED = "the other end of the link does not belong to this application"


class Keyring:
    """The application's secret as one process knows it: the newest, and the one before it while other
    processes may not have heard of the change yet."""

    def __init__(self, *known: bytes, missed: Callable[[], None] = lambda: None) -> None:
        """`missed` is called when the other end of a link has a secret that is not here."""
        self._secrets: list[bytes] = []
        self.missed = missed
        for secret in reversed(known):
            self.adopt(secret)

    def __bool__(self) -> bool:
        return bool(self._secrets)

    def __repr__(self) -> str:
        return f"Keyring of {len(self._secrets)}"

    @property
    def newest(self) -> bytes:
        """b"" while none is known."""
        return self._secrets[0] if self._secrets else b""

    @property
    def secrets(self) -> tuple[bytes, ...]:
        """All that are known, newest first."""
        return tuple(self._secrets)

    def adopt(self, secret: bytes) -> None:
        """Makes `secret` the newest. Raises ValueError for one that is too short to be one."""
        if len(secret) != SECRET_BYTES:
            raise ValueError("a secret of the link has another length")
        self._secrets = [secret, *(one for one in self._secrets if one != secret)][:2]

    def ids(self) -> tuple[bytes, bytes]:
        """What the secrets are called in the open, newest first; filled up with zeros."""
        known = [_id_of(secret) for secret in self._secrets] + [_NO_ID, _NO_ID]
        return known[0], known[1]

    def called(self, name: bytes) -> bytes | None:
        """The secret with this id."""
        return next((secret for secret in self._secrets if _id_of(secret) == name), None)


class Handshake(Protocol):
    """One end of one handshake."""

    @property
    def done(self) -> bool:
        """Whether the other end has proved what it is."""

    def begin(self, binding: bytes) -> bytes:
        """What to send first. `binding`: digest of the replica's certificate, b"" without TLS."""

    def receive(self, received: bytearray) -> bytes:
        """What to send in answer; takes from `received` what it has read. Raises ProtocolError."""


class ReplicaHandshake:
    """The replica's end; `replica` is its name."""

    def __init__(self, keyring: Keyring, replica: str) -> None:
        self._keyring, self._replica = keyring, replica
        self._nonce, self._binding = secrets.token_bytes(_NONCE_BYTES), b""
        self.done = False

    def begin(self, binding: bytes) -> bytes:
        self._binding = binding
        return _CHALLENGE.pack(MAGIC, *self._keyring.ids(), self._nonce)

    def receive(self, received: bytearray) -> bytes:
        message = _take(received, _ANSWER)
        if message is None:
            return b""
        magic, name, nonce, proof = message
        secret = self._keyring.called(name)
        if secret is None:
            self._keyring.missed()
        identity = (self._replica, self._binding)
        expected = _proof(secret or bytes(SECRET_BYTES), _GATEWAY, self._nonce, nonce, *identity)
        if not hmac.compare_digest(expected, proof) or secret is None or magic != MAGIC:
            raise ProtocolError(_REFUSED)
        self.done = True
        return _CONFIRMATION.pack(MAGIC, _proof(secret, _REPLICA, self._nonce, nonce, *identity))


class GatewayHandshake:
    """The gateway's end; `replica` is whom it means to reach."""

    def __init__(self, keyring: Keyring, replica: str) -> None:
        self._keyring, self._replica = keyring, replica
        self._nonce, self._binding = secrets.token_bytes(_NONCE_BYTES), b""
        self._expected: bytes | None = None  # the replica's proof
        self.done = False

    def begin(self, binding: bytes) -> bytes:
        self._binding = binding
        return b""

    def receive(self, received: bytearray) -> bytes:
        return self._answer(received) if self._expected is None else self._check(received, self._expected)

    def _answer(self, received: bytearray) -> bytes:
        message = _take(received, _CHALLENGE)
        if message is None:
            return b""
        magic, *names, nonce = message
        found = ((name, self._keyring.called(name)) for name in names)
        name, secret = next(((name, one) for name, one in found if one is not None), (b"", None))
        if secret is None:
            self._keyring.missed()
        if magic != MAGIC or secret is None:
            raise ProtocolError(_REFUSED)
        identity = (self._replica, self._binding)
        self._expected = _proof(secret, _REPLICA, nonce, self._nonce, *identity)
        proof = _proof(secret, _GATEWAY, nonce, self._nonce, *identity)
        return _ANSWER.pack(MAGIC, name, self._nonce, proof)

    def _check(self, received: bytearray, expected: bytes) -> bytes:
        message = _take(received, _CONFIRMATION)
        if message is None:
            return b""
        magic, proof = message
        if not hmac.compare_digest(expected, proof) or magic != MAGIC:
            raise ProtocolError(_REFUSED)
        self.done = True
        return b""


def _take(received: bytearray, form: struct.Struct) -> tuple[bytes, ...] | None:
    """The fields of a message once all of it is there; raises ProtocolError as soon as it can be none."""
    if not MAGIC.startswith(received[: len(MAGIC)]):
        raise ProtocolError("the other end of the link speaks another version of its protocol")
    if len(received) < form.size:
        return None
    fields: tuple[bytes, ...] = form.unpack_from(received)
    del received[: form.size]
    return fields


def _proof(
    secret: bytes, role: bytes, of_replica: bytes, of_gateway: bytes, replica: str, binding: bytes
) -> bytes:
    parts = (role, of_replica, of_gateway, replica.encode(), binding)
    said = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    return hmac.digest(secret, said, "sha256")


def _id_of(secret: bytes) -> bytes:
    return hashlib.sha256(b"id of a secret of the media link" + secret).digest()[:_ID_BYTES]
