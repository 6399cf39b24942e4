"""`python -m personaplex.server`: one command from nothing to a page over https, and back."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import websockets
from cryptography import x509
from ports import free_port
from serving import Client, Heard, speech

from deployments.certificate import CERTIFICATE, KEY, ensure_certificate
from deployments.command import (
    CARDS,
    RayEnded,
    _keep_token_private,
    _wait_for_signal,
    addresses,
    one_card,
)
from deployments.processes import named
from personaplex.errors import ConfigError
from personaplex.server import main


def test_a_certificate_is_made_once_for_every_name_of_this_machine(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "ssl"
    certificate, key = ensure_certificate(folder, "192.0.2.7")
    assert (certificate, key) == (folder / CERTIFICATE, folder / KEY)
    parsed = x509.load_pem_x509_certificate(certificate.read_bytes())
    names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert {"localhost", socket.gethostname()} <= set(names.get_values_for_type(x509.DNSName))
    assert {"127.0.0.1", "192.0.2.7"} <= {str(ip) for ip in names.get_values_for_type(x509.IPAddress)}
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    before = certificate.read_bytes()
    ensure_certificate(folder, "192.0.2.8")
    assert certificate.read_bytes() == before


def test_half_a_certificate_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / KEY).write_text("mine")
    with pytest.raises(ConfigError, match="both"):
        ensure_certificate(tmp_path, "192.0.2.7")
    assert (tmp_path / KEY).read_text() == "mine"


@pytest.mark.parametrize(
    ("device", "visible", "card"),
    [
        (None, None, None),
        ("cuda", "3", None),
        ("cpu", None, None),
        ("cuda:1", None, "1"),
        ("cuda:01", None, "1"),
        ("cuda:1", "4,GPU-8932f937", "GPU-8932f937"),
    ],
)
def test_one_card_of_several_is_chosen_as_torch_counts(
    device: str | None, visible: str | None, card: str | None
) -> None:
    assert one_card(device, visible).get(CARDS) == card


def test_the_card_is_chosen_for_ray_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str | None, str]] = []
    monkeypatch.setattr(
        "deployments.command._serve", lambda *args: seen.append((os.environ.get(CARDS), args[-1].device))
    )
    monkeypatch.delenv(CARDS, raising=False)
    assert main(["--device", "cuda:2", "--port", str(free_port()), "--model", "tiny"]) == 0
    assert seen == [("2", "cuda")]
    assert CARDS not in os.environ


def test_addresses_are_those_people_can_open() -> None:
    assert addresses("localhost", 8998, False, "192.0.2.7") == ["http://localhost:8998"]
    assert addresses("0.0.0.0", 1, True, "192.0.2.7") == ["https://localhost:1", "https://192.0.2.7:1"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--set", "slotz=1"], "slotz"),
        (["--device", "mps"], "--device mps is not supported"),
        (["--device", "cuda:"], "the number of a card"),
        (["--device", "cuda:-1"], "the number of a card"),
        (["--device", "cuda0"], "device"),
        (["--gradio-tunnel"], "use --ssl"),
        (["--gradio-tunnel-token", "t"], "use --ssl"),
        (["--set", "slots"], "NAME=VALUE"),
        (["--slots", "many"], "slots"),
        (["--device", "tpu"], "device"),
        (["--port", "99999"], "99999"),
        (["--set", "api_keys=secret"], "process list"),
    ],
)
def test_a_wrong_option_ends_the_command_in_words(
    options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert complaint in error
    assert "Traceback" not in error


def test_only_its_owner_reads_the_key_to_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    token = tmp_path / ".ray" / "auth_token"
    _keep_token_private()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700
    assert len(token.read_text()) == 64
    token.write_text("Ray's own")
    token.chmod(0o644)
    _keep_token_private()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text() == "Ray's own"


def test_a_process_that_everything_hangs_on_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command stayed for ever once its raylet had ended, and heard no signal."""
    monkeypatch.setattr("deployments.command.WATCH_EVERY_S", 0.01)
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with subprocess.Popen(["sleep", "60"]) as vital:
            deadline = time.monotonic() + 10  # the kernel names a process just after Popen has returned
            while named([vital.pid, os.getpid()], ("sleep",)) != {vital.pid: "sleep"}:
                assert time.monotonic() < deadline
            vital.kill()
            with pytest.raises(RayEnded, match="Ray's raylet has ended"):
                _wait_for_signal({vital.pid: "raylet"})
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def test_a_taken_port_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port), "--model", "echo"]) == 2
    assert f"localhost:{port}" in capsys.readouterr().err


@pytest.mark.parametrize("host", ["::", "::1", "0.0.0.0", "localhost"])
def test_addresses_of_either_family_can_be_listened_on(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, `--host ::` was refused whatever the port."""
    if ":" in host and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    served = []
    monkeypatch.setattr("deployments.command._serve", lambda *options: served.append(options[0]))
    assert main(["--host", host, "--port", str(free_port()), "--model", "echo"]) == 0
    assert served == [host]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, list[str]]]:
    port, said = free_port(), list[str]()
    command = [sys.executable, "-m", "personaplex.server", "--model", "echo", "--port", str(port)]
    command += ["--ssl", str(tmp_path), "--set", "slots=2", "--low-latency"]
    # A cluster that is not there any more: the command starts a Ray of its own all the same.
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:9"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=lambda stream: said.extend(stream), args=(process.stdout,))
        reader.start()
        deadline = time.monotonic() + 90
        while not any(line.startswith("Open ") for line in said):
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
        yield process, port, said
        if process.poll() is None:
            process.kill()
        reader.join()


def test_the_command_serves_a_page_and_conversations_and_ends(
    server: tuple[subprocess.Popen[str], int, list[str]], tmp_path: Path
) -> None:
    process, port, said = server
    base = f"https://localhost:{port}"
    assert f"Open {base}\n" in said
    assert "RAY_ADDRESS is not used: this starts a Ray of its own\n" in said
    page = requests.get(base, verify=tmp_path / CERTIFICATE, timeout=10)
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")

    async def talk_until_the_end() -> Heard:
        trust = ssl.create_default_context(cafile=str(tmp_path / CERTIFICATE))
        async with websockets.connect(f"wss://localhost:{port}/api/chat", ssl=trust) as connection:
            client = Client(connection)
            await client.talk(speech(0.8))
            process.send_signal(signal.SIGTERM)
            return await client.until_closed()

    heard = asyncio.run(talk_until_the_end())
    assert heard.pages
    assert (heard.code, heard.complaint) == (1012, "the server is being stopped; please connect again")
    assert process.wait(30) == 0
    assert "closing\n" in said
