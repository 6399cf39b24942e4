"""Own voices: what a stranger may upload, what becomes of it, and who may speak with it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
from golden import GOLDEN
from loopback import KEYRING
from loopback import link as link_to
from ray.exceptions import ActorDiedError
from starlette.applications import Starlette

from deployments.fleet import Fleet
from deployments.gateway import asking as asking_module
from deployments.gateway.access import AccessRoutes
from deployments.gateway.accounts import Accounts
from deployments.gateway.admission import AccessControl
from deployments.gateway.asking import Asking
from deployments.gateway.keys import KeyTable, parse_key
from deployments.gateway.ownvoices import UPLOADS, OwnVoices, UploadRate
from deployments.gateway.query import persona_from
from deployments.gateway.recording import UPLOAD_LIMIT, Reader
from deployments.gateway.turns import Turns
from deployments.replica.questions import QUESTIONS, Questions
from deployments.wire import messages, questions
from deployments.wire.handshake import ReplicaHandshake
from deployments.wire.link import Link, listen
from deployments.wire.messages import LeaseRequest, MessageKind, ReplicaStatus
from deployments.wire.voicestore import HOLDER_LIMIT, VoiceStore
from personaplex.audio.voicewav import check, read_voice
from personaplex.config import SAMPLE_RATE
from personaplex.engine.echo import EchoEngine
from personaplex.engine.events import Batch, Encoded, Opened, Refused
from personaplex.engine.loop import EngineLoop
from personaplex.errors import BadAudio, Forbidden, NoCapacity, ProtocolError, TooManySessions, UnknownVoice
from personaplex.persona import Persona, own_digest, own_voice
from personaplex.sessionlog import SessionRecorder

VOICE = GOLDEN / "voice.wav"


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.close()


# Reading what a stranger sends


def sound(seconds: float, rate: int = 24_000, channels: int = 1, seed: int = 0) -> np.ndarray[Any, Any]:
    """Something like speech: noise in syllables over a quiet background."""
    random = np.random.default_rng(seed)
    time_s = np.arange(round(seconds * rate)) / rate
    loud = np.where(np.sin(2 * np.pi * 1.3 * time_s) > -0.3, 0.1, 1e-4)
    return (random.standard_normal((len(time_s), channels)) * loud[:, None]).astype(np.float32)


def file_of(
    pcm: np.ndarray[Any, Any], rate: int = 24_000, kind: str = "WAV", subtype: str | None = None
) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, pcm, rate, format=kind, subtype=subtype)
    return content.getvalue()


def riff(channels: int = 1, rate: int = 24_000, claimed: int = 0, data: bytes = b"", bits: int = 16) -> bytes:
    """A WAV file whose header says what it likes."""
    block = channels * bits // 8
    fmt = struct.pack("<HHIIHH", 1, channels, rate, rate * block & 0xFFFFFFFF, block & 0xFFFF, bits)
    head = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", claimed & 0xFFFFFFFF)
    return b"RIFF" + struct.pack("<I", (len(head) + claimed) & 0xFFFFFFFF) + head + data


def expanding() -> bytes:
    """Some kilobytes of FLAC that unpack to ten minutes of eight channels at 192 kHz."""
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", 192_000, 8, format="FLAC", subtype="PCM_16") as file:
        block = np.zeros((192_000, 8), np.int16)
        for _ in range(60):
            file.write(block)
    assert len(content.getvalue()) < UPLOAD_LIMIT / 4
    return content.getvalue()


def w64(samples: int) -> bytes:
    """A Sony Wave64 file that claims so many samples, beyond 32 bits."""
    good = io.BytesIO()
    soundfile.write(good, sound(1.0), 24_000, format="W64")
    data = bytearray(good.getvalue())
    at = data.index(b"data") + 16
    data[at : at + 8] = struct.pack("<Q", 24 + 2 * samples)
    return bytes(data)


HOSTILE = {
    "expands like a zip": expanding,
    "4 GB by its header": lambda: riff(claimed=0xFFFFFFF0, data=bytes(1_000)),
    "1 Hz": lambda: riff(rate=1, claimed=48_000, data=bytes(48_000)),
    "64 channels": lambda: riff(channels=64, claimed=640_000, data=bytes(640_000)),
    "1,000 channels": lambda: riff(channels=1_000, claimed=200_000, data=bytes(200_000)),
    "a rate of 4 GHz": lambda: riff(rate=0xFFFFFFFF, claimed=48_000, data=bytes(48_000)),
    "no channels": lambda: riff(channels=0, claimed=48_000, data=bytes(48_000)),
    "an hour": lambda: file_of(np.zeros(3_600 * 8_000, np.int16)[:, None], 8_000, "FLAC"),
    "31 s": lambda: file_of(sound(31.0)),
    "wrong magic": lambda: b"RIFX" + os.urandom(20_000),
    "a picture": lambda: b"\x89PNG\r\n\x1a\n" + os.urandom(20_000),
    "an archive": lambda: b"PK\x03\x04" + os.urandom(20_000),
    "half an Ogg": lambda: file_of(sound(3.0), 24_000, "OGG")[:4_000].replace(b"vorbis", b"vorbit"),
    "a pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "one byte": lambda: b"R",
    "silence": lambda: file_of(np.zeros((48_000, 1), np.float32)),
    "no number": lambda: file_of(np.full((48_000, 1), np.nan, np.float32), subtype="FLOAT"),
    "0.2 s": lambda: file_of(sound(0.2)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_recordings_are_refused_in_words(name: str, reader: Reader) -> None:
    data = HOSTILE[name]()
    assert len(data) <= UPLOAD_LIMIT or name in ("31 s",)
    with pytest.raises(BadAudio) as caught:
        reader.read(data)
    assert len(str(caught.value)) > 10
    assert "/" not in str(caught.value).replace("and/or", ""), "no path of ours"


def test_a_header_that_claims_2_to_36_samples_costs_what_is_there(reader: Reader) -> None:
    assert len(reader.read(w64(2**36)).pcm) == SAMPLE_RATE


def test_damaged_files_of_every_format_end_in_words(reader: Reader) -> None:
    """Bytes changed at random, where headers are: whatever the decoder does, it does in a child."""
    random = np.random.default_rng(5)
    for kind in ("WAV", "FLAC", "OGG", "MP3", "AIFF", "CAF"):
        good = file_of(sound(1.0), 24_000, kind)
        for _ in range(5):
            data = bytearray(good)
            for at in random.integers(0, min(len(data), 400), 12):
                data[at] = random.integers(256)
            with contextlib.suppress(BadAudio):
                assert len(reader.read(bytes(data)).pcm)
    assert len(reader.read(VOICE.read_bytes()).pcm), "others are read as before"


def test_a_child_has_a_bound_on_its_memory(reader: Reader) -> None:
    """The largest file that is read, and the process that forks the children stays as it was."""
    reader.read(VOICE.read_bytes())
    process = reader._process
    assert process is not None
    parent, before, peaks = psutil.Process(process.pid), psutil.Process(process.pid).memory_info().rss, [0]
    data, ended = expanding(), asyncio.Event()

    async def run() -> None:
        async def watch() -> None:
            while not ended.is_set():
                for child in parent.children():
                    with contextlib.suppress(psutil.Error):
                        peaks.append(child.memory_info().rss)
                await asyncio.sleep(0.002)

        watching = asyncio.ensure_future(watch())
        with pytest.raises(BadAudio):
            await asyncio.to_thread(reader.read, data)
        ended.set()
        await watching

    asyncio.run(run())
    assert max(peaks) - before < 200e6
    assert parent.memory_info().rss - before < 20e6


def test_a_child_that_is_killed_is_a_typed_refusal(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    reader.read(VOICE.read_bytes())
    assert reader._process is not None
    process = psutil.Process(reader._process.pid)
    process.suspend()  # so that nobody reads
    monkeypatch.setattr("deployments.gateway.recording.TIMEOUT_S", 0.2)
    try:
        with pytest.raises(BadAudio, match="too much work"):
            reader.read(VOICE.read_bytes())
    finally:
        process.resume()
    monkeypatch.undo()
    process.kill()
    process.wait(10)
    monkeypatch.setenv("PERSONAPLEX_API_KEYS", "s3cret")
    assert len(reader.read(VOICE.read_bytes()).pcm), "another process takes its place"
    assert reader._process is not None
    assert b"s3cret" not in Path(f"/proc/{reader._process.pid}/environ").read_bytes(), "no key goes with it"


def test_a_recording_that_nobody_began_to_read_is_read_by_the_next_process(reader: Reader) -> None:
    """The process is killed while the recording lies in its socket."""
    reader.read(VOICE.read_bytes())
    assert reader._process is not None
    process = psutil.Process(reader._process.pid)
    process.suspend()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(reader.read, VOICE.read_bytes())
        assert not wait([reading], 0.5).done
        process.kill()
        assert len(reading.result(30).pcm)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
def test_a_recording_is_read_as_offline_reads_it(kind: str, reader: Reader, tmp_path: Path) -> None:
    pcm, rate = soundfile.read(VOICE, dtype="float32")
    data = file_of(np.stack([pcm, 0.5 * pcm], axis=1), rate, kind)
    (tmp_path / "voice").write_bytes(data)
    offline, live = read_voice(tmp_path / "voice"), reader.read(data)
    np.testing.assert_array_equal(live.pcm, offline.pcm)
    assert live.loudness == round(offline.loudness, 1)


# What is wrong with a recording


def problems(pcm: np.ndarray[Any, Any], rate: int = 24_000, loudness: float = -24.0) -> set[str]:
    mono = pcm.reshape(-1)
    return {one.kind for one in check(mono, mono, loudness)}


def test_a_good_recording_has_no_problem() -> None:
    assert problems(sound(10.0)) == set()


def test_each_problem_is_found_and_no_other() -> None:
    good = sound(10.0)
    assert problems(good[: 4 * SAMPLE_RATE]) == {"short"}
    assert problems(np.clip(4 * good, -0.3, 0.3)) == {"clipped"}, "turned down after it was clipped"
    assert problems(np.clip(12 * good, -1.0, 1.0)) == {"clipped"}
    pauses = np.concatenate([good[: 4 * SAMPLE_RATE], np.zeros((6 * SAMPLE_RATE, 1), np.float32)])
    assert problems(pauses) == {"silent"}
    noise = 0.03 * np.random.default_rng(1).standard_normal(good.shape).astype(np.float32)
    assert problems(good + noise) == {"noisy"}
    assert problems(good / 30, loudness=-52.0) == {"quiet"}


# Voices between upload and session


def test_a_voice_is_its_holders_and_has_its_time() -> None:
    store = VoiceStore()
    store.put("a", "d", b"voice", 10.0, 0.0)
    assert store.get("a", "d", 9.0) == b"voice"
    assert store.get("b", "d", 9.0) is None
    assert store.get("a", "d", 10.0) is None
    assert not len(store)
    for number in range(HOLDER_LIMIT + 1):
        store.put("a", str(number), b"voice", 10.0, 20.0 + number / 1e3)
    assert store.get("a", "0", 21.0) is None
    assert store.get("a", "1", 21.0) == b"voice"
    store.put("b", "1", b"voice", 10.0, 21.0)
    store.delete("a", "1")
    assert store.get("a", "1", 21.0) is None
    assert store.get("b", "1", 21.0) == b"voice"


def test_uploads_are_counted_by_caller() -> None:
    rate = UploadRate()
    for _ in range(UPLOADS):
        rate.count("a", 100.0)
    with pytest.raises(TooManySessions) as caught:
        rate.count("a", 130.0)
    assert caught.value.retry_after_s == pytest.approx(30.0)
    assert caught.value.limit == "uploads"
    rate.count("b", 130.0)
    rate.count("a", 160.0)


def test_an_own_voice_is_a_name_of_64_digits_and_nothing_else() -> None:
    name = own_voice("0f" * 32)
    assert persona_from({"voice_prompt": name}).voice == name
    assert LeaseRequest.of("s", Persona(name)).voice == "0f" * 32
    for wrong in ("own:", "own:0f", "own:" + "0F" * 32, name + ".pt", "own:../../x", "OWN:" + "0f" * 32):
        with pytest.raises(UnknownVoice):
            persona_from({"voice_prompt": wrong})


def test_its_bytes_travel_with_the_open_and_are_part_of_the_log() -> None:
    persona = Persona(own_voice("0f" * 32), "Hello.", own=bytes(range(256)))
    opening = messages.unpack_opening(messages.pack_open(bytes(16), persona))
    assert messages.unpack_open(opening.rest) == persona
    assert "own" not in repr(persona).replace("own:", "")
    assert SessionRecorder(persona).log().voice == persona.own


# A replica's answers, on real links


@dataclass
class Place:
    """A replica as far as questions go: an engine's thread behind a media port."""

    status: ReplicaStatus
    loop: EngineLoop
    events: list[Any]


