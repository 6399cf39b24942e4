"""Self-signed certificates: one for this machine, made once, and those that processes make for themselves."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import ssl
from collections.abc import Sequence
from pathlib import Path

from personaplex.errors import ConfigError

CERTIFICATE, KEY = "cert.pem", "key.pem"
CERTIFICATE_DAYS = 365


def ensure_certificate(folder: Path, address: str) -> tuple[Path, Path]:
    """Paths of certificate and key in `folder`. Makes a self-signed pair for this machine's names and
    `address` when neither is there. Raises ConfigError when only one is, when they cannot be written, and
    when they do not go together."""
    certificate, key = folder / CERTIFICATE, folder / KEY
    if certificate.exists() != key.exists():
        raise ConfigError(f"--ssl: {CERTIFICATE} and {KEY} must both be there, or neither")
    if not certificate.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _make_certificate(certificate, key, address)
        except OSError as error:
            raise ConfigError(f"--ssl: the certificate cannot be written: {error.strerror}") from error
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--ssl: {CERTIFICATE} and {KEY} do not go together: {error}") from error
    return certificate, key


def lan_address() -> str:
    """This machine's address in its network, or 127.0.0.1 without one. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # a documentation address: it only picks a route
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"


def self_signed(common_name: str, names: Sequence[str] = (), ips: Sequence[str] = ()) -> tuple[bytes, bytes]:
    """A new certificate and its private key, as PEM, good for `names` and addresses `ips`."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
    others: list[x509.GeneralName] = [x509.DNSName(one) for one in names]
    others += [x509.IPAddress(ipaddress.ip_address(ip)) for ip in ips]
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    if others:
        builder = builder.add_extension(x509.SubjectAlternativeName(others), critical=False)
    signed = builder.sign(private, hashes.SHA256())
    key = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return signed.public_bytes(serialization.Encoding.PEM), key


def _make_certificate(certificate: Path, key: Path, address: str) -> None:
    ips = list(dict.fromkeys(("127.0.0.1", "::1", address)))
    signed, private = self_signed("personaplex", ("localhost", socket.gethostname()), ips)
    descriptor = os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(private)
    certificate.write_bytes(signed)
