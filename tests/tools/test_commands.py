"""The other commands as people misuse them: exit code, one line, and their files as they were.

No row starts Ray, reaches a cluster or talks for longer than a fifth of a second.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from commands import Main, Row, Say, contents, run_row, sound
from echo_service import EchoService
from ports import free_port

from deployments import command
from deployments.gateway.keys import Keys
from deployments.settings import Settings
from k8s import __main__ as k8s
from k8s import conversation, fetch_weights
from loadtest import observe, plan
from personaplex import cli, client, client_io, server
from personaplex.errors import ConfigError
from personaplex.files import key_lines

ROOT = Path(__file__).parents[2]
STEPS = ROOT / "benchmarks" / "results" / "steps-example.json"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    sound("user.wav")
    shutil.copy(STEPS, "plan.json")
    Path("a").mkdir()
    return tmp_path


def link() -> None:
    os.symlink("user.wav", "link.wav")
    os.link("user.wav", "same.wav")


def check_rows(name: str, main: Main, rows: Sequence[Row]) -> list[object]:
    return [pytest.param(main, row, id=f"{name} {row}") for row in rows]


CLIENT = [
    Row("--input-wav user.wav --output-wav user.wav", 2, "--output-wav user.wav would overwrite the input"),
    Row("--input-wav user.wav --output-wav a/../user.wav", 2, "would overwrite the input user.wav"),
    Row("--input-wav link.wav --output-text user.wav", 2, "--output-text user.wav would overwrite", link),
    Row("--input-wav user.wav --output-json link.wav", 2, "--output-json link.wav would overwrite", link),
    Row("--input-wav user.wav --output-wav same.wav", 2, "would overwrite the input", link),
    Row("--input-wav user.wav --output-wav o --output-text ./o", 2, "would both write o"),
    Row("--input-wav user.wav --output-wav new/", 2, "new/ is a folder: name a file"),
    Row("--input-wav user.wav --output-text a", 2, "a is a folder: name a file"),
    Row("--input-wav user.wav --output-text ''", 2, "--output-text: the name is empty"),
    Row("--input-wav user.wav --output-wav no/o.wav", 1, "no: no such folder"),
    Row("--input-wav user.wav --output-wav /proc/o.wav", 1, "/proc/o.wav: "),
    Row("--input-wav nobody.wav", 1, "nobody.wav: No such file or directory"),
    Row("--input-wav a", 1, "a: a folder cannot be read as audio"),
    Row("--input-wav plan.json", 1, "plan.json: the file cannot be read as audio"),
    Row("--input-wav user.wav --channel 2", 1, "user.wav: there is no channel 2"),
    Row("--url localhost:abc", 2, "--url must look like"),
    Row("--url ws://localhost:99999", 2, "--url must look like"),
    Row("--url ws://localhost:0", 2, "--url must look like"),
    Row("--url ws://localhost:-1/api/chat", 2, "--url must look like"),
    Row("--url 'ws://local host'", 2, "holds a space"),
    Row("--url ws://[::1/api/chat", 2, "--url must look like"),
    Row("--url ws://a..b/", 2, "--url must look like"),
    Row(f"--url ws://{'a' * 64}/", 2, "--url must look like"),
    Row("--url ftp://localhost", 2, "its scheme is ftp"),
    Row("--url ws://:8998", 2, "it has no host"),
    Row("--url ws://caf\udce9/", 2, "--url must look like"),
    Row("--url 'ws://localhost/\n'", 2, "--url must look like"),
    Row("--text-prompt caf\udce9", 2, "--text-prompt: is not text in UTF-8"),
    Row("--voice caf\udce9", 2, "--voice: is not text in UTF-8"),
    Row("--api-key 'a\nb'", 2, "--api-key: holds characters that a header cannot carry"),
    Row("--api-key schlüssel", 2, "--api-key: holds characters"),
    Row("--tail nan", 2, "--tail: must be a finite number, between 0 and 3600, got nan"),
    Row("--tail -1", 2, "--tail: must be"),
    Row("--tail soon", 2, "'soon' is not a number"),
    Row("--seed -2", 2, "--seed: must be at least -1"),
    Row("--text-topk -1", 2, "--text-topk: must be at least 0"),
    Row("--audio-temperature inf", 2, "--audio-temperature: must be a finite number"),
    Row("--text-temperature -1", 2, "--text-temperature: must be"),
    Row("--channel 1e3", 2, "'1e3' is not a whole number"),
    Row("--colour red", 2, "unrecognized arguments: --colour"),
]
OBSERVE = [
    Row("--port 99999", 2, "--port: must be between 0 and 65535"),
    Row("--port x", 2, "'x' is not a whole number"),
    Row("--timeout nan", 2, "--timeout: must be a finite number"),
    Row("--target localhost", 2, "'localhost' is not HOST:PORT"),
    Row("--target localhost:99999", 2, "is not HOST:PORT"),
]
PLAN = [
    Row("--steps plan.json --output plan", 2, "--output plan.json would overwrite the input plan.json"),
    Row("--steps plan.json --output a/../plan", 2, "would overwrite the input plan.json (--steps)"),
    Row("--steps plan.json --output new/", 2, "new/ is a folder: name a file"),
    Row("--steps plan.json --output no/plan", 2, "no/plan.json: No such file or directory"),
    Row("--steps plan.json --output /proc/plan", 2, "/proc/plan.json: "),
    Row("--steps plan.json --longest nan", 2, "--longest: must be a finite number, more than 0"),
    Row("--steps plan.json --tick-limit-ms 0", 2, "--tick-limit-ms: must be"),
    Row("--steps plan.json --gpus 0", 2, "--gpus: must be between 1 and 100000, got 0"),
    Row("--steps plan.json --refused 2", 2, "--refused: must be"),
    Row("--steps plan.json --gpu-hour -1", 2, "--gpu-hour: must be"),
    Row("--steps plan.json --push 0", 2, "--push: must be"),
    Row("--steps plan.json --ready-p95 inf", 2, "--ready-p95: must be"),
    Row("--steps nobody.json", 1, "the step-time table cannot be read"),
    Row("--steps a", 1, "the step-time table cannot be read"),
    Row("--steps user.wav", 1, "the step-time table is not JSON"),
    Row("--steps plan.json --arrivals 1e9@1e9", 1, "makes more than 1e+07 sessions"),
    Row("--steps plan.json --arrivals 10@nan", 1, "needs a positive time and rates"),
    Row("--steps plan.json --lengths lognormal:10:1e200", 1, "is no distribution of positive seconds"),
    Row("--steps plan.json --set slots=-1", 1, "slots"),
]
K8S = [
    Row("slots --memory-gib nan --bandwidth-gbs 1", 2, "--memory-gib: must be a finite number"),
    Row("slots --memory-gib inf --bandwidth-gbs 1", 2, "--memory-gib: must be a finite number"),
    Row("slots --memory-gib -80 --bandwidth-gbs 1", 2, "--memory-gib: must be a finite number, more than 0"),
    Row("slots --memory-gib 80 --bandwidth-gbs 0", 2, "--bandwidth-gbs: must be"),
    Row("slots --memory-gib 80", 2, "one of the arguments --bandwidth-gbs --measured is required"),
    Row("slots --memory-gib 80 --measured user.wav", 1, "user.wav holds no step times"),
    Row("rollout speech --interval 0", 2, "--interval: must be a finite number, more than 0"),
    Row("rollout speech --timeout nan", 2, "--timeout: must be"),
    Row("rollout speech --zeros 0", 2, "--zeros: must be at least 1"),
    Row("sessions speech --timeout -1", 2, "--timeout: must be"),
    Row("verify speech --bundle a", 2, "a is a folder: name a file"),
    Row("verify speech --bundle no/b.zip", 1, "no/b.zip: No such file or directory"),
    Row("verify speech --bundle b.zip", 4, "no cluster is configured"),
    Row(
        "smoke speech --api-keys-file user.wav",
        1,
        "the keys in user.wav cannot be read: the file",
    ),
    Row("smoke speech --api-keys-file nobody", 1, "the keys in nobody cannot be read: No such file"),
    Row("walk", 2, "invalid choice"),
]


@pytest.mark.parametrize(
    ("main", "row"),
    [
        *check_rows("client", client.main, CLIENT),
        *check_rows("observe", observe.main, OBSERVE),
        *check_rows("plan", plan.main, PLAN),
        *check_rows("k8s", k8s.main, K8S),  # type: ignore[arg-type]
    ],
)
def test_one_line_and_nothing_lost(main: Main, row: Row, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)  # no row gets as far as a microphone
    run_row(main, row, say)


# The client's conversations


def test_an_output_that_fails_at_the_end_leaves_the_others(say: Say) -> None:
    outputs = "--output-wav /dev/full --output-text said.txt --output-json report.json"
    with EchoService() as service:
        arguments = f"--url {service.url} --input-wav user.wav --tail 0.1 {outputs}"
        run_row(client.main, Row(arguments, 1, "error: /dev/full: No space left on device"), say)
    assert Path("said.txt").stat().st_size
    assert Path("report.json").stat().st_size
    assert not stat_is_regular("/dev/full")


def stat_is_regular(path: str) -> bool:
    return Path(path).is_file()


@pytest.mark.parametrize("proxy", ["ftp://127.0.0.1:9", "socks5://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used(proxy: str, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", proxy)
    monkeypatch.setenv("https_proxy", proxy)
    monkeypatch.delenv("no_proxy", raising=False)
    row = Row("--url wss://service.example/ --input-wav user.wav", 1, "the proxy that the environment names")
    run_row(client.main, row, say)


def test_a_reader_that_goes_away_is_one_line() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "k8s", "slots", "--memory-gib", "80", "--bandwidth-gbs", "3000"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr.splitlines()[1:] == ["error: nobody reads the output any more"]


CLOSED_STREAMS = """
import os
from pathlib import Path
from personaplex import cli

