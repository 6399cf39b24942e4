"""The record file: what was written is read, damage costs what follows it, a full disk ends it whole."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import resource
import signal
import stat
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from mutation import memory_within, mutants

from personaplex.config import FRAME_SIZE, Sampling
from personaplex.errors import BadRecord, ConfigError, RecordingFailed
from personaplex.persona import Persona
from personaplex.record import transcript
from personaplex.record.folder import Filter, Unreadable, find_records, read_record, select
from personaplex.record.format import MAGIC, Event, Head, Record, Row, pack_event, pack_head, pack_row, parse
from personaplex.record.page import render
from personaplex.record.writer import RecordWriter, claimed, record_name
from personaplex.words import Segment, Word, as_json

HEAD = Head(
    session="5e551011",
    began=1_790_000_000.25,
    persona=Persona("NATM1", "You sell bread. \N{GRINNING FACE}", Sampling(0.5, 7, 0.6, 9, 2**63 - 1, 3)),
    version="0.1.0",
    model="tiny",
    engine={"kv": "auto", "revision": "main"},
    person="customer-17",
)


def row(number: int, frame: int | None = None) -> Row:
    tokens = np.random.default_rng(number).integers(-2, 2**31, 17)
    return Row(number if frame is None else frame, 0.08 * number, 0.0123, tokens, forced=number == 0)


def packed(frames: int, head: Head = HEAD, ends: bool = True) -> bytes:
    parts = [pack_head(head)]
    for number in range(frames):
        parts.append(pack_row(row(number)))
        if number % 3 == 0:
            parts.append(pack_event(Event("text", 0.08 * number, {"frame": number, "text": "caf\u00e9 "})))
    if ends:
        parts.append(pack_event(Event("end", 0.08 * frames, {"cause": "client left"})))
    return b"".join(parts)


def check_rows(record: Record, count: int) -> None:
    assert len(record) == count
    for number in range(count):
        np.testing.assert_array_equal(record.tokens[number], row(number).tokens)


def test_what_was_written_is_read() -> None:
    record = parse(packed(10))
    assert record.head == HEAD
    assert record.damage is None
    check_rows(record, 10)
    assert record.frames.tolist() == list(range(10))
    assert record.forced.tolist() == [True] + [False] * 9
    np.testing.assert_allclose(record.times_s, 0.08 * np.arange(10), atol=5e-4)
    np.testing.assert_allclose(record.latencies_s, 0.0123)
    assert [event.type for event in record.events] == ["text"] * 4 + ["end"]
    assert record.events[1] == Event("text", 0.24, {"frame": 3, "text": "caf\u00e9 "})
    assert record.ended == "client left"
    assert record.seconds == pytest.approx(0.8)
    assert record.unbroken == 10
    np.testing.assert_array_equal(record.agent_codes, record.tokens[:, 1:9])
    np.testing.assert_array_equal(record.user_codes, record.tokens[:, 9:])


def test_a_record_without_frames() -> None:
    record = parse(pack_head(HEAD))
    assert (len(record), record.span, record.unbroken, record.ended) == (0, 0, 0, None)


def test_missing_frames_keep_their_place() -> None:
    record = parse(pack_head(HEAD) + b"".join(pack_row(row(n, n if n < 3 else n + 5)) for n in range(6)))
    assert record.frames.tolist() == [0, 1, 2, 8, 9, 10]
    assert (record.span, record.unbroken, record.damage) == (11, 3, None)


def test_every_shorter_file_gives_its_whole_entries() -> None:
    data = packed(4)
    boundary = len(pack_head(HEAD))
    for length in range(len(data)):
        if length < boundary:
            with pytest.raises(BadRecord):
                parse(data[:length])
            continue
        record = parse(data[:length])
        check_rows(record, len(record))
        at_an_entrys_end = data[:length] in (packed(n, ends=False) for n in range(5))
        if at_an_entrys_end:
            assert record.damage is None
        elif record.damage is not None:
            assert "\n" not in record.damage
            assert str(length) in record.damage
        assert record.ended is None
    assert parse(data).ended == "client left"


def test_a_flipped_bit_anywhere_ends_the_good_part_before_it() -> None:
    data, start = packed(6), len(pack_head(HEAD))
    for place in range(start, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        record = parse(bytes(damaged))
        check_rows(record, len(record))
        assert record.damage is not None
        assert record.damage.startswith("damaged at byte ")
        assert int(record.damage.split()[3]) <= place


def test_damaged_files_raise_nothing_else(tmp_path: Path) -> None:
    """Half of them as damage comes, half with sums that fit, so that what is inside is read."""
    rng, good = random.Random(17), packed(12)
    entries = [pack_head(HEAD)[len(MAGIC) :], pack_row(row(0)), pack_event(Event("text", 1, {"text": "a"}))]
    damaged = list(mutants(good, 400, rng))
    for entry in entries:
        head = b"" if entry is entries[0] else pack_head(HEAD)[len(MAGIC) :]
        damaged += [MAGIC + head + resum(entry[:1], payload) for payload in mutants(entry[9:], 200, rng)]
    refused = partial = 0
    with memory_within(64):
        for content in damaged:
            try:
                record = parse(content)
            except BadRecord:
                refused += 1
            else:
                partial += record.damage is not None
                assert record.tokens.shape == (len(record), 17)
                assert record.span <= 2 * len(record) + 1_000
    assert refused > 100
    assert partial > 100


def resum(kind: bytes, payload: bytes) -> bytes:
    checked = struct.pack("<cI", kind, len(payload))
    return checked + struct.pack("<I", zlib.crc32(payload, zlib.crc32(checked))) + payload


def entry(kind: bytes, value: object) -> bytes:
    return resum(kind, value if isinstance(value, bytes) else json.dumps(value).encode())


FIELDS = json.loads(pack_head(HEAD)[len(MAGIC) + 9 :])


@pytest.mark.parametrize(
    "change",
    [
        {"session": "../../etc/passwd"},
        {"session": 7},
        {"began": 1e300},
        {"began": True},
        {"person": "a/b"},
        {"model": "x" * 300},
        {"model": "a\nb"},
        {"version": None},
        {"engine": [1]},
        {"engine": {"kv": 1}},
        {"persona": None},
        {"persona": {**FIELDS["persona"], "voice": "../x"}},
        {"persona": {**FIELDS["persona"], "sampling": {}}},
        {"persona": {**FIELDS["persona"], "sampling": {**FIELDS["persona"]["sampling"], "text_seed": -1}}},
        {"persona": {**FIELDS["persona"], "sampling": {**FIELDS["persona"]["sampling"], "text_topk": 1.5}}},
    ],
    ids=str,
)
def test_heads_that_no_gateway_writes(change: dict[str, object]) -> None:
    assert parse(MAGIC + entry(b"H", FIELDS)).head == HEAD
    with pytest.raises(BadRecord, match="head"):
        parse(MAGIC + entry(b"H", {**FIELDS, **change}))


@pytest.mark.parametrize(
    "second",
    [
        entry(b"H", FIELDS),
        entry(b"Q", b""),
        entry(b"R", b"short"),
        entry(b"E", b"[" * 100_000),
        entry(b"E", [1]),
        entry(b"E", {"type": "end"}),
        entry(b"E", {"type": "text", "at": -1}),
        entry(b"E", b'{"type": "text", "at": NaN}'),
        entry(b"E", {"type": "text", "at": 1, "text": "\ud800"}),
        pack_row(row(1, 4_000_000_000)),
        struct.pack("<cII", b"R", 2**32 - 1, 0),
    ],
)
def test_entries_that_no_gateway_writes(second: bytes) -> None:
    with memory_within(32):
        record = parse(pack_head(HEAD) + pack_row(row(0)) + second + pack_row(row(1)))
    check_rows(record, 1)
    assert record.damage is not None
    assert record.damage.endswith("1 frames (0.1 s) before it are good")


def test_frames_that_go_back_are_damage() -> None:
    record = parse(pack_head(HEAD) + pack_row(row(0)) + pack_row(row(1)) + pack_row(row(1)))
    assert len(record) == 2
    assert record.damage is not None


def test_heads_that_cannot_be_told_are_refused() -> None:
    for head in (
        dataclasses.replace(HEAD, session="a b"),
        dataclasses.replace(HEAD, persona=Persona("NATF0", "\ud800")),
        dataclasses.replace(HEAD, persona=Persona("NATF0", "x" * 2**20)),
    ):
        with pytest.raises(BadRecord):
            pack_head(head)


# Writing


def in_use(path: Path) -> bool:
    with claimed(path) as ours:
        return not ours


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "deep" / "records", HEAD)
    assert stat.S_IMODE(writer.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(writer.path.parent.stat().st_mode) == 0o700
    assert writer.path.name == record_name(HEAD) == "20260921T141320Z-5e551011.record"
    writer.close()


def test_what_was_flushed_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path, HEAD)
    assert in_use(writer.path)
    for number in range(5):
        writer.row(row(number))
    assert len(read_record(writer.path)) == 0
    writer.flush()
    check_rows(read_record(writer.path), 5)
    writer.event(Event("end", 1.0, {"cause": "client left"}))
    writer.close()
    writer.close()
    assert not in_use(writer.path)
    assert read_record(writer.path).ended == "client left"
    with pytest.raises(RecordingFailed):
        writer.flush()


def test_a_killed_writer_leaves_what_it_flushed(tmp_path: Path) -> None:
    here = Path(__file__).parent
    script = f"""
