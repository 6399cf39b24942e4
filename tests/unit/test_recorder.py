"""A gateway's records: what happens is written soon, no disk holds a session up, no store is waited for."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from deployments.gateway import recorder as module
from deployments.gateway import retention as retention_module
from deployments.gateway.recorder import Recorder, Recording
from deployments.gateway.retention import (
    EVERY_S,
    EXPIRED,
    LONGEST_RETRY_S,
    LOOK_FAILED,
    RETRY_S,
    UPLOAD_FAILED,
    UPLOADED,
    Retention,
    RetentionLimits,
    store_at,
)
from personaplex.errors import BadRecord, ConfigError, RecordingFailed
from personaplex.persona import Persona
from personaplex.record import writer
from personaplex.record.folder import find_records, read_record
from personaplex.record.format import Head, Record, Row
from personaplex.record.transcript import user_words, words
from personaplex.record.writer import RecordWriter, claimed
from personaplex.words import Segment, Word

NO_LIMIT = RetentionLimits(0, 0)


def head(session: str = "5e55") -> Head:
    return Head(session, 0.0, Persona(), "0.1.0", "tiny")


def talk(recording: Recording, frames: int, text: str = "") -> None:
    for number in range(frames):
        now = time.monotonic()
        recording.frame(Row(number, now, 0.02, np.full(17, number), forced=number == 0), text)


def only(folder: Path) -> Record:
    (path,) = find_records([folder])
    return read_record(path)


class Told:
    """What was told, from any thread."""

    def __init__(self) -> None:
        self.results: list[str] = []
        self._news = threading.Condition()

    def __call__(self, result: str) -> None:
        with self._news:
            self.results.append(result)
            self._news.notify_all()

    def wait(self, *results: str) -> None:
        with self._news:
            assert self._news.wait_for(lambda: len(self.results) >= len(results), 10), self.results
        assert self.results == list(results)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def recorder(tmp_path: Path, told: Told) -> Iterator[Recorder]:
    recorder = Recorder(tmp_path / "records", told, flush_s=0.02)
    yield recorder
    assert recorder.close(10)


def test_a_session_is_written_while_it_goes_on_and_whole_at_its_end(
    recorder: Recorder, tmp_path: Path, told: Told
) -> None:
    before, recording = time.time(), recorder.begin(head())
    talk(recording, 5, " word")
    deadline = time.monotonic() + 10
    # A file is there before its head is.
    while not any(path.stat().st_size for path in find_records([tmp_path])) or len(only(tmp_path)) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert only(tmp_path).ended is None
    recorder.finish(recording, "left")
    recorder.finish(recording, "again")
    assert recording.wait(10)
    told.wait("kept")
    record = only(tmp_path)
    assert (record.ended, record.damage, len(record)) == ("left", None, 5)
    assert before <= record.head.began <= time.time()
    assert [word.text for word in words(record)] == ["word"] * 5
    assert 0 <= record.times_s[0] <= record.times_s[-1] < 10


def test_a_session_without_a_frame_leaves_nothing(recorder: Recorder, tmp_path: Path, told: Told) -> None:
    recording = recorder.begin(head())
    recorder.finish(recording, "left")
    assert recording.wait(10)
    assert not (tmp_path / "records").exists()
    assert told.results == []


def test_the_end_of_the_gateway_is_the_end_of_its_records(tmp_path: Path, told: Told) -> None:
    recorder = Recorder(tmp_path, told, flush_s=60)
    talk(recorder.begin(head()), 3)
    assert recorder.close(10)
    assert only(tmp_path).ended == "the gateway ended"


def test_a_disk_that_fails_ends_one_record_and_no_session(
    recorder: Recorder,
    tmp_path: Path,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """/dev/full stands for the disk: it takes the file and none of its bytes."""
    real = writer._create

    def full(path: Path, first: bytes) -> int:
        if "full" not in path.name:
            return real(path, first)
        file = os.open("/dev/full", os.O_WRONLY)
        writer._write(file, first)
        return file

    monkeypatch.setattr(writer, "_create", full)
    lost, kept = recorder.begin(head("full")), recorder.begin(head("kept"))
    failures: list[RecordingFailed] = []
    lost.on_failure = kept.on_failure = failures.append
    with caplog.at_level(logging.WARNING):
        talk(lost, 5)
        talk(kept, 5)
        told.wait("failed")
        talk(lost, 5)  # it goes on, and nobody is told again
        recorder.finish(lost, "left")
        recorder.finish(kept, "left")
        told.wait("failed", "kept")
    assert "session full goes on unrecorded: the record cannot be written: No space left" in caplog.text
    assert str(lost.failure) == "the record cannot be written: No space left on device"
    assert failures == [lost.failure], "told once"
    assert only(tmp_path).head.session == "kept"


@pytest.mark.parametrize("error", [BadRecord("it cannot be told"), ValueError("what nobody thought of")])
def test_a_record_that_cannot_be_told_ends_and_is_let_go(
    error: Exception,
    recorder: Recorder,
    tmp_path: Path,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its file stayed locked for as long as the gateway lived, and was neither uploaded nor deleted."""
    real = RecordWriter.row

    def row(writer: RecordWriter, row: Row) -> None:
        if row.frame == 3:
            raise error
        real(writer, row)

    monkeypatch.setattr(RecordWriter, "row", row)
    recording = recorder.begin(head())
    talk(recording, 5)
    told.wait("failed")
    talk(recording, 5)
    recorder.finish(recording, "left")
    assert recording.done
    (path,) = (tmp_path / "records").iterdir()
    with claimed(path) as ours:
        assert ours
    assert not recorder._open


