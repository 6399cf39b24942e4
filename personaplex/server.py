"""The whole service on one machine: `python -m personaplex.server --help`.

Starts Ray here, the application of `deployments` on it, and prints the address to open. The options of
NVIDIA's `moshi.server` mean the same here or are refused; every other setting can be given with --set or in
the environment, as PERSONAPLEX_<NAME>. Browsers give a page the microphone on localhost or over https only:
--ssl makes a certificate.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import ipaddress
import logging
import multiprocessing
import os
import secrets
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personaplex import cli
from personaplex.errors import ConfigError
from personaplex.outputs import try_output

if TYPE_CHECKING:
    from deployments.settings import Settings

CERTIFICATE, KEY = "cert.pem", "key.pem"
CERTIFICATE_DAYS = 365
LEAVE_TIMEOUT_S = 3.0  # for sessions to end once the service is to
WATCH_EVERY_S = 1.0  # a look whether Ray is still there
SHUTDOWN_TIMEOUT_S = 10.0  # for Ray's own shutdown, which waits for ever for a raylet that is gone
ENVIRONMENT = {  # of Ray's processes, before they start; whoever runs Ray otherwise sets it there
    "RAY_worker_niceness": "0",  # Ray's 15 lets any other process make speech late
    "RAY_USAGE_STATS_ENABLED": "0",
    # A proxy that died is replaced after three of these; Serve's 10 s make that half a minute of refusals.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # A busy gateway answers a proxy late; at Serve's 1 s it is asked again and again, and nobody new gets in.
    "RAY_SERVE_MAX_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "10",
    # What Serve does ten times a second while nothing happens takes a tenth of a core.
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "1000",
    "WEBSOCKETS_MAX_LINE_LENGTH": "32768",  # a role text of 1000 Chinese characters is 9 KB of URL
    # Limits in the proxy, which reads what anybody sends before a gateway can refuse it.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.ingress.configure",
    # One machine, whatever it runs on: then all of Ray listens on 127.0.0.1 and not on every interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
RAY_ADDRESS = "RAY_ADDRESS"  # Ray's own: the cluster its programs connect to
HAPROXY_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"  # Serve's own
PORT_SHARING = "SERVE_SOCKET_REUSE_PORT_ENABLED"  # Serve's own: of its proxies; 1 unless set
CARDS = "CUDA_VISIBLE_DEVICES"
_TUNNEL = (
    "it would lead conversations through somebody else's server; use --ssl, or `ssh -L 8998:localhost:8998`"
)
_REFUSED = {"gradio-tunnel": _TUNNEL, "gradio-tunnel-token": _TUNNEL}  # of moshi.server's options
# Options that are settings of the same name.
_SETTINGS = (
    *("model", "device", "slots", "weights", "kv", "static"),
    *("hf_repo", "hf_revision", "moshi_weight", "mimi_weight", "tokenizer", "voice_prompt_dir"),
)


class RayEnded(Exception):
    """A process that everything hangs on has ended: no session can be served any more."""


EXAMPLES = (
    "python -m personaplex.server",
    "python -m personaplex.server --model tiny --slots 2 --port 8998",
    "python -m personaplex.server --ssl certs --host 0.0.0.0",
    "python -m personaplex.server --model 7b --slots 8 --kv int8 --set api_keys_file=keys.txt",
)
_READ = ("moshi_weight", "mimi_weight", "tokenizer", "voice_prompt_dir", "step_times")  # settings: paths
_MODELS = ("auto", "7b", "tiny", "echo", "simulated")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the service until SIGINT or SIGTERM; 0 then, 2 for a wrong set-up, 1 when Ray
    ended before, 130 for Ctrl-C while it started."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return cli.run(lambda: _main(_parser().parse_args(argv)), "serve")


def _main(options: argparse.Namespace) -> int:
    with _visible(one_card(options.device, os.environ.get(CARDS))):
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    settings = _settings(options)
    _check_files(settings)
    certificate = None
    if options.ssl is not None and options.haproxy:
        raise ConfigError("--haproxy speaks no https: leave out --ssl, and end https in front of it")
    if options.ssl is not None:
        certificate = ensure_certificate(options.ssl, lan_address())
    try:
        shared = not options.haproxy and os.environ.get(PORT_SHARING, "1") == "1"
        with (
            _reserved(options.host, options.port, shared),
            _environment(options.haproxy, settings),
        ):
            _serve(options.host, options.port, certificate, settings)
    except RayEnded as error:
        cli.complain(str(error))
        return cli.FAILED
    return 0


def _check_files(settings: Settings) -> None:
    """Raises ConfigError for files and folders that only a gateway or a replica would miss, later."""
    settings.keys()
    for name in _READ:
        path = getattr(settings, name)
        if path is not None and not path.exists():
            raise ConfigError(f"{name}: no such file or folder: {path}")
    if settings.model not in _MODELS and not Path(settings.model).is_dir():
        raise ConfigError(f"no model {settings.model!r}: one of {', '.join(_MODELS)}, or a directory")
    if settings.static not in ("", "none") and not Path(settings.static).is_dir():
        raise ConfigError(f"static: no such folder: {settings.static}")
    if settings.token_log_dir is not None:
        try:
            settings.token_log_dir.mkdir(parents=True, exist_ok=True)
            try_output(settings.token_log_dir / "trial")
        except OSError as error:
            raise ConfigError(f"token_log_dir: {settings.token_log_dir}: {error.strerror}") from error


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


def addresses(host: str, port: int, secure: bool, lan: str) -> list[str]:
    """Where the page can be opened, the best one first."""
    scheme = "https" if secure else "http"
    if host in ("0.0.0.0", "::"):
        return [f"{scheme}://localhost:{port}", f"{scheme}://{lan}:{port}"]
    return [f"{scheme}://{host}:{port}"]


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m personaplex.server",
        description="The whole service on this machine: Ray, gateway, model replica and web page.",
        examples=EXAMPLES,
    )
    parser.add_argument("--host", default="localhost", help="address to listen on; 0.0.0.0 is all")
    parser.add_argument("--port", type=cli.whole(1, 65_535), default=8998)
    parser.add_argument("--ssl", type=Path, metavar="DIR", help="https; makes a certificate in DIR if needed")
    parser.add_argument(
        "--haproxy", action="store_true", help="HAProxy carries the sockets: for many sessions; without --ssl"
    )
    parser.add_argument("--model", help="auto, 7b, tiny, echo or a directory with a checkpoint")
    parser.add_argument("--device", help="auto, cpu, cuda, or cuda:N for one card of several")
    parser.add_argument("--slots", help="sessions at once")
    parser.add_argument(
        "--weights", help="auto or int8: half the bytes of most weights, at some cost in quality"
    )
    parser.add_argument("--kv", help="auto or int8: half the memory of a session, for a little noise")
    parser.add_argument(
        "--cpu-offload", action="store_true", help="keep weights that do not fit in host memory"
    )
    parser.add_argument("--low-latency", action="store_true", help="less delay for more work; see the README")
    parser.add_argument("--hf-repo", help="Hugging Face repository of the weights")
    parser.add_argument("--hf-revision", help="its branch, tag or commit")
    parser.add_argument("--moshi-weight", help="language model weights, in place of the repository's")
    parser.add_argument("--mimi-weight", help="codec weights, in place of the repository's")
    parser.add_argument("--tokenizer", help="text tokenizer, in place of the repository's")
    parser.add_argument("--voice-prompt-dir", help="directory of voices, in place of the repository's")
    parser.add_argument("--static", metavar="DIR|none", help="directory of another web page, or none")
    for name in _REFUSED:
        parser.add_argument(f"--{name}", nargs="?", const="", help=argparse.SUPPRESS)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any other setting")
    parser.set_defaults(haproxy=os.environ.get(HAPROXY_SWITCH) == "1")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    from deployments.settings import Settings, refuse_keys_among

    for name, reason in _REFUSED.items():
        if getattr(options, name.replace("-", "_")) is not None:
            raise ConfigError(f"--{name} is not supported: {reason}")
    values: dict[str, Any] = {}
    for name in _SETTINGS:
        value = getattr(options, name)
        if value is not None:
            values[name] = value
    if options.device == "mps":
        raise ConfigError("--device mps is not supported: choose auto, cpu, cuda or cuda:N")
    if (options.device or "").startswith("cuda:"):
        values["device"] = "cuda"  # the only one there will be: see one_card
    for name in ("cpu_offload", "low_latency"):
        if getattr(options, name):
            values[name] = True
    for item in options.set:
        name, given, value = item.partition("=")
        if not given:
            raise ConfigError(f"--set takes NAME=VALUE, not {item!r}")
        values[name] = value
    refuse_keys_among(options.set)
    if Settings.wants_auto_slots(values):
        values["slots"] = _slots_that_fit(Settings.load({**values, "slots": 1}))
        print(f"slots=auto: {values['slots']}", flush=True)
    return Settings.load(values)


def _slots_that_fit(settings: Settings) -> int:
    from deployments.models import slots_that_fit

    # In a process of its own, since a CUDA context takes memory until its process ends.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(slots_that_fit, settings).result()


def one_card(device: str | None, visible: str | None) -> dict[str, str]:
    """The environment in which `cuda:N` is the only card; {} for any other device.

    N counts among the cards of `visible` (CUDA_VISIBLE_DEVICES), as torch does. Raises ConfigError.
    """
    kind, named, number = (device or "").partition(":")
    if kind != "cuda" or not named:
        return {}
    if not number.isdecimal() or not number.isascii():
        raise ConfigError(f"--device {device}: the number of a card must follow cuda:")
    if visible is None:
        return {CARDS: str(int(number))}
    cards = [card.strip() for card in visible.split(",") if card.strip()]
    if int(number) >= len(cards):
        raise ConfigError(f"--device {device}: {CARDS} has {len(cards)} cards, counted from 0")
    return {CARDS: cards[int(number)]}


@contextlib.contextmanager
def _visible(card: dict[str, str]) -> Iterator[None]:
    before = os.environ.get(CARDS)
    os.environ.update(card)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(CARDS, None)
        else:
            os.environ[CARDS] = before


@contextlib.contextmanager
def _reserved(host: str, port: int, shared: bool) -> Iterator[None]:
    """Keeps the port for this service, which listens there only once its Ray has started.

    `shared`: its sockets will share the port with others of this user (SO_REUSEPORT). Else nothing can be
    kept, nor need it: of two services the second could not listen, while of two that share each would get
    some of the other's clients. Raises ConfigError when nothing can listen there: Ray would only say so in a
    log.
    """
    if not 1 <= port <= 65_535:
        raise ConfigError(f"--port must be between 1 and 65535, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        try:
            with socket.create_server((host, port), family=family):
                pass
            if shared:  # but not with SO_REUSEADDR, so that no other service's check succeeds
                place = stack.enter_context(socket.socket(family))
                place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                place.bind((host, port))
        except (OSError, UnicodeError) as error:  # the latter: no name of a host can look like this
            raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
        yield


@contextlib.contextmanager
def _environment(behind_haproxy: bool, settings: Settings) -> Iterator[None]:
    """Serve's environment, as it has to be before Ray starts; what is set already stays as it is."""
    from deployments import haproxy

    wanted, before = dict(ENVIRONMENT), dict(os.environ)
    with contextlib.ExitStack() as stack:
        if behind_haproxy:
            # Not TMPDIR: a Unix socket's path has at most 107 bytes, and Serve adds 70 to this.
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="haproxy-", dir="/tmp"))
            os.environ[HAPROXY_SWITCH] = "1"
            wanted |= haproxy.environment(Path(folder), settings.drain_timeout_s)
        for name, value in wanted.items():
            os.environ.setdefault(name, value)
        if os.environ.pop(RAY_ADDRESS, None):
            print(f"{RAY_ADDRESS} is not used: this starts a Ray of its own", file=sys.stderr)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)