@contextlib.asynccontextmanager
async def replica(make: Callable[[], Any] = lambda: EchoEngine(2, 100)) -> AsyncIterator[Place]:
    running, events, made = asyncio.get_running_loop(), list[Any](), list[Any]()

    def deliver(batch: Batch) -> None:
        running.call_soon_threadsafe(take, batch)

    def take(batch: Batch) -> None:
        for event in batch.events:
            events.append(event)
            if isinstance(event, Encoded):
                asked.encoded(event)

    def build() -> Any:
        made.append(make())
        return made[0]

    loop = EngineLoop(build, deliver, gather_s=0.0, inbox_limit=25)
    await asyncio.wrap_future(loop.start())
    asked = Questions(made[0].count_tokens, 100, loop.encode)

    def message(link: Link, kind: MessageKind, payload: bytes) -> None:
        if kind in QUESTIONS or link in asked:
            asked.receive(link, kind, payload)
        else:
            raise ProtocolError("no lease")

    server, port = await listen(
        lambda: Link(message, asked.lost, handshake=ReplicaHandshake(KEYRING, "r"), outbox=25, stall_s=10.0),
        "127.0.0.1",
    )
    status = ReplicaStatus("r", "n", 1, "echo", (), 2, True, (), media=("127.0.0.1", port))
    try:
        yield Place(status, loop, events)
    finally:
        server.close()
        await asyncio.to_thread(loop.stop)