def command():
    with open("out", "w") as file:
        assert file.fileno() > 2
        print("said")
        cli.complain("said")
        os.write(1, b"by a library")
        file.write("mine")
    return 0

raise SystemExit(cli.run(command, "client"))
"""


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_failure_and_no_output_goes_elsewhere(closed: str) -> None:
    command = [sys.executable, "-c", CLOSED_STREAMS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    subprocess.run(shell, env=environment, check=True, timeout=30)
    assert Path("out").read_text() == "mine"


def test_a_full_stdout_after_the_work_is_no_refusal() -> None:
    code = "from personaplex import cli; raise SystemExit(cli.run(lambda: print(1) or 0, 'client'))"
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (ended.returncode, ended.stderr) == (1, "error: stdout: No space left on device\n")


def test_a_name_makes_no_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    cli.complain("a\nerror: b\r\x1b[31m\u2028\u202ec.wav: é\u00a0ü")
    assert capsys.readouterr().err == "error: a\\nerror: b\\r\\x1b[31m\\u2028\\u202ec.wav: é\u00a0ü\n"


def test_ctrl_c_in_a_plan_is_one_line(monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    def interrupted(options: argparse.Namespace) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(plan, "run", interrupted)
    run_row(plan.main, Row("--steps plan.json", 130, "interrupted"), say)


# The server, up to the moment when it would start Ray


def half_a_certificate() -> None:
    Path("certs").mkdir()
    Path("certs/cert.pem").write_text("mine")
    Path("certs/key.pem").write_text("mine")


def no_keys() -> None:
    Path("keys").write_text("# none\n")


def key_of_another_encoding() -> None:
    Path("keys").write_bytes("schlüssel".encode("latin-1"))


SERVER = [
    Row("--port 0", 2, "--port: must be between 1 and 65535, got 0"),
    Row("--port -1", 2, "--port: must be"),
    Row("--port http", 2, "'http' is not a whole number"),
    Row("--host a..b", 2, "cannot listen on a..b:"),
    Row("--host 192.0.2.1", 2, "cannot listen on 192.0.2.1:"),
    Row("--slots 0", 2, "slots"),
    Row("--slots many", 2, "slots"),
    Row("--set slots=nan", 2, "slots"),
    Row("--set session_limit_s=inf", 2, "session_limit_s"),
    Row("--set queue_timeout_s=-1", 2, "queue_timeout_s"),
    Row("--set media_port_min=99999", 2, "media_port_min"),
    Row("--model nobody", 2, "no model 'nobody'"),
    Row("--moshi-weight nobody", 2, "moshi_weight: no such file or folder: nobody"),
    Row("--voice-prompt-dir nobody", 2, "voice_prompt_dir: no such file or folder: nobody"),
    Row("--static nobody", 2, "static: no such folder: nobody"),
    Row("--static user.wav", 2, "static: no such folder: user.wav"),
    Row("--set token_log_dir=user.wav", 2, "token_log_dir: user.wav: "),
    Row("--set token_log_dir=/proc/logs", 2, "token_log_dir: /proc/logs: "),
    Row("--set api_keys_file=nobody", 2, "api_keys_file: the keys in nobody cannot be read: No such file"),
    Row("--set api_keys_file=a", 2, "api_keys_file: the keys in a cannot be read: Is a directory"),
    Row("--set api_keys_file=keys", 2, "api_keys_file: keys holds no key", no_keys),
    Row("--set api_keys_file=keys", 2, "the file is not UTF-8", key_of_another_encoding),
    Row("--set allowed_origins=https://a.example/app", 2, "an origin is SCHEME://HOST"),
    Row("--set allowed_origins=example.org", 2, "an origin is SCHEME://HOST"),
    Row("--set allowed_origins=https://a.example:99999", 2, "an origin has another form"),
    Row("--set allowed_origins=*", 2, "an origin is SCHEME://HOST"),
    Row("--ssl certs", 2, "--ssl: cert.pem and key.pem do not go together", half_a_certificate),
    Row("--ssl user.wav", 2, "--ssl: "),
    Row("--ssl certs --haproxy", 2, "--haproxy speaks no https"),
]


@pytest.mark.parametrize("row", SERVER, ids=str)
def test_the_server_is_refused_before_ray_starts(row: Row, say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_serve", lambda *options: pytest.fail("it went on"))
    run_row(server.main, row, say, "" if "--model" in row.arguments else "--model echo")


def test_of_two_servers_started_at_once_one_is_refused(monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    """Serve's proxies would share the port, and the two services each other's clients."""
    with socket.create_server(("localhost", 0)) as probe:
        port = probe.getsockname()[1]
    row = Row(f"--port {port}", 2, f"cannot listen on localhost:{port}:")

    def serve(*_: object) -> None:
        run_row(server.main, row, say, "--model echo")  # before the first one listens
        with socket.socket() as proxy:  # as Serve makes it
            proxy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            proxy.bind(("localhost", port))
            proxy.listen()
            socket.create_connection(("localhost", port), timeout=1).close()

    monkeypatch.setattr(command, "_serve", serve)
    assert server.main(["--model", "echo", "--port", str(port)]) == 0
    monkeypatch.setattr(command, "_serve", lambda *_: socket.create_server(("localhost", port)).close())
    assert server.main(["--model", "echo", "--port", str(port), "--haproxy"]) == 0, "HAProxy shares nothing"


def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    """Whatever Ray may raise; and it is asked for one of its own, whatever the environment says."""
    import ray

    asked = []

    def fail(address: str, **options: object) -> None:
        asked.append((address, os.environ.get("RAY_ADDRESS")))
        raise Exception("The current node timed out.\nMore.")

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    row = Row(
        f"--model echo --port {free_port()}",
        2,
        "Ray did not start: The current node timed out.\n",
    )
    said = run_row(server.main, row, say)
    assert "RAY_ADDRESS is not used" in said
    assert asked == [("local", None)]
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:9"


# Keys and origins as people write them


@pytest.mark.parametrize(
    "content",
    [
        b"# ours\none\n\n two \n",
        b"\xef\xbb\xbfone\r\ntwo\r\n",
        b"\xef\xbb\xbf# ours\r\none\rtwo",
        "\ufeffone\r\ntwo\r\n".encode("utf-16-le"),
        "\ufeffone\ntwo".encode("utf-16-be"),
    ],
)
def test_key_files_of_every_editor(content: bytes) -> None:
    Path("keys").write_bytes(content)
    assert key_lines(Path("keys")) == ["one", "two"]
    table = Keys((), Path("keys")).table
    assert len(table) == 2
    assert table.find("one")
    assert table.find("two")
    assert conversation.first_key(Path("keys")) == "one"


@pytest.mark.parametrize(
    ("written", "sent"),
    [
        ("https://example.org/", "https://example.org"),
        ("HTTPS://Example.ORG", "https://example.org"),
        ("https://example.org:443", "https://example.org"),
        ("http://localhost:8998/", "http://localhost:8998"),
        ("http://[::1]:80", "http://[::1]"),
        ("https://bücher.example", "https://xn--bcher-kva.example"),
        ("null", "null"),
    ],
)
def test_origins_are_compared_as_browsers_send_them(written: str, sent: str) -> None:
    assert Settings(allowed_origins=written).allowed_origins == (sent,)


# Helpers of Kubernetes


def run_conversation(arguments: Sequence[str]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["conversation", *arguments])
        return conversation.main()


@pytest.mark.parametrize(
    ("main", "arguments", "code", "says"),
    [
        (fetch_weights.main, "--marker a", 2, "error: argument --marker: a is a folder: name a file"),
        (fetch_weights.main, "--marker no/ready", 1, "weights not fetched: no/ready: No such file"),
        (fetch_weights.main, "--marker /proc/ready", 1, "weights not fetched: /proc/ready: "),
        (run_conversation, "--url ws://localhost:99999", 1, "no conversation: error: --url must look like"),
        (run_conversation, "--url ws://x --api-keys-file nobody", 1, "no conversation: the keys in nobody"),
        (run_conversation, "", 2, "error: the following arguments are required: --url"),
    ],
)
def test_helpers_end_in_one_line(
    main: Main, arguments: str, code: int, says: str, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_weights, "fetch", lambda *names: pytest.fail("17 GB are fetched"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main(shlex.split(arguments)) == code
    said = say.take()
    assert said.startswith(says)
    assert said.count("\n") == 1


LOCUST = [  # some seconds each: Locust is slow to start
    ("--host ws://localhost:99999", "--host must look like"),
    ("--host ws://localhost --output plan --speech plan.json", "--output plan.json would overwrite"),
    ("--host ws://localhost --longest nan", "--longest: must be a finite number"),
]


@pytest.mark.parametrize(("arguments", "says"), LOCUST)
def test_a_load_test_is_refused_before_it_begins(arguments: str, says: str, folder: Path) -> None:
    before = contents(folder)
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtest" / "locustfile.py"), "--headless"]
    done = subprocess.run(
        [*command, *shlex.split(arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(folder) == before


# The examples in the help


def examples(parser: argparse.ArgumentParser) -> list[list[str]]:
    """The arguments of each, as the help shows them."""
    lines = re.findall(
        r"^  (.*python -m .*)$", parser.format_help().partition("examples:\n")[2], re.MULTILINE
    )
    assert lines, "the help has none"
    commands = [shlex.split(line) for line in lines]
    return [words[words.index("-m") + 2 :] for words in commands]


def test_the_clients_examples_work(monkeypatch: pytest.MonkeyPatch, say: Say) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with EchoService() as service:
        address = service.url.removeprefix("ws://").partition("/")[0]
        default = client_io.parser().get_default("url")
        monkeypatch.setattr(
            client, "chat_url", lambda options: client_io.chat_url(here(options, default, address))
        )
        codes = [client.main([*words, "--tail", "0.1"]) for words in examples(client_io.parser())]
    assert codes == [1, 0, 0], "the first one needs a microphone"
    assert "no microphone" in say.take()
    assert {"heard.wav", "said.txt"} <= contents(Path()).keys()


def here(options: argparse.Namespace, default: str, address: str) -> argparse.Namespace:
    """The same, to the service of the test."""
    assert options.url == default
    return argparse.Namespace(**{**vars(options), "url": f"ws://{address}/api/chat"})


def test_the_servers_examples_work(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[tuple[object, ...]] = []
    monkeypatch.setattr(command, "_serve", lambda *options: served.append(options))
    # Someone may listen there.
    monkeypatch.setattr(command, "_reserved", lambda host, port, shared: contextlib.nullcontext())
    Path("keys.txt").write_text("one\n")
    found = examples(server._parser())
    assert [server.main(words) for words in found] == [0] * len(found)
    assert len(served) == len(found)
    assert Path("certs/cert.pem").exists()


def test_the_planners_examples_work(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.symlink(ROOT / "benchmarks", "benchmarks")
    Path("plan.json").unlink()
    for words in examples(plan._parser()):
        assert plan.main(words) == 0
        assert "goals                    met" in capsys.readouterr().out
    assert {"plan.json", "plan.html"} <= contents(folder).keys()


def test_the_observers_examples_work(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Sequence[str], int]] = []

    @contextlib.contextmanager
    def prometheus(targets: Sequence[str], port: int) -> Iterator[str]:
        asked.append((targets, port))
        yield "http://127.0.0.1:9"

    def ctrl_c(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(observe, "prometheus", prometheus)
    monkeypatch.setattr(observe, "wait_for", lambda address, timeout_s: dict.fromkeys(observe.SHOWN, 1.0))
    monkeypatch.setattr("time.sleep", ctrl_c)
    assert [observe.main(words) for words in examples(observe._parser())] == [0, 0]
    assert asked[1] == (["localhost:8080"], 9090)


def test_the_operators_examples_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a cluster they end there, except those that need none."""
    shutil.copy(ROOT / "tests" / "data" / "chart" / "dev.yaml", "manifest.yaml")
    codes = [k8s.main(words) for words in examples(k8s._parser())]
    assert codes == [4, 4, 4, 4, 4, 0]
    output = capsys.readouterr()
    assert output.err.count("error: no cluster is configured") == 5
    assert output.out.splitlines()[-1].isdecimal()


@pytest.mark.parametrize(
    ("module", "main", "work"),
    [(fetch_weights, fetch_weights.main, "fetch"), (conversation, run_conversation, "converse")],
)
def test_the_helpers_examples_work(
    module: object, main: Callable[[Sequence[str]], int], work: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[object, ...]] = []
    monkeypatch.setattr(module, work, lambda *options: done.append(options))
    monkeypatch.setattr(fetch_weights, "try_output", lambda path: None)
    monkeypatch.setattr(Path, "touch", lambda path: None)
    for words in examples(module._parser()):  # type: ignore[attr-defined]
        assert main(words) == 0
    assert done


def test_numbers_and_words_of_options() -> None:
    assert cli.whole(1, 3)("3") == 3
    assert cli.number(0, 1)("0.5") == 0.5
    for parse, text in [
        (cli.whole(1, 3), "4"),
        (cli.number(0, 1), "nan"),
        (cli.positive, "0"),
        (cli.port, "-1"),
    ]:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)
    with pytest.raises(ConfigError, match="see prog --help"):
        cli.Parser(prog="prog").parse_args(["more"])
