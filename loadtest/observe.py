"""A real Prometheus over a live service on this machine: to look around, or to prove that series are there.

    python -m loadtest.observe            # until Ctrl-C; prints the address of Prometheus' own page
    python -m loadtest.observe --once     # waits for the main series, prints their values, exits 0 or 1

Scrapes what Ray lists in its discovery file (every node and component of the newest local cluster), or
--target, and evaluates the chart's own rules. Grafana shows the same with helm/personaplex/dashboards/*.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from personaplex import cli
from personaplex.errors import ConfigError

RULES = Path(__file__).parent.parent / "helm" / "personaplex" / "rules" / "personaplex.yaml"
DISCOVERY = Path("/tmp/ray/prom_metrics_service_discovery.json")
SCRAPE_S = 2
SHOWN = {
    "slots": "sum(ray_personaplex_slots)",
    "slots used": "sum(ray_personaplex_slots_used)",
    "sessions live": "sum(ray_personaplex_sessions_live)",
    "sessions waiting": "sum(ray_personaplex_sessions_queued)",
    "sessions admitted": "sum(ray_personaplex_sessions_admitted_total)",
    "steps a second": "sum(rate(ray_personaplex_tick_seconds_count[30s]))",
    "step p99, s": "histogram_quantile(0.99, sum by (le) (rate(ray_personaplex_tick_seconds_bucket[30s])))",
    "added latency p99, s": "histogram_quantile(0.99, sum by (le)"
    " (rate(ray_personaplex_frame_latency_seconds_bucket[30s])))",
    "rule: free slots": "personaplex:slots:free",
}
NEEDED = ("slots", "slots used", "sessions live", "sessions waiting", "rule: free slots")


@contextlib.contextmanager
def prometheus(targets: Sequence[str], port: int) -> Iterator[str]:
    """Prometheus over `targets` (host:port), or Ray's discovery file when there are none; its address.

    Raises ConfigError when it is not installed or does not start.
    """
    binary = shutil.which("prometheus")
    if binary is None:
        raise ConfigError("prometheus is missing (Debian: apt-get install prometheus)")
    if not targets and not DISCOVERY.exists():
        raise ConfigError("no Ray is running on this machine; start the service, or name a --target")
    _check_port(port)  # else whoever listens there would be taken for ours
    jobs = {"static_configs": [{"targets": list(targets)}]} if targets else _discovered()
    config = {
        "global": {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": "ray", **jobs}],
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prometheus.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        process = subprocess.Popen(
            [
                *(binary, f"--config.file={path}", f"--storage.tsdb.path={folder}/data"),
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield _wait_until_up(process, f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.wait(20)


def query(address: str, expression: str) -> float | None:
    """The one value of an expression now; None while there is none."""
    url = f"{address}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    with urllib.request.urlopen(url, timeout=5) as answer:
        result = json.load(answer)["data"]["result"]
    return float(result[0]["value"][1]) if result else None


def wait_for(address: str, timeout_s: float) -> dict[str, float | None]:
    """All of SHOWN once NEEDED are there, or at the end of the time."""
    deadline = time.monotonic() + timeout_s
    while True:
        values = {name: query(address, expression) for name, expression in SHOWN.items()}
        if all(values[name] is not None for name in NEEDED) or time.monotonic() > deadline:
            return values
        time.sleep(0.5)


def _discovered() -> dict[str, object]:
    return {"file_sd_configs": [{"files": [str(DISCOVERY)], "refresh_interval": "5s"}]}


def _wait_until_up(process: subprocess.Popen[bytes], address: str) -> str:
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(f"{address}/-/ready", timeout=2)
            return address
        time.sleep(0.2)
    raise ConfigError("prometheus did not start; is its port taken?")


def _check_port(port: int) -> None:
    try:
        with socket.create_server(("127.0.0.1", port)):
            pass
    except OSError as error:
        raise ConfigError(f"prometheus cannot listen on port {port}: {error.strerror}") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


EXAMPLES = (
    "python -m loadtest.observe --once",
    "python -m loadtest.observe --target localhost:8080 --port 9090",
)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m loadtest.observe", description="Prometheus, locally.", examples=EXAMPLES
    )
    parser.add_argument("--once", action="store_true", help="print the main series and exit")
    parser.add_argument("--timeout", type=cli.not_negative, default=60.0, help="seconds to wait for them")
    parser.add_argument("--port", type=cli.port, default=0, help="of Prometheus; any free one by default")
    parser.add_argument(
        "--target", type=_target, nargs="+", default=[], metavar="HOST:PORT", help="scrape these instead"
    )
    return parser


def _target(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not host or not colon or not port.isdecimal() or not 1 <= int(port) <= 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 when with --once a needed series did not come, or for an error."""
    return cli.run(lambda: _main(_parser().parse_args(argv)), "loadtest")


def _main(options: argparse.Namespace) -> int:
    try:
        with prometheus(options.target, options.port or _free_port()) as address:
            print(f"Prometheus: {address}", flush=True)
            if not options.once:
                with contextlib.suppress(KeyboardInterrupt):
                    while True:
                        time.sleep(3_600)
                return 0
            values = wait_for(address, options.timeout)
    except (ConfigError, OSError) as error:
        cli.complain(cli.reason(error))
        return cli.FAILED
    for name, value in values.items():
        print(f"{name:22} {'none' if value is None else f'{value:.6g}'}")
    return int(any(values[name] is None for name in NEEDED))


if __name__ == "__main__":
    sys.exit(main())