def asking_of(place: Place) -> Asking:
    async def replicas() -> list[ReplicaStatus]:
        return [place.status]

    return Asking(replicas, link_to)


async def until(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110  of another thread
        await asyncio.sleep(0.005)


def in_a_loop(run: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(run(), 60))  # type: ignore[arg-type]


def test_a_replica_counts_tokens_and_makes_voices() -> None:
    async def run() -> None:
        async with replica() as place:
            asking = asking_of(place)
            assert await asking.count_tokens("x" * 41) == (11, 100)
            pcm = sound(3.0)[:, 0]
            digest, packed = await asking.encode(pcm)
            assert await asking.encode(pcm) == (digest, packed)
            assert (await asking.encode(pcm[:-1]))[0] != digest
            place.loop.open(Persona(own_voice(digest), "", own=packed))
            place.loop.open(Persona(own_voice("00" * 32), "", own=packed))
            await until(lambda: sum(isinstance(one, (Opened, Refused)) for one in place.events) == 2)
            (refused,) = [one for one in place.events if isinstance(one, Refused)]
            assert isinstance(refused.error, UnknownVoice)

    in_a_loop(run)


def test_counts_are_remembered_and_no_replica_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking_module, "TOKENS_TIMEOUT_S", 0.5)

    async def run() -> None:
        async with replica() as place:
            asking = asking_of(place)
            await asking.count_tokens("known")
        assert (await asking.count_tokens("known"))[0] == 2
        with pytest.raises(NoCapacity, match="no replica answers"):
            await asking.count_tokens("another")

    in_a_loop(run)


