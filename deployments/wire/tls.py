"""TLS 1.3 on the media link: certificates the application makes itself, or files.

`own`: every replica makes a certificate when it starts. Nobody has to trust it by itself: the proofs of
handshake.py name it, so a connection through anybody else's certificate ends there. Nothing is to be handed
out, renewed or kept.

`files`: a folder as Kubernetes mounts a Secret of type tls: tls.crt, tls.key and ca.crt. Both ends show that
certificate and want the other's signed by ca.crt; host names are not looked at, since replicas have none. The
proofs come on top. The files are read when a process starts.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import ssl
import tempfile
from pathlib import Path

from deployments.certificate import self_signed
from personaplex.errors import ConfigError

CERTIFICATE, KEY, AUTHORITY = "tls.crt", "tls.key", "ca.crt"


def replica_context(folder: Path | None) -> tuple[ssl.SSLContext, bytes]:
    """The context of a listening replica and the digest of its certificate. No folder: a certificate made
    now. Raises ConfigError for files that cannot be used."""
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # nobody comes back to a session
    if folder is not None:
        _load(context, folder)
    else:
        certificate, key = self_signed("personaplex replica")
        with tempfile.TemporaryDirectory() as place:  # the ssl module reads files only
            paths = Path(place, CERTIFICATE), Path(place, KEY)
            for path, content in zip(paths, (certificate, key), strict=True):
                path.touch(0o600)
                path.write_bytes(content)
            context.load_cert_chain(*paths)
    pem = certificate.decode() if folder is None else Path(folder, CERTIFICATE).read_text(encoding="ascii")
    return context, _digest(ssl.PEM_cert_to_DER_cert(_first(pem)))


def gateway_context(folder: Path | None) -> ssl.SSLContext:
    """The context of a gateway that connects. No folder: any certificate will do, see the module. Raises
    ConfigError for files that cannot be used."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if folder is not None:
        _load(context, folder)
    else:
        context.verify_mode = ssl.CERT_NONE
    return context


def digest_of_peer(transport: asyncio.BaseTransport) -> bytes:
    """SHA-256 of the certificate that the other end has shown; b"" without TLS."""
    secure = transport.get_extra_info("ssl_object")
    certificate = None if secure is None else secure.getpeercert(binary_form=True)
    return b"" if certificate is None else _digest(certificate)


def _context(side: ssl._SSLMethod) -> ssl.SSLContext:
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def _load(context: ssl.SSLContext, folder: Path) -> None:
    try:
        context.load_cert_chain(folder / CERTIFICATE, folder / KEY, password="")
        context.load_verify_locations(folder / AUTHORITY)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ConfigError(f"media_tls_dir: {CERTIFICATE}, {KEY} and {AUTHORITY}: {reason}") from error
    context.verify_mode = ssl.CERT_REQUIRED


def _first(pem: str) -> str:
    """The first certificate of a chain, the end's own."""
    end = "-----END CERTIFICATE-----"
    return pem[pem.index("-----BEGIN CERTIFICATE-----") : pem.index(end) + len(end)] + "\n"


def _digest(certificate: bytes) -> bytes:
    return hashlib.sha256(certificate).digest()
