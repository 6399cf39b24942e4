"""Records of the live service: with consent only, exactly what was said, and never at a session's cost."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from serving import Client, Heard, Service, connect, running, speech
from websockets.exceptions import InvalidStatus

from personaplex import replay
from personaplex.config import EngineConfig
from personaplex.engine.engine import Engine
from personaplex.engine.rerun import rerun
from personaplex.loading import ModelSpec, load_parts, resolve
from personaplex.persona import VOICES
from personaplex.record.folder import find_records, read_record
from personaplex.record.format import Record
from personaplex.record.transcript import words
from personaplex.session.moshi import Metadata

SECONDS = 1.6
PATIENT = {"burst_s": 20.0}  # a busy machine may be late: this is about what is kept, not when


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_parts(resolve(ModelSpec("tiny", device="cpu")), EngineConfig()).engine(EngineConfig())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "records"


@pytest.fixture(scope="module")
def service(cluster: str, folder: Path) -> Iterator[Service]:
    settings = {"model": "tiny", "slots": 6, "record": "allowed", "record_dir": folder, "metrics_page": True}
    with running(cluster, **settings, **PATIENT) as service:
        yield service


def kept(folder: Path, session: str, ready: Callable[[Record], bool]) -> Record:
    """The record of a session, once it is as it should be."""
    deadline = time.monotonic() + 10
    while True:
        for path in find_records([folder]) if folder.exists() else []:
            if session in path.name and ready(record := read_record(path)):
                return record
        assert time.monotonic() < deadline, "no such record"
        time.sleep(0.02)


def details(heard: Heard) -> dict[str, object]:
    return next(dict(m.data) for m in heard.of(Metadata) if m.data.get("type") == "session")


async def talk_at_once(service: Service, count: int) -> list[Client]:
    """`count` sessions, of which the last does not agree to be recorded."""

    async def one(number: int) -> Client:
        asked = {} if number == count - 1 else {"record": 1, "record_person": f"customer-{number}"}
        query = {"voice_prompt": VOICES[number], "text_prompt": f"You are number {number}.", **asked}
        async with connect(service, seed=number, **query) as client:
            await client.talk(speech(SECONDS, start=0.4 * number))
        return client

    return list(await asyncio.gather(*(one(number) for number in range(count))))


def test_what_is_kept_is_what_was_said_by_those_who_agreed(
    service: Service, folder: Path, engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    *recorded, other = asyncio.run(talk_at_once(service, 5))
    records = [kept(folder, one.heard.session, lambda r: r.ended is not None) for one in recorded]
    assert len(find_records([folder])) == len(recorded)
    assert not any(other.heard.session in path.name for path in find_records([folder]))
    assert "recorded" not in details(other.heard)
    for number, (client, record) in enumerate(zip(recorded, records, strict=True)):
        assert details(client.heard)["recorded"] is True
        assert (record.head.person, record.head.model) == (f"customer-{number}", "tiny")
        assert record.head.persona.text_prompt == f"You are number {number}."
        assert (record.ended, record.damage) == ("left", None)
        assert len(record) == record.unbroken == len(client.decoded())
        slot = engine.open(record.head.persona)
        again = np.stack(list(rerun(engine, slot, record.tokens)))
        engine.close(slot)
        np.testing.assert_array_equal(again, record.tokens, "from the record alone")
        slot = engine.open(record.head.persona)
        for frame, row in zip(client.decoded(), record.tokens, strict=True):
            engine.feed(slot, frame)
            np.testing.assert_array_equal(engine.step()[0].tokens, row, "from the client's sound")
        engine.close(slot)
        assert "".join(client.heard.text.split()) in "".join(word.text for word in words(record))
        assert 0 < record.latencies_s.min() <= record.latencies_s.max() < 10
    assert replay.main([str(find_records([folder])[0]), "--compare", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("the same: ")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in folder.iterdir())
    assert f'personaplex_records_total{{result="kept"}} {len(recorded)}.0' in service.get("metrics").text
    assert service.info()["record"] == "allowed"


def test_a_person_without_a_name_is_refused_before_the_upgrade(service: Service) -> None:
    async def run() -> None:
        async with connect(service, record=1, record_person="../x"):
            pass

    with pytest.raises(InvalidStatus) as caught:
        asyncio.run(run())
    assert caught.value.response.status_code == 400


def test_a_gateway_that_is_killed_leaves_all_but_the_last_second(service: Service, folder: Path) -> None:
    async def run() -> tuple[str, int]:
        async with connect(service, record=1) as client:
            await client.talk(speech(SECONDS))
            answered = client.heard.last_frame
            await asyncio.sleep(0.6)  # FLUSH_S and a little
            os.kill(gateway_process(service), signal.SIGKILL)
            await client.until_closed()
        return client.heard.session, answered

    session, answered = asyncio.run(run())
    record = kept(folder, session, lambda record: True)
    assert len(record) > answered
    assert record.damage is None
    assert record.ended is None, "cut short"


def gateway_process(service: Service) -> int:
    wanted = f"ray::ServeReplica:{service.name}:gateway".encode()
    for entry in Path("/proc").iterdir():
        command = entry / "cmdline"
        if entry.name.isdigit() and command.exists() and command.read_bytes().startswith(wanted):
            return int(entry.name)
    raise AssertionError("no gateway process")


def test_a_disk_that_takes_nothing_costs_the_record_and_not_the_session(cluster: str, tmp_path: Path) -> None:
    """Here a file stands where the folder should be; `test_recorder` fills a disk while a session talks."""
    (tmp_path / "file").write_text("")
    settings = {"record": "always", "record_dir": tmp_path / "file" / "records", "metrics_page": True}

    async def run(service: Service) -> Client:
        async with connect(service, status=1) as client:
            await client.talk(speech(SECONDS))
        return client

    with running(cluster, model="echo", **settings, **PATIENT) as service:
        client = asyncio.run(run(service))
        assert client.heard.last_frame >= len(client.decoded()) - 1
        assert client.heard.complaint == ""
        told = [dict(message.data) for message in client.heard.of(Metadata)]
        reason = "the record cannot be written: Not a directory"
        assert told[-1] == {"type": "recording", "recorded": False, "reason": reason}
        deadline = time.monotonic() + 5
        while 'personaplex_records_total{result="failed"} 1.0' not in service.get("metrics").text:
            assert time.monotonic() < deadline
            time.sleep(0.05)
