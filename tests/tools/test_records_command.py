"""`personaplex.records`: finds, shows, exports and deletes, and never more than was asked for."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path

import pytest
import soundfile
from commands import Row as Run
from commands import Say, run_row
from test_replay import FRAMES, HEAD, conversation

from personaplex import records
from personaplex.persona import Persona
from personaplex.record.format import Head, pack_head
from personaplex.record.writer import RecordWriter, record_name

OTHERS = (
    HEAD,
    dataclasses.replace(HEAD, session="b2", began=HEAD.began + 60, person="customer-17"),
    dataclasses.replace(HEAD, session="c3", began=HEAD.began + 120, persona=Persona("NATF0", "Bank")),
)


def write(head: Head, data: bytes) -> Path:
    path = Path("records", record_name(head))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pack_head(head) + data.removeprefix(pack_head(HEAD)))
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three records, and one of which nothing can be read."""
    monkeypatch.chdir(tmp_path)
    for head in OTHERS:
        write(head, conversation()[0])


def unreadable() -> None:
    Path("records/bad.record").write_text("hello")


def left() -> list[str]:
    return sorted(path.stem.partition("-")[2] or path.stem for path in Path("records").iterdir())


def run(arguments: str) -> int:
    return records.main(shlex.split(arguments))


def test_a_line_a_record_oldest_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list records") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[5] for line in lines] == ["5e551011", "b2", "c3"]
    assert lines[1].split()[:3] == ["2026-09-21T14:14:20Z", "3.2", "s"]
    assert "customer-17" in lines[1]


@pytest.mark.parametrize(
    ("conditions", "sessions"),
    [
        ("--person customer-17", ["b2"]),
        ("--voice NATF0", ["c3"]),
        ("--role bank", ["c3"]),
        ("--since 2026-09-21T14:14:00", ["b2", "c3"]),
        ("--since 2026-09-21T14:14:00Z --until 2026-09-21T15:15:00+01:00", ["b2"]),
        ("--until 2026-09-21", []),
        ("--since 5m", []),
        ("--shortest 4", []),
        ("--longest 4 --session 5e", ["5e551011"]),
    ],
)
def test_filters(conditions: str, sessions: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"list records --json {conditions}") == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["session"] for one in found] == sessions
    assert all(one["state"] == "whole" and one["seconds"] == 3.2 for one in found)


def test_show_tells_what_was_said_without_a_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("show records --session c3") == 0
    out = capsys.readouterr().out
    assert "text_prompt: Bank" in out
    assert "voice: NATF0" in out
    spoken = out.splitlines()[-2].split()
    assert float(spoken[0]) < 3.2
    assert len(spoken) > 1


def test_a_dataset_of_stereo_wavs_and_words(say: Say) -> None:
    assert run("export records --output set --device cpu --voice NATM1") == 0
    manifest = [json.loads(line) for line in Path("set/data.jsonl").read_text().splitlines()]
    assert len(manifest) == 2
    for entry in manifest:
        wav = Path("set", entry["path"])
        assert soundfile.info(wav).frames == FRAMES * 1_920
        assert (soundfile.info(wav).channels, soundfile.info(wav).samplerate) == (2, 24_000)
        assert entry["duration"] == 3.2
        words = json.loads(wav.with_suffix(".json").read_text())
        assert (words["voice"], words["text_prompt"]) == ("NATM1", "You sell bread.")
        assert words["alignments"]
        for text, (start, end), speaker in words["alignments"]:
            assert (text.strip(), speaker) == (text, "SPEAKER_MAIN")
            assert 0 <= start < end <= 3.2


def test_what_cannot_be_exported_is_named_and_the_rest_goes_on(say: Say) -> None:
    unreadable()
    write(dataclasses.replace(HEAD, session="e5"), b"")
    assert run("export records --output set --device cpu") == 1
    said = say.take()
    assert "bad.record: this file is no record" in said
    assert "e5.record: it holds no frame" in said
    assert len(Path("set/data.jsonl").read_text().splitlines()) == 3


def test_one_persons_records_are_deleted_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("delete records --person customer-17 --dry-run") == 0
    assert len(left()) == 3
    assert run("delete records --person customer-17") == 0
    assert capsys.readouterr().out.splitlines() == [f"records/{record_name(OTHERS[1])}"] * 2
    assert left() == ["5e551011", "c3"]


def test_a_record_that_is_being_written_is_not_deleted(say: Say) -> None:
    writer = RecordWriter(Path("records"), dataclasses.replace(HEAD, session="d4"))
    assert run("delete records --all") == 1
    assert "still being written" in say.take()
    assert left() == ["d4"]
    writer.close()
    assert run("delete records --all") == 0
    assert left() == []


def test_what_cannot_be_judged_is_kept_and_said(say: Say) -> None:
    unreadable()
    assert run("delete records --person nobody") == 1
    assert "bad.record" in say.take()
    assert len(left()) == 4
    assert run("delete records/bad.record") == 0
    assert len(left()) == 3


ROWS = [
    Run("", 2, "required"),
    Run("list", 2, "PATH"),
    Run("list missing", 2, "missing is not there"),
    Run("list records --since yesterday", 2, "'yesterday' is no time"),
    Run("list records --since 9999999d", 2, "is no time"),
    Run("list records --shortest -1", 2, "--shortest"),
    Run("list records", 1, "bad.record: this file is no record", unreadable),
    Run("show records", 1, "bad.record", unreadable),
    Run("delete records", 2, "would delete every record of a folder"),
    Run("export records", 2, "--output"),
    Run("export records --output records/bad.record", 2, "bad.record", unreadable),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_one_line_and_nothing_lost(row: Run, say: Say) -> None:
    run_row(records.main, row, say)


def test_the_examples_run() -> None:
    for example in records.EXAMPLES:
        _, _, command = example.partition("personaplex.records ")
        assert run(command) == 0