@pytest.mark.parametrize(
    "asked",
    [
        [(MessageKind.SAMPLES, b"\0" * 5)],
        [(MessageKind.SAMPLES, b"\0" * 60_000)] * 60,
        [(MessageKind.SAMPLES, np.full(4, np.nan, "<f4").tobytes()), (MessageKind.ENCODE, b"")],
        [(MessageKind.TOKENS, b"\xff")],
        [(MessageKind.TOKENS, b"a"), (MessageKind.OPEN, bytes(20))],
        [(MessageKind.TOKENS, b"a"), (MessageKind.FRAME, bytes(7_684))],
    ],
)
def test_questions_of_another_shape_end_the_link(asked: list[tuple[MessageKind, bytes]]) -> None:
    async def run() -> None:
        heard, lost = list[Any](), asyncio.Event()
        async with replica() as place:
            link = await link_to(
                "r",
                *place.status.media,
                lambda _, kind, payload: heard.append((kind, payload)),
                lambda _: lost.set(),
            )
            for kind, payload in asked:
                link.send(kind, payload)
            await asyncio.wait_for(lost.wait(), 10)
            kind, payload = heard[-1]
            assert kind is MessageKind.CLOSE
            assert isinstance(messages.unpack_error(payload), ProtocolError)

    in_a_loop(run)


