"""The whole service on this machine: a Ray of its own, the application on it, until a signal ends it.

`run` is what `python -m personaplex.server` does once its arguments are parsed. Ray and Serve read their
environment when they are imported, so they are imported only once it is complete.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from deployments import haproxy, ingress, processes
from deployments.certificate import ensure_certificate, lan_address
from deployments.gateway.keys import Keys
from deployments.gateway.retention import store_at
from deployments.parts import ReplicaSettings
from deployments.replica.models import slots_that_fit
from deployments.settings import HAPROXY_SWITCH, Settings, behind_haproxy
from personaplex.errors import ConfigError
from personaplex.outputs import try_output
from personaplex.transcription.whisper import check_installed

CLOSE_TIMEOUT_S = 3.0  # for sessions to end once the service stops
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
    **ingress.REQUEST_LINE,
    # Limits in the proxy, which reads what anybody sends before a gateway can refuse it.
    ingress.VARIABLE: ingress.CALLBACK,
    # One machine, whatever it runs on: then all of Ray listens on 127.0.0.1 and not on every interface.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
RAY_ADDRESS = "RAY_ADDRESS"  # Ray's own: the cluster its programs connect to
PORT_SHARING = "SERVE_SOCKET_REUSE_PORT_ENABLED"  # Serve's own: of its proxies; 1 unless set
CARDS = "CUDA_VISIBLE_DEVICES"
_READ = (  # settings: paths
    "moshi_weight",
    "mimi_weight",
    "tokenizer",
    "voice_prompt_dir",
    "lora",
    "step_times",
    "media_tls_dir",
)
_WRITTEN = ("token_log_dir", "record_dir")  # settings: directories
_MODELS = ("auto", "7b", "talk", "tiny", "echo", "simulated")


class RayEnded(Exception):
    """A process that everything hangs on has ended: no session can be served any more."""


def load_settings(values: Mapping[str, Any]) -> Settings:
    """Settings from `values` over the environment; with slots=auto, as many slots as fit this machine's GPU.

    Raises ConfigError.
    """
    if not Settings.wants_auto_slots(values):
        return Settings.load(values)
    slots = _slots_that_fit(Settings.load({**values, "slots": 1}))
    print(f"slots=auto: {slots}", flush=True)
    return Settings.load({**values, "slots": slots})


def _slots_that_fit(settings: Settings) -> int:
    # In a process of its own, since a CUDA context takes memory until its process ends.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(slots_that_fit, ReplicaSettings.of(settings)).result()


def run(settings: Settings, host: str, port: int, *, ssl_folder: Path | None, with_haproxy: bool) -> None:
    """Serves until SIGINT or SIGTERM. `ssl_folder` holds or gets the certificate for https.

    Raises ConfigError for a set-up that cannot work, RayEnded when Ray ended first.
    """
    _check_files(settings)
    certificate = None
    with_haproxy |= behind_haproxy()  # by the environment
    if ssl_folder is not None and with_haproxy:
        raise ConfigError("--haproxy speaks no https: leave out --ssl, and end https in front of it")
    if ssl_folder is not None:
        certificate = ensure_certificate(ssl_folder, lan_address())
    shared = not with_haproxy and os.environ.get(PORT_SHARING, "1") == "1"
    with _reserved(host, port, shared), _environment(with_haproxy, settings):
        _serve(host, port, certificate, settings)


def _check_files(settings: Settings) -> None:
    """Raises ConfigError for files and folders that only a gateway or a replica would miss, later."""
    Keys([key.get_secret_value() for key in settings.api_keys], settings.api_keys_file)
    Keys([], settings.admin_keys_file)
    for name in _READ:
        path = getattr(settings, name)
        if path is not None and not path.exists():
            raise ConfigError(f"{name}: no such file or folder: {path}")
    if settings.lora is not None and settings.model in ("echo", "simulated"):
        raise ConfigError(f"lora needs a model with weights, and {settings.model} has none")
    if settings.model not in _MODELS and not Path(settings.model).is_dir():
        raise ConfigError(f"no model {settings.model!r}: one of {', '.join(_MODELS)}, or a directory")
    if settings.static not in ("", "none") and not Path(settings.static).is_dir():
        raise ConfigError(f"static: no such folder: {settings.static}")
    for name in _WRITTEN:
        folder = getattr(settings, name)
        if folder is None:
            continue
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            try_output(folder / "trial")
        except OSError as error:
            raise ConfigError(f"{name}: {folder}: {error.strerror}") from error
    if settings.record_upload:
        store_at(settings.record_upload)
    if settings.transcription == "on":
        check_installed(settings.transcription_model)


def addresses(host: str, port: int, secure: bool, lan: str) -> list[str]:
    """Where the page can be opened, the best one first."""
    scheme = "https" if secure else "http"
    if host in ("0.0.0.0", "::"):
        return [f"{scheme}://localhost:{port}", f"{scheme}://{lan}:{port}"]
    return [f"{scheme}://{host}:{port}"]


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
def visible(card: dict[str, str]) -> Iterator[None]:
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

    `shared`: its sockets will share the port with others of this user (SO_REUSEPORT). Of two such services
    started at once each would get some of the other's clients. Without sharing the second cannot listen, and
    nothing is kept. Raises ConfigError when nothing can listen there: Ray would only say so in a log.
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
def _environment(with_haproxy: bool, settings: Settings) -> Iterator[None]:
    """Serve's environment, as it has to be before Ray starts; what is set already stays as it is."""
    wanted, before = dict(ENVIRONMENT), dict(os.environ)
    with contextlib.ExitStack() as stack:
        if with_haproxy:
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

    from deployments.application import build

    others = set(processes.below(os.getpid()))
    needed = (
        settings.replicas_max * settings.replica_num_cpus + settings.gateways_max * settings.gateway_num_cpus
    )
    if settings.transcription == "on":
        needed += settings.transcribers_max * settings.transcriber_num_cpus
    http: dict[str, Any] = {"host": host, "port": port}
    if certificate is not None:
        http["ssl_certfile"], http["ssl_keyfile"] = map(str, certificate)
    try:
        _keep_token_private()
        _start_ray(max(os.cpu_count() or 1, round(needed + 0.5)))
        vital = processes.named(set(processes.below(os.getpid())) - others, ("raylet", "gcs_server"))
        serve.start(http_options=http, logging_config={"log_level": "WARNING"})
        serve.run(build(settings), route_prefix=settings.route_prefix)
        _greet(host, port, certificate is not None)
        _wait_for_signal(vital)
        print("closing", flush=True)
        _close_sessions()
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


def _close_sessions() -> None:
    """Graceful shutdown: every client is told why its session ends, those in the queue too."""
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException

    fleet, deadline = serve.get_deployment_handle("fleet", "default"), time.monotonic() + CLOSE_TIMEOUT_S
    with contextlib.suppress(RayError, RayServeException, TimeoutError):
        fleet.close.remote().result(timeout_s=CLOSE_TIMEOUT_S)
        while fleet.held.remote().result(timeout_s=CLOSE_TIMEOUT_S):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)


def _wait_for_signal(vital: Mapping[int, str]) -> None:
    """Until SIGINT or SIGTERM. Raises RayEnded when a process of `vital` (names by id) has ended before."""
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


def _greet(host: str, port: int, secure: bool) -> None:
    lan = lan_address()
    print("Open " + " or ".join(addresses(host, port, secure, lan)), flush=True)
    if host not in ("localhost", "127.0.0.1", "::1") and not secure:
        print("Without --ssl, browsers on other machines get no microphone.", flush=True)