import os, signal, sys
sys.path[:0] = {[str(here), str(here.parent)]!r}
from pathlib import Path
from test_record import HEAD, RecordWriter, row
writer = RecordWriter(Path({str(tmp_path)!r}), HEAD)
for number in range(40):
    writer.row(row(number))
    if number == 24:
        writer.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    (path,) = tmp_path.iterdir()
    record = read_record(path)
    check_rows(record, 25)
    assert (record.damage, record.ended) == (None, None)
    assert not in_use(path)


def write_forty(writer: RecordWriter) -> None:
    for number in range(40):
        writer.row(row(number))
        if number % 4 == 3:
            writer.flush()


def test_a_full_disk_ends_the_record_at_a_whole_entry(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the system takes part of a write, then nothing."""
    writer = RecordWriter(tmp_path, HEAD)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (writer.path.stat().st_size + 1_000, before[1]))
        with pytest.raises(RecordingFailed, match=r"the record cannot be written: File too large"):
            write_forty(writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    record = read_record(writer.path)
    check_rows(record, 8)
    assert record.damage is None
    assert not in_use(writer.path)
    with pytest.raises(RecordingFailed):
        writer.flush()


def test_a_record_has_its_head_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads the folder meanwhile finds either no file or one that can be read."""
    seen: list[list[Record]] = []

    def look_and_write(file: int, data: bytes) -> int:
        seen.append([read_record(path) for path in find_records([tmp_path])])
        return write(file, data[:7])  # a disk that takes little at a time

    write = os.write
    monkeypatch.setattr(os, "write", look_and_write)
    writer = RecordWriter(tmp_path, HEAD)
    assert len(seen) == -(-len(pack_head(HEAD)) // 7)
    assert not any(seen)
    assert read_record(writer.path).head == HEAD
    writer.row(row(0))
    writer.close()
    assert all(found.head == HEAD for found, *_ in seen[-3:])
    assert list(tmp_path.iterdir()) == [writer.path]


def test_a_disk_without_room_for_a_head_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(RecordingFailed, match="No space left"):
        RecordWriter(tmp_path, HEAD)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_takes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordingFailed, match="Not a directory"):
        RecordWriter(tmp_path / "file" / "records", HEAD)
    RecordWriter(tmp_path, HEAD).close()
    with pytest.raises(RecordingFailed, match="File exists"):
        RecordWriter(tmp_path, HEAD)


# Finding


def test_found_by_what_they_are_about(tmp_path: Path) -> None:
    others = {
        "a": dataclasses.replace(
            HEAD, session="aa1", began=100.0, person="", persona=Persona("NATF0", "Bank")
        ),
        "b": dataclasses.replace(HEAD, session="ab2", began=200.0),
    }
    for frames, head in enumerate(others.values(), 1):
        writer = RecordWriter(tmp_path / "x", head)
        for number in range(25 * frames):
            writer.row(row(number))
        writer.close()
    (tmp_path / "x" / "bad.record").write_bytes(b"hello")
    os.mkfifo(tmp_path / "x" / "pipe.record")
    (tmp_path / "x" / "notes.txt").write_text("mine")
    paths = find_records([tmp_path])
    assert [path.name for path in paths] == [record_name(h) for h in others.values()] + ["bad.record"]
    for wanted, expected in {
        Filter(): "ab",
        Filter(session="a"): "ab",
        Filter(session="ab"): "b",
        Filter(since=100.0, until=200.0): "a",
        Filter(since=100.5): "b",
        Filter(person="customer-17"): "b",
        Filter(person="customer-1"): "",
        Filter(voice="NATF0"): "a",
        Filter(role="SELL"): "b",
        Filter(shortest_s=3.0): "b",
        Filter(longest_s=3.0): "a",
        Filter(voice="NATF0", person="customer-17"): "",
    }.items():
        found = list(select(paths, wanted))
        names = "".join(
            n for n, h in others.items() for f in found if isinstance(f, tuple) and f[1].head == h
        )
        assert names == expected, wanted
        assert [f for f in found if isinstance(f, Unreadable)] == [
            Unreadable(tmp_path / "x" / "bad.record", "this file is no record")
        ]
    with pytest.raises(ConfigError, match="is not there"):
        find_records([tmp_path / "missing"])


def test_what_the_user_said_is_in_the_record_and_shown() -> None:
    said = Segment.of([Word("Guten", 0.4, 0.7), Word("Tag.", 0.7, 1.1)])
    events = [
        Event("user_text", 1.9, as_json(said)),
        Event("user_text", 2.0, {"text": "no words"}),
        Event("user_text", 2.1, {**as_json(said), "words": [{"text": "x", "start_ms": 9, "end_ms": 3}]}),
    ]
    record = parse(packed(4) + b"".join(map(pack_event, events)))
    assert transcript.user_words(record) == list(said.words)
    shown = transcript.as_json(record)
    assert shown["user_words"] == [
        {"text": "Guten", "start": 0.4, "end": 0.7},
        {"text": "Tag.", "start": 0.7, "end": 1.1},
    ]
    page = render(record, np.zeros((2, record.span * FRAME_SIZE), np.float32))
    assert '"user_words": [["Guten", 0.4, 0.7], ["Tag.", 0.7, 1.1]]' in page
    assert '"user_text"' not in page, "an event that is text is no event of the page"