def _serve(host: str, port: int, certificate: tuple[Path, Path] | None, settings: Settings) -> None:
    import ray
    from ray import serve
    from ray.exceptions import RayError

    from deployments import build, processes

    others = set(processes.below(os.getpid()))
    needed = (
        settings.replicas_max * settings.replica_num_cpus + settings.gateways_max * settings.gateway_num_cpus
    )
    http: dict[str, Any] = {"host": host, "port": port}
    if certificate is not None:
        http["ssl_certfile"], http["ssl_keyfile"] = map(str, certificate)
    try:
        _keep_token_private()
        _start_ray(max(os.cpu_count() or 1, round(needed + 0.5)))
        vital = processes.named(set(processes.below(os.getpid())) - others, ("raylet", "gcs_server"))
        serve.start(http_options=http, logging_config={"log_level": "WARNING"})
        serve.run(build(settings), route_prefix=settings.route_prefix)
        _greet(host, port, certificate is not None, settings)
        _wait_for_signal(vital)
        print("closing", flush=True)
        _take_leave()
    except (RuntimeError, RayError) as error:  # what Serve says of an application that does not come up
        raise ConfigError(f"the service did not start: {error}") from error
    finally:
        processes.adopt_orphans()  # a node that ends in haste leaves some
        ending = threading.Thread(target=ray.shutdown, daemon=True)
        ending.start()
        ending.join(SHUTDOWN_TIMEOUT_S)
        processes.end_all_below(spared=others)