def test_answers_of_another_shape_are_refused() -> None:
    for payload in (b"", b"{}", b'{"tokens": -1, "limit": 5}', b'{"tokens": 1.5, "limit": 5}', b"\xff"):
        with pytest.raises(ProtocolError):
            questions.unpack_tokens(payload)
    for payload in (b"", b"x" * 70, b"0f" * 32, b"\xff" * 70):
        with pytest.raises(ProtocolError):
            questions.unpack_voice(payload)


def test_an_empty_recording_and_too_many_are_said_so() -> None:
    async def run() -> None:
        async with replica() as place:
            asking = asking_of(place)
            with pytest.raises(BadAudio, match="no audio"):
                await asking.encode(np.zeros(0, np.float32))
            results = await asyncio.gather(
                *(asking.encode(sound(20.0, seed=number)[:, 0]) for number in range(20)),
                return_exceptions=True,
            )
            assert {type(one) for one in results} <= {tuple, NoCapacity}
            assert any(isinstance(one, tuple) for one in results)

    in_a_loop(run)


# The routes


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


async def request(
    app: Any, method: str, path: str, body: bytes = b"", key: str = "", **headers: str
) -> Answer:
    named = {"x-api-key": key} if key else {}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    where, _, query = path.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": where,
        "raw_path": where.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in named.items()],
        "client": ("192.0.2.1", 1),
        "server": ("test", 80),
        "scheme": "http",
        "http_version": "1.1",
    }
    said: list[Any] = []
    pieces = [body[start : start + 65_536] for start in range(0, len(body), 65_536)] or [b""]
    sent = iter([*({"type": "http.request", "body": one, "more_body": True} for one in pieces[:-1])])

    async def receive() -> Any:
        return next(sent, {"type": "http.request", "body": pieces[-1], "more_body": False})

    async def send(message: Any) -> None:
        said.append(message)

    await app(scope, receive, send)
    head = {name.decode(): value.decode() for name, value in said[0]["headers"]}
    return Answer(said[0]["status"], head, b"".join(one.get("body", b"") for one in said[1:]))


class Handle:
    """The fleet's handle: calls `fleet`, or fails while `away`."""

    def __init__(self) -> None:
        self.fleet, self.away = Fleet(), False

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any) -> Any:
            if self.away:
                raise ActorDiedError
            return await getattr(self.fleet, name)(*args)

        return SimpleNamespace(remote=call)


KEYS = ("good label=acme own_voices=yes sessions=3", "other own_voices=yes", "plain")