def test_a_record_is_dated_before_its_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer's thread may look at any moment: it found a session that had begun, in 1970."""
    recording = Recording(tmp_path, head())
    real = time.time

    def look() -> float:
        recording.write()
        return real()

    monkeypatch.setattr(module.time, "time", look)
    talk(recording, 1)
    monkeypatch.undo()
    recording.end("left")
    assert recording.write() == "kept"
    assert only(tmp_path).head.began > 0


def test_a_disk_that_hangs_holds_nobody_up(
    tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    real = RecordWriter.flush

    def hang(writer: RecordWriter) -> None:
        release.wait(30)
        real(writer)

    monkeypatch.setattr(RecordWriter, "flush", hang)
    monkeypatch.setattr(module, "WAITING_LIMIT", 50)
    recorder = Recorder(tmp_path, told, flush_s=0.01)
    recording = recorder.begin(head())
    talk(recording, 1)
    time.sleep(0.1)  # the thread hangs now
    began = time.monotonic()
    talk(recording, 200)
    assert time.monotonic() - began < 1.0
    assert recording.failure is not None
    assert "too slow" in str(recording.failure)
    assert not recorder.close(0.1)
    release.set()
    told.wait("failed")


# Retention


def finished(folder: Path, session: str, age_s: float = 0.0, frames: int = 1) -> Path:
    writer = RecordWriter(folder, Head(session, 1e9, Persona()))
    for number in range(frames):
        writer.row(Row(number, 0.0, 0.0, np.zeros(17, int)))
    writer.close()
    then = time.time() - age_s
    os.utime(writer.path, (then, then))
    return writer.path


def test_old_records_go_and_others_stay(tmp_path: Path, told: Told) -> None:
    old, young = finished(tmp_path, "old", 101), finished(tmp_path, "young", 99)
    other = tmp_path / "old.txt"
    other.write_text("not a record")
    os.utime(other, (0, 0))
    writer = RecordWriter(tmp_path, Head("open", 1e9, Persona()))
    os.utime(writer.path, (0, 0))
    assert Retention(tmp_path, RetentionLimits(100, 0), told).expire(time.time()) == 1
    assert told.results == [EXPIRED]
    assert {path.name for path in tmp_path.iterdir()} == {young.name, other.name, writer.path.name}
    assert not old.exists()
    writer.close()


def test_beyond_the_bytes_the_oldest_go(tmp_path: Path, told: Told) -> None:
    paths = [finished(tmp_path, f"s{age}", age, frames=100) for age in (1, 3, 2)]
    limit = sum(path.stat().st_size for path in paths) - 1
    assert Retention(tmp_path, RetentionLimits(0, limit), told).expire(time.time()) == 1
    assert [path.exists() for path in paths] == [True, False, True]
    assert Retention(tmp_path, RetentionLimits(0, limit), told).expire(time.time()) == 0
    assert Retention(tmp_path, NO_LIMIT, told).expire(time.time()) == 0
    assert Retention(tmp_path / "missing", RetentionLimits(1, 1), told).expire(time.time()) == 0


# Upload


@pytest.mark.parametrize("target", ["{}/there", "file://{}/there", "memory://records-test"])
def test_finished_records_are_brought_to_the_store(tmp_path: Path, told: Told, target: str) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    done = finished(here, "done")
    content = done.read_bytes()
    writer = RecordWriter(here, Head("open", 1e9, Persona()))
    retention = Retention(here, NO_LIMIT, told, store_at(target.format(tmp_path)))
    assert retention.upload() == EVERY_S
    assert told.results == [UPLOADED]
    assert not done.exists()
    assert writer.path.exists()
    if "memory" in target:
        import fsspec

        assert fsspec.filesystem("memory").cat(f"/records-test/{done.name}") == content
    else:
        assert (there / done.name).read_bytes() == content
    if "://" not in target:
        assert (there / done.name).stat().st_mode & 0o777 == 0o600
    writer.close()


def test_a_store_out_of_reach_is_tried_again_and_nothing_is_lost(tmp_path: Path, told: Told) -> None:
    path, reachable = finished(tmp_path, "s"), False
    seen: list[Path] = []

    def store(path: Path) -> None:
        if not reachable:
            raise ConnectionError("no route")
        with claimed(path) as ours:
            assert not ours, "locked while it is brought away"
        seen.append(path)

    retention = Retention(tmp_path, NO_LIMIT, told, store)
    waits = [retention.upload() for _ in range(12)]
    assert waits[:4] == [2, 4, 8, 16]
    assert waits[-1] == LONGEST_RETRY_S
    assert path.exists()
    reachable = True
    assert retention.upload() == EVERY_S
    assert seen == [path]
    assert not path.exists()
    assert told.results == [UPLOAD_FAILED] * 12 + [UPLOADED]


def test_a_record_that_the_store_refuses_holds_no_other_back(tmp_path: Path, told: Told) -> None:
    refused = finished(tmp_path, "a")
    seen: list[str] = []

    def store(path: Path) -> None:
        if path == refused:
            raise PermissionError("not this one")
        seen.append(path.name)

    retention = Retention(tmp_path, NO_LIMIT, told, store)
    assert retention.upload() == RETRY_S
    for number in range(3):
        done = finished(tmp_path, f"b{number}")
        assert retention.upload() == EVERY_S, "the store is there"
        assert seen[-1] == done.name
    assert [retention.upload() for _ in range(2)] == [RETRY_S, 2 * RETRY_S]
    assert refused.exists()
    assert told.results == [UPLOAD_FAILED] + [UPLOADED, UPLOAD_FAILED] * 3 + [UPLOAD_FAILED] * 2


def test_a_fault_of_ours_is_logged_and_counted_and_the_next_look_comes(
    tmp_path: Path, told: Told, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention_module, "EVERY_S", 0.01)
    retention, looks = Retention(tmp_path, NO_LIMIT, told), threading.Semaphore(0)

    def stumble(now: float) -> int:
        looks.release()
        raise MemoryError

    monkeypatch.setattr(retention, "expire", stumble)
    retention.start()
    assert looks.acquire(timeout=5)
    assert looks.acquire(timeout=5), "a second time"
    retention.stop()
    assert told.results[0] == LOOK_FAILED
    assert "MemoryError" in caplog.text


def test_a_full_store_leaves_no_half_a_record(tmp_path: Path, told: Told) -> None:
    (tmp_path / "file").write_text("")
    path = finished(tmp_path / "here", "s")
    retention = Retention(tmp_path / "here", NO_LIMIT, told, store_at(str(tmp_path / "file" / "x")))
    assert retention.upload() == 2
    assert path.exists()


def test_a_store_that_hangs_holds_up_neither_writing_nor_deleting(tmp_path: Path, told: Told) -> None:
    release, reached = threading.Event(), threading.Event()

    def hang(path: Path) -> None:
        reached.set()
        release.wait(30)

    finished(tmp_path, "a", 200)
    retention = Retention(tmp_path, RetentionLimits(100, 0), told, hang)
    retention._limits = NO_LIMIT  # until the upload has begun
    retention.start()
    assert reached.wait(10)
    recorder = Recorder(tmp_path, told, flush_s=0.01)
    recording = recorder.begin(head("b"))
    talk(recording, 3)
    recorder.finish(recording, "left")
    assert recording.wait(5)
    assert Retention(tmp_path, RetentionLimits(100, 0), told).expire(time.time() + 1_000) == 1, (
        "b; a is in use"
    )
    retention.stop()
    release.set()
    assert recorder.close(5)


@pytest.mark.parametrize("target", ["nosuch://bucket", "s3://bucket/records"])
def test_a_store_that_cannot_be_used_is_refused_at_the_start(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ConfigError, match="record_upload"):
        store_at(target)


def test_words_that_come_after_the_end_are_kept_before_it(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, Told(), flush_s=0.01)
    recording = recorder.begin(head())
    talk(recording, 3)
    recording.over()
    time.sleep(0.05)
    recording.user_text(Segment.of([Word("Goodbye.", 0.05, 0.2)]))
    recorder.finish(recording, "left")
    assert recorder.close(5.0)
    record = only(tmp_path)
    assert [event.type for event in record.events] == ["user_text", "end"]
    assert record.events[1].at < record.events[0].at, "the session's end, not the record's"
    assert [word.text for word in user_words(record)] == ["Goodbye."]