def _start_ray(cpus: int) -> None:
    """A Ray for this service alone, beside any that runs here already. Raises ConfigError."""
    import ray

    try:
        ray.init("local", num_cpus=cpus, include_dashboard=False)
    except Exception as error:
        raise ConfigError(f"Ray did not start: {str(error).splitlines()[0]}") from error


def _take_leave() -> None:
    """Clients are told why they are let go, those who wait for a slot too."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    fleet, deadline = serve.get_deployment_handle("fleet", "default"), time.monotonic() + LEAVE_TIMEOUT_S
    with contextlib.suppress(RayError, RayServeException, TimeoutError):
        fleet.close.remote().result(timeout_s=LEAVE_TIMEOUT_S)
        while fleet.held.remote().result(timeout_s=LEAVE_TIMEOUT_S):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)


def _wait_for_signal(vital: Mapping[int, str]) -> None:
    """Until SIGINT or SIGTERM. Raises RayEnded when a process of `vital` (names by id) has ended before."""
    from deployments import processes

    # Not earlier: Ray sets handlers of its own while it starts.
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    while not stop.wait(WATCH_EVERY_S):
        for pid, name in vital.items():
            if not processes.lives(pid):
                raise RayEnded(f"Ray's {name} has ended, and the service with it; start it again")


def _keep_token_private() -> None:
    """Only its owner may read the token that opens this machine's Ray, which Ray writes for all to read.

    One that is missing is made here, where Ray would make it. Raises ConfigError when it cannot be written.
    """
    token = Path.home() / ".ray" / "auth_token"
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        return
    try:
        token.parent.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
        token.chmod(0o600)
    except OSError as error:
        raise ConfigError(f"Ray's token {token} cannot be made private: {error.strerror}") from error


def _greet(host: str, port: int, secure: bool, settings: Settings) -> None:
    lan = lan_address()
    print("Open " + " or ".join(addresses(host, port, secure, lan)), flush=True)
    if host not in ("localhost", "127.0.0.1", "::1") and not secure:
        print("Without --ssl, browsers on other machines get no microphone.", flush=True)


def _make_certificate(certificate: Path, key: Path, address: str) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "personaplex")])
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.DNSName(socket.gethostname())]
    names += [x509.IPAddress(ipaddress.ip_address(ip)) for ip in dict.fromkeys(("127.0.0.1", "::1", address))]
    now = datetime.datetime.now(datetime.timezone.utc)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=CERTIFICATE_DAYS))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(private, hashes.SHA256())
    )
    descriptor = os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(
            private.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))


if __name__ == "__main__":
    status = main()
    if status == cli.FAILED:  # Ray has ended
        os._exit(status)  # its own exit handlers would talk to processes that are gone
    sys.exit(status)