def gateway(
    handle: Handle,
    place: Place,
    reader: Reader | None = None,
    keys: tuple[str, ...] = KEYS,
    allowed: bool = False,
) -> tuple[Any, OwnVoices]:
    table = KeyTable(map(parse_key, keys))
    access = AccessControl(
        (lambda: table) if keys else None,
        (),
        sessions_per_address=0,
        trusted_proxies=0,
        unlimited_networks=(),
    )
    metrics: Any = SimpleNamespace(add=lambda *_, **__: None)
    accounts = Accounts(
        handle,
        "g",
        metrics,
        Turns(time.monotonic),
        table=lambda: table,
        sessions_per_key=0,
        revoke_ends_sessions=False,
    )
    asking = asking_of(place)
    voices = OwnVoices(handle, asking, metrics, allowed=allowed, ttl_s=60.0, table=lambda: table)
    if reader is not None:
        voices._recordings._reader = reader
    routes = AccessRoutes(access, accounts, voices, asking, query_limit=1_024)
    return Starlette(routes=routes.routes()), voices


def test_an_upload_becomes_a_voice_of_its_key_at_every_gateway(reader: Reader) -> None:
    async def run() -> None:
        handle = Handle()
        async with replica() as place:
            one, here = gateway(handle, place, reader)
            _, there = gateway(handle, place)
            answer = await request(one, "POST", "/api/voices?consent=1", VOICE.read_bytes(), "good")
            assert answer.status == 200
            said = answer.json()
            assert set(said) == {"voice", "seconds", "loudness", "expires_s", "problems"}
            assert said["seconds"] == pytest.approx(2.37, abs=0.01)
            assert {one["kind"] for one in said["problems"]} >= {"short"}
            persona = persona_from({"voice_prompt": said["voice"]})
            good, other = (KeyTable(map(parse_key, KEYS)).find(name) for name in ("good", "other"))
            for voices in (here, there):
                brought = await voices.bring(persona, good)
                assert brought == replace(persona, own=brought.own)
                assert brought.own
                with pytest.raises(UnknownVoice, match="upload"):
                    await voices.bring(persona, other)
            handle.away = True
            assert (await here.bring(persona, good)).own, "kept where it came in while the fleet is away"
            handle.away = False
            gone = await request(one, "DELETE", f"/api/voices/{said['voice']}", key="good")
            assert gone.status == 204
            for voices in (here, there):
                with pytest.raises(UnknownVoice):
                    await voices.bring(persona, good)
            assert await there.bring(Persona(), None) == Persona()
            assert own_digest(persona.voice)

    in_a_loop(run)


def test_uploads_are_refused_before_a_byte_is_read() -> None:
    async def run() -> None:
        async with replica() as place:
            app, _ = gateway(Handle(), place)
            path, data = "/api/voices?consent=1", VOICE.read_bytes()
            cases = [
                (await request(app, "POST", path, data), 401, "key"),
                (await request(app, "POST", path, data, "plain"), 403, "no own voices"),
                (await request(app, "POST", "/api/voices", data, "good"), 400, "consent"),
                (await request(app, "POST", path, data, "good", content_length="2000001"), 413, "2,000,000"),
                (await request(app, "POST", path, bytes(UPLOAD_LIMIT + 1), "good"), 413, "2,000,000"),
                (
                    await request(app, "POST", path, data, "good", content_type="multipart/form-data"),
                    415,
                    "form",
                ),
                (await request(app, "POST", path, data, "good", content_encoding="gzip"), 415, "Encoding"),
                (await request(app, "POST", path, b"", "good"), 400, "empty"),
                (await request(app, "DELETE", "/api/voices/NATF2", key="good"), 400, "own voice"),
                (await request(app, "DELETE", "/api/voices/own:..", key="good"), 400, "own:DIGEST"),
            ]
            for answer, status, words in cases:
                assert (answer.status, words in answer.body.decode()) == (status, True), answer
                assert answer.headers["content-type"].startswith("text/plain")
            for _ in range(UPLOADS):
                await request(app, "POST", path, b"", "other")
            answer = await request(app, "POST", path, data, "other")
            assert (answer.status, answer.headers["x-limit"]) == (429, "uploads")
            open_, voices = gateway(Handle(), place, keys=())
            answer = await request(open_, "POST", path, data)
            assert answer.status == 403
            assert voices.describe()["allowed"] == "no"
            with pytest.raises(Forbidden):
                await voices.bring(Persona(own_voice("0f" * 32)), None)

    in_a_loop(run)


