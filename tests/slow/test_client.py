"""The client command against a real socket: this service, NVIDIA's server, and servers in trouble."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import ssl
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import sphn
from echo_service import EchoService, echo
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from personaplex import client
from personaplex.audio.device import Device
from personaplex.audio.recorder import Recorder, Rhythm
from personaplex.audio.transcoder import Transcoder
from personaplex.audio.wav import read_wav, write_wav
from personaplex.client_io import chat_url, parser
from personaplex.errors import ConfigError
from personaplex.session.core import Limits

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.6 s of speech, stereo at 48 kHz, to be resampled."""
    frames = Transcoder().receive((DATA / "mic.ogg").read_bytes())
    pcm = np.concatenate(frames[10:30])
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    write_wav(path, np.stack([np.repeat(pcm, 2), np.zeros(2 * len(pcm), np.float32)]), 48_000)
    return path


def best_delay(heard: np.ndarray, said: np.ndarray) -> tuple[float, float]:
    """Seconds by which `heard` is behind `said`, and how alike they are there."""
    said = said[:24_000]
    scores = np.correlate(heard, said, mode="valid")
    delay = int(np.argmax(scores))
    return delay / 24_000, float(np.corrcoef(heard[delay : delay + len(said)], said)[0, 1])


def test_a_recording_is_streamed_and_the_answer_kept(
    speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wav, text, report = tmp_path / "out.wav", tmp_path / "out.txt", tmp_path / "out.json"
    began = time.monotonic()
    with EchoService() as service:
        options = ["--url", service.url, "--input-wav", str(speech), "--tail", "0.4", "--api-key", "k-1"]
        options += ["--output-wav", str(wav), "--output-text", str(text), "--output-json", str(report)]
        options += ["--voice", "NATM1", "--text-prompt", "You are brief & kind.", "--seed", "7"]
        status = client.main(options)
    took = time.monotonic() - began
    assert status == 0
    (heard,), rate = read_wav(wav)
    (said, _), _ = read_wav(speech)
    assert rate == 24_000
    assert 2.0 <= len(heard) / rate < 2.3, "as long as the recording and its tail, and the last answer"
    # 0.4 s each, looked for within a second; a busy machine may tear one of the four
    found = [
        best_delay(heard[start : start + 33_600], said[::2][start : start + 9_600])
        for start in range(0, len(said) // 2, 9_600)
    ]
    delay, likeness = np.median(found, axis=0)
    assert likeness > 0.9
    assert 0 <= delay < 0.5
    assert took > 1.1 + 1.9, "a browser's decoder is waited for, and frames leave in real time"

    told = json.loads(report.read_text())
    assert told["frames_sent"] == 25
    assert 20 <= told["frames_heard"] <= 25
    assert 1.0 < told["handshake_s"] < 2.5
    assert 0 < told["first_audio_s"] < 1.0
    assert 40 < told["rhythm"]["p50_ms"] < 120
    assert told["session"] == {"type": "session", "voice": "NATF2"}
    output = capsys.readouterr()
    assert output.out.strip() == text.read_text().strip() == told["transcript"].strip()
    assert set(text.read_text()) == {" ", "é"}
    assert "position 2" in output.err
    assert "between pages" in output.err
    assert service.headers[0]["authorization"] == "Bearer k-1"
    assert service.requests == [
        "/api/chat?voice_prompt=NATM1.pt&text_prompt=You+are+brief+%26+kind.&seed=7&status=1",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.txt", "out.wav"]


async def nvidias_server(socket: ServerConnection) -> None:
    """What the reference does: a bare handshake, sphn both ways, audio as it comes, no pacing."""
    reader, writer = sphn.OpusStreamReader(24_000), sphn.OpusStreamWriter(24_000)
    await socket.send(b"\x00")
    waiting = np.zeros(0, np.float32)
    with contextlib.suppress(ConnectionClosed):
        async for message in socket:
            assert isinstance(message, bytes)
            assert message[0] == 1
            waiting = np.concatenate((waiting, reader.append_bytes(message[1:])))
            while len(waiting) >= 1_920:
                if page := writer.append_pcm(waiting[:1_920]):
                    await socket.send(b"\x01" + page)
                waiting = waiting[1_920:]
                await socket.send(b"\x02 hi")


def test_nvidias_server(speech: Path, tmp_path: Path) -> None:
    wav = tmp_path / "out.wav"
    with EchoService(nvidias_server) as service:
        options = [
            "--url",
            service.url,
            "--input-wav",
            str(speech),
            "--output-wav",
            str(wav),
            "--tail",
            "0.4",
        ]
        assert client.main(options) == 0
    (heard,), _ = read_wav(wav)
    (said, _), _ = read_wav(speech)
    assert best_delay(heard, said[::2])[1] > 0.8


async def full(socket: ServerConnection) -> None:
    await socket.send(b"\x05all 4 slots are taken")
    await socket.close(1013, "try again in 5 s")


async def vanish(socket: ServerConnection) -> None:
    await socket.send(b"\x00")
    socket.transport.abort()


async def babble(socket: ServerConnection) -> None:
    await socket.send(b"\x07\x01in colour")
    await socket.wait_closed()


async def text_frame(socket: ServerConnection) -> None:
    await socket.send("hello")
    await socket.wait_closed()


async def not_audio(socket: ServerConnection) -> None:
    await socket.send(b"\x00")
    await socket.recv()
    for _ in range(3):
        await socket.send(b"\x01" + bytes(65_000))
    await socket.wait_closed()


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        (full, "all 4 slots are taken"),
        (vanish, "closed the connection (code 1006)"),
        (babble, "unknown message kind 7"),
        (text_frame, "text frames"),
        (not_audio, "no usable Ogg page"),
    ],
)
def test_servers_in_trouble(
    handler: object, words: str, speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with EchoService(handler) as service:  # type: ignore[arg-type]
        assert client.main(["--url", service.url, "--input-wav", str(speech)]) == 1
    assert words in capsys.readouterr().err


def test_nobody_listens(speech: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with EchoService() as service:
        url = service.url
    assert client.main(["--url", url, "--input-wav", str(speech)]) == 1
    assert "error: cannot connect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (401, b"", "check --api-key"),
        (403, b"pages of this origin may not connect\n", "(HTTP 403): pages of this origin"),
        (429, b"this key holds as many sessions as it may; try again in 10 s\n", "this key holds"),
        (503, b"", "no capacity"),
        (503, b"the queue is full; try again in 5 s\n", "no capacity (HTTP 503): the queue is full"),
        (400, b"seed must be a whole number\n", "error: seed must be"),
        (400, b"\x1b[2Jred", "HTTP 400 instead"),
        (404, b"x" * 5_000, "HTTP 404 instead"),
    ],
)
def test_http_refusals(
    status: int, body: bytes, words: str, speech: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plain socket that answers one request with `status`."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4_096)
                head = b"HTTP/1.1 %d No\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
                connection.sendall(head % (status, len(body)) + body)

        thread = threading.Thread(target=answer)
        thread.start()
        port = server.getsockname()[1]
        assert client.main(["--url", f"ws://127.0.0.1:{port}", "--input-wav", str(speech)]) == 1
        thread.join()
    assert words in capsys.readouterr().err


def test_self_signed_certificates(speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with EchoService(full, self_signed(tmp_path)) as service:
        options = ["--url", service.url, "--input-wav", str(speech)]
        assert client.main(options) == 1
        assert "--insecure accepts it" in capsys.readouterr().err
        assert client.main([*options, "--insecure"]) == 1
        assert "all 4 slots are taken" in capsys.readouterr().err


def self_signed(folder: Path) -> ssl.SSLContext:
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
    today = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(today - datetime.timedelta(days=1))
        .not_valid_after(today + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = folder / "server.pem"
    pem.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    return context


def test_an_interrupt_keeps_what_was_heard_and_leaves_no_half_file(tmp_path: Path) -> None:
    write_wav(tmp_path / "long.wav", np.zeros(24_000 * 30, np.float32), 24_000)
    folder = tmp_path / "out"
    folder.mkdir()
    with EchoService() as service:
        program = [sys.executable, "-m", "personaplex.client", "--url", service.url]
        program += ["--input-wav", str(tmp_path / "long.wav"), "--output-wav", str(folder / "out.wav")]
        with subprocess.Popen(
            program,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # a background shell passes on that SIGINT is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            assert process.stdout is not None
            assert process.stdout.read(4)  # text arrives: the session is live
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=10)
    assert process.returncode == 130, errors.decode()
    assert b"Traceback" not in errors
    assert [path.name for path in folder.iterdir()] == ["out.wav"]
    assert read_wav(folder / "out.wav")[1] == 24_000


def test_files_are_checked_before_the_conversation(
    speech: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = str(tmp_path / "no" / "out.wav")
    assert client.main(["--input-wav", str(speech), "--output-wav", nowhere]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert client.main(["--input-wav", nowhere]) == 1
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "not.wav").write_bytes(b"?")
    assert client.main(["--input-wav", str(tmp_path / "not.wav")]) == 1
    assert "cannot be read as audio" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("localhost:8998", "ws://localhost:8998/api/chat?status=1"),
        ("https://host/", "wss://host/api/chat?status=1"),
        ("ws://host:1/other?a=1", "ws://host:1/other?a=1&status=1"),
    ],
)
def test_addresses(url: str, expected: str) -> None:
    assert chat_url(parser().parse_args(["--url", url])) == expected


def test_the_query_joins_the_addresss_own() -> None:
    options = parser().parse_args(["--url", "ws://h/api/chat?a=1", "--voice", "NATF0.pt", "--text-topk", "0"])
    assert chat_url(options) == "ws://h/api/chat?a=1&voice_prompt=NATF0.pt&text_topk=0&status=1"


@pytest.mark.parametrize("url", ["ftp://host/", "ws:///api/chat", ""])
def test_addresses_of_another_kind(url: str) -> None:
    with pytest.raises(ConfigError, match="must look like"):
        chat_url(parser().parse_args(["--url", url]))


def test_frames_leave_in_real_time_and_never_in_a_burst() -> None:
    async def run() -> list[float]:
        moments = []
        async for _ in client.paced(np.zeros(1_920 * 9 - 5, np.float32)):
            moments.append(time.monotonic())
            if len(moments) == 4:
                time.sleep(0.3)  # noqa: ASYNC251 -- the whole process stalls
        return moments

    moments = asyncio.run(run())
    assert len(moments) == 9
    gaps = np.diff(moments)
    assert gaps.min() > 0.055
    assert np.sum(gaps) > 8 * 0.08 + 0.2, "the stall is not caught up with"


# -- what was heard, on the time line


def test_heard_audio_stands_where_it_was_heard() -> None:
    recorder, frame = Recorder(start=10.0), np.ones(1_920, np.float32)
    recorder.add(frame, 10.1)
    recorder.add(frame, 10.2)  # 20 ms late: follows on
    recorder.add(frame, 10.5)  # 160 ms late
    pcm = recorder.pcm(24_000)
    assert len(pcm) == 24_000
    assert not pcm[:2_400].any()
    assert pcm[2_400 : 2_400 + 3_840].all()
    assert not pcm[6_240:12_000].any()
    assert pcm[12_000:13_920].all()
    assert not pcm[13_920:].any()
    assert recorder.underruns == 1


def test_nothing_heard() -> None:
    assert Recorder(0.0).pcm(100).shape == (100,)
    assert Rhythm.of([1.0]) is None


def test_rhythm() -> None:
    arrivals = np.cumsum([0.0, *[0.08] * 98, 0.2, 0.5])
    rhythm = Rhythm.of(list(arrivals))
    assert rhythm is not None
    assert rhythm.p50_ms == pytest.approx(80)
    assert rhythm.p99_ms == pytest.approx(200)
    assert rhythm.max_ms == pytest.approx(500)


# -- microphone and loudspeaker


class FakeStream:
    """A sound card's stream whose callback the test calls. As with PortAudio, `close` waits for a call in
    progress, and none comes after it."""

    opened: dict[str, FakeStream] = {}  # noqa: RUF012 -- reset by the fixture
    fails = False

    def __init__(self, **settings: object) -> None:
        self._callback, self._calls = settings.pop("callback"), threading.Lock()
        self.settings = settings
        self.started = self.closed = False
        type(self).opened[type(self).__name__] = self

    def start(self) -> None:
        if self.fails:
            raise OSError("device busy")
        self.started = True

    def close(self) -> None:
        with self._calls:
            self.closed = True

    def callback(self, block: np.ndarray) -> None:
        with self._calls:
            if self.started and not self.closed:
                self._callback(block, len(block), None, None)


class FakeInput(FakeStream):
    pass


class FakeOutput(FakeStream):
    pass


@pytest.fixture
def sound_card(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("sounddevice")
    module.InputStream, module.OutputStream, module.PortAudioError = FakeInput, FakeOutput, OSError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sounddevice", module)
    monkeypatch.setattr(FakeStream, "opened", {})
    return module


@pytest.mark.usefixtures("sound_card")
def test_the_device_keeps_the_newest_frames_and_gathers_before_playing() -> None:
    calls: list[None] = []
    with Device(lambda: calls.append(None)) as device:
        card_in, card_out = FakeStream.opened["FakeInput"], FakeStream.opened["FakeOutput"]
        assert card_in.settings == {
            "samplerate": 24_000,
            "channels": 1,
            "dtype": "float32",
            "blocksize": 1_920,
        }
        for level in range(6):
            card_in.callback(np.full((1_920, 1), level, np.float32))
        assert len(calls) == 6
        assert [device.read()[0] for _ in range(4)] == [2, 3, 4, 5]  # type: ignore[index]
        assert device.read() is None

        def hear() -> float:
            block = np.full((1_920, 1), 9.0, np.float32)
            card_out.callback(block)
            return float(block[0, 0])

        assert hear() == 0
        device.play(np.full(1_920, 0.1, np.float32))
        assert hear() == 0, "one frame is gathered first"
        device.play(np.full(1_920, 0.2, np.float32))
        assert [round(hear(), 1) for _ in range(3)] == [0.1, 0.2, 0.0]
    assert card_in.closed
    assert card_out.closed


def test_a_device_that_cannot_be_opened(
    sound_card: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeOutput, "fails", True)
    with pytest.raises(ConfigError, match="device busy"), Device(lambda: None):
        pass
    assert all(stream.closed for stream in FakeStream.opened.values())


def test_no_sound_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert client.main([]) == 1
    assert "install the Python package sounddevice" in capsys.readouterr().err


@pytest.mark.usefixtures("sound_card")
def test_a_conversation_by_microphone(tmp_path: Path) -> None:
    """A thread plays sound card; the service ends the session after a while."""
    wav = tmp_path / "out.wav"
    stop = threading.Event()

    def card() -> None:
        tone = np.sin(np.arange(1_920) * 0.1).astype(np.float32)[:, None] * 0.3
        while not stop.wait(0.08):
            if "FakeInput" in FakeStream.opened:
                FakeStream.opened["FakeInput"].callback(tone)

    async def hang_up_later(socket: ServerConnection) -> None:
        await echo(socket, Limits(session_s=1.0))

    thread = threading.Thread(target=card)
    thread.start()
    try:
        with EchoService(hang_up_later) as service:
            assert client.main(["--url", service.url, "--output-wav", str(wav)]) == 1  # not our wish
    finally:
        stop.set()
        thread.join()
    (heard,), _ = read_wav(wav)
    assert np.abs(heard).max() > 0.2