def test_a_recording_that_cannot_be_used_is_422_and_says_why(reader: Reader) -> None:
    async def run() -> None:
        async with replica() as place:
            app, _ = gateway(Handle(), place, reader, keys=(), allowed=True)
            for name, words in (
                ("a picture", "cannot be read"),
                ("silence", "silent"),
                ("0.2 s", "at least"),
            ):
                answer = await request(app, "POST", "/api/voices?consent=1", HOSTILE[name]())
                assert answer.status == 422, answer
                assert words in answer.body.decode()

    in_a_loop(run)


def test_ten_thousand_uploads_are_refused_one_by_one_and_nothing_is_kept(reader: Reader) -> None:
    async def run() -> None:
        async with replica() as place:
            app, voices = gateway(Handle(), place, reader)
            data, found = HOSTILE["a picture"](), dict[int, int]()
            before = psutil.Process().memory_info().rss
            for _ in range(20):
                answers = await asyncio.gather(
                    *(request(app, "POST", "/api/voices?consent=1", data, "good") for _ in range(500))
                )
                for answer in answers:
                    found[answer.status] = found.get(answer.status, 0) + 1
            assert set(found) == {422, 429}
            assert found[422] <= UPLOADS
            assert sum(found.values()) == 10_000
            assert not len(voices._here)
            assert psutil.Process().memory_info().rss - before < 200e6

    in_a_loop(run)


def test_an_endless_stream_ends_at_the_limit() -> None:
    async def run() -> None:
        async with replica() as place:
            app, _ = gateway(Handle(), place)
            taken = 0

            async def receive() -> Any:
                nonlocal taken
                taken += 65_536
                return {"type": "http.request", "body": bytes(65_536), "more_body": True}

            said: list[Any] = []

            async def send(message: Any) -> None:
                said.append(message)

            scope = {
                "type": "http",
                "method": "POST",
                "path": "/api/voices",
                "root_path": "",
                "query_string": b"consent=1",
                "headers": [(b"x-api-key", b"good")],
                "client": ("192.0.2.1", 1),
            }
            await app(scope, receive, send)
            assert said[0]["status"] == 413
            assert taken < UPLOAD_LIMIT + 2 * 65_536

    in_a_loop(run)


def test_a_key_is_told_what_it_may_do() -> None:
    async def run() -> None:
        async with replica() as place:
            app, _ = gateway(Handle(), place)
            answer = await request(app, "GET", "/api/key", key="good")
            said = answer.json()
            assert said["minutes"].pop("renews_s") <= 86_400
            assert said == {
                "label": "acme",
                "sessions": {"held": 0, "limit": 3},
                "minutes": {"used": 0.0, "limit": 0.0},
                "priority": 5,
                "own_voices": True,
            }
            assert answer.headers["cache-control"] == "no-store"
            assert not (await request(app, "GET", "/api/key", key="plain")).json()["own_voices"]
            assert (await request(app, "GET", "/api/key", key="nobody")).status == 401
            open_, _ = gateway(Handle(), place, keys=())
            assert (await request(open_, "GET", "/api/key")).status == 404

    in_a_loop(run)


def test_tokens_are_counted_as_the_engine_counts_them() -> None:
    async def run() -> None:
        async with replica() as place:
            app, _ = gateway(Handle(), place)
            body = json.dumps({"text_prompt": "é" * 401}, ensure_ascii=False).encode()
            answer = await request(app, "POST", "/api/tokens", body, "plain")
            assert answer.json() == {"tokens": 101, "limit": 100, "left": -1}
            assert (await request(app, "POST", "/api/tokens", body)).status == 401
            for wrong in (
                b"",
                b"[]",
                b'{"text_prompt": 5}',
                b'{"text": ""}',
                b'{"text_prompt": "\\ud800"}',
                b"[" * 900,
            ):
                answer = await request(app, "POST", "/api/tokens", wrong, "plain")
                assert (answer.status, b"text_prompt" in answer.body) == (400, True)
            assert (await request(app, "POST", "/api/tokens", b"x" * 1_025, "plain")).status == 413

    in_a_loop(run)
