"""Recorded calls into a dataset: what is refused and why, words on frames, batches with their weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import calls
import numpy as np
import pytest
import torch

from personaplex.audio.wav import write_wav
from personaplex.config import AGENT, PRESET_TINY, SAMPLE_RATE, SINE_CODES, TEXT_EPAD, TEXT_PAD, USER
from personaplex.errors import ConfigError
from personaplex.finetune import prepare as preparing
from personaplex.finetune.__main__ import main
from personaplex.finetune.align import Spelling, text_stream
from personaplex.finetune.batches import Order, Part, Source, Weights, stack
from personaplex.finetune.dataset import Dataset, Entry, split
from personaplex.finetune.prepare import Options, Preparation
from personaplex.finetune.source import Unusable, Word
from personaplex.loading import ModelSpec, resolve
from personaplex.text import Tokenizer
from personaplex.voices import VoiceLibrary

CONFIG = PRESET_TINY.lm
FOUND = resolve(ModelSpec("tiny", device="cpu"))


def prepared(source: Path, output: Path) -> Dataset:
    return Preparation(FOUND, output, Options("NATF2", "Be brief.")).run([source])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("calls")
    calls.write_call(folder / "calls", "one", voice="NATM1", text_prompt="You sell bread.")
    calls.write_call(folder / "calls", "two", pitch=220)
    write_wav(folder / "calls" / "me.wav", calls.sound()[0, SAMPLE_RATE : 2 * SAMPLE_RATE], SAMPLE_RATE)
    calls.write_call(folder / "calls", "three", pitch=240, voice="me.wav")
    (folder / "calls" / "data.jsonl").write_text(
        "".join(f'{{"path": "{name}.wav", "duration": 3.0}}\n' for name in ("one", "two", "three"))
    )
    return prepared(folder / "calls", folder / "data")


# Each makes a call called `bad` that cannot be used.


def _mono(folder: Path) -> None:
    write_wav(folder / "bad.wav", calls.sound()[0], SAMPLE_RATE)


def _three_channels(folder: Path) -> None:
    write_wav(folder / "bad.wav", calls.sound()[[0, 1, 0]], SAMPLE_RATE)


def _low_rate(folder: Path) -> None:
    write_wav(folder / "bad.wav", calls.sound(rate=8_000), 8_000)


def _mislabelled_rate(folder: Path) -> None:
    write_wav(folder / "bad.wav", calls.sound(), 48_000)
    (folder / "data.jsonl").write_text('{"path": "good.wav"}\n{"path": "bad.wav", "duration": 3.0}\n')


def _clipped(folder: Path) -> None:
    write_wav(folder / "bad.wav", calls.sound() * 20, SAMPLE_RATE)


def _short(folder: Path) -> None:
    write_wav(folder / "bad.wav", calls.sound(1.5), SAMPLE_RATE)


def _empty(folder: Path) -> None:
    (folder / "bad.wav").write_bytes(b"")


def _no_samples(folder: Path) -> None:
    write_wav(folder / "bad.wav", np.zeros((2, 0), np.float32), SAMPLE_RATE)


def _silent_agent(folder: Path) -> None:
    write_wav(folder / "bad.wav", calls.sound() * np.float32([[0], [1]]), SAMPLE_RATE)


def _one_channel_twice(folder: Path) -> None:
    write_wav(folder / "bad.wav", calls.sound()[[0, 0]], SAMPLE_RATE)


def _swapped(folder: Path) -> None:
    write_wav(folder / "bad.wav", calls.sound()[::-1].copy(), SAMPLE_RATE)


def _shifted(folder: Path) -> None:
    calls.transcript(folder / "bad.json", [["Hello", [2.3, 2.5]], ["you", [2.6, 2.8]]])


def _too_late(folder: Path) -> None:
    calls.transcript(folder / "bad.json", [["Hello", [1.0, 1.3]], ["you", [5.0, 5.2]]])


def _too_many_words(folder: Path) -> None:
    calls.transcript(folder / "bad.json", [["wonderful", [1.0, 1.1]]] * 20)


def _backwards(folder: Path) -> None:
    calls.transcript(folder / "bad.json", [["Hello", [1.3, 1.0]]])


def _no_words(folder: Path) -> None:
    calls.transcript(folder / "bad.json", [["Hi", [1.0, 1.2], "SPEAKER_OTHER"]])


def _no_transcript(folder: Path) -> None:
    (folder / "bad.json").unlink()


def _no_json(folder: Path) -> None:
    (folder / "bad.json").write_text("words")


def _no_list(folder: Path) -> None:
    (folder / "bad.json").write_text('{"alignments": 3}')


def _unknown_voice(folder: Path) -> None:
    calls.transcript(folder / "bad.json", voice="nobody")


def _long_role(folder: Path) -> None:
    calls.transcript(folder / "bad.json", text_prompt="word " * 2000)


def _no_sound(folder: Path) -> None:
    (folder / "bad.wav").unlink()


def _foreign(folder: Path) -> None:
    (folder / "bad.wav").rename(folder / "bad.m4a")
    (folder / "bad.json").unlink()


def _bad_line(folder: Path) -> None:
    (folder / "data.jsonl").write_text('{"path": "good.wav"}\n{"file": "bad.wav"}\n')


BROKEN = [
    (_mono, "bad.wav: it is mono"),
    (_three_channels, "bad.wav: it has 3 channels"),
    (_low_rate, "bad.wav: its sampling rate is 8000 Hz: at least 16000"),
    (_mislabelled_rate, r"bad.wav: it lasts 1.50 s and data.jsonl says 3.00: is its sampling rate, 48000"),
    (_clipped, "bad.wav: the agent's channel is clipped"),
    (_short, "bad.wav: it is too short: 1.50 s, at least 2"),
    (_empty, "bad.wav: it is empty"),
    (_no_samples, "bad.wav: the file holds no audio"),
    (_silent_agent, r"bad.wav: the agent's \(left\) channel is silent"),
    (_one_channel_twice, "bad.wav: both channels are the same"),
    (_swapped, "bad.wav: its transcript is off: 3 of 3 words .* are they swapped"),
    (_shifted, "bad.wav: its transcript is off: 2 of 2 words fall where the agent's channel is silent"),
    (_too_late, "bad.wav: its transcript is off: 'you' ends at 5.20 s, the sound at 3.00 s"),
    (_too_many_words, "bad.wav: its transcript is off: .* more words than can be said"),
    (_backwards, r"bad.wav: bad.json: alignment 1 is not \[word, \[start, end\], speaker\]"),
    (_no_words, "bad.wav: bad.json holds no word of the agent"),
    (_no_transcript, "bad.wav: its transcript bad.json is missing"),
    (_no_json, "bad.wav: its transcript bad.json is no JSON"),
    (_no_list, "bad.wav: bad.json has no list of `alignments`"),
    (_unknown_voice, "bad.wav: its voice: there is no voice 'nobody' here"),
    (_long_role, r"bad.wav: its role text has \d+ tokens"),
    (_no_sound, "bad.json: no recording belongs to it"),
    (_foreign, "bad.m4a: skipped: libsndfile does not read .m4a"),
    (_bad_line, r"data.jsonl:2: is not \{\"path\""),
]


@pytest.mark.parametrize(("spoil", "reason"), BROKEN, ids=[spoil.__name__ for spoil, _ in BROKEN])
def test_a_broken_call_is_told_by_file_and_reason(
    spoil: Callable[[Path], None], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The good one beside it is prepared all the same."""
    source = tmp_path / "calls"
    calls.write_call(source, "good")
    calls.write_call(source, "bad")
    spoil(source)
    command = ["prepare", str(source), "--output", str(tmp_path / "data"), "--model", "tiny"]
    assert main([*command, "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert re.search(f"^error: {reason}", said.err, re.MULTILINE), said.err
    assert "1 calls, 0.1 minutes, 3 words; 1 cannot be used" in said.out
    made = Dataset.read(tmp_path / "data")
    assert [entry.name for entry in made.entries] == ["good"]
    assert re.match(reason, f"{made.faults[0].file}: {made.faults[0].reason}")


def test_nothing_usable_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls.write_call(tmp_path / "calls", "bad")
    _mono(tmp_path / "calls")
    assert main(["prepare", str(tmp_path / "calls"), "--output", str(tmp_path / "d"), "--model", "tiny"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: no recording can be used"


def test_a_call_is_encoded_once(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run reads codes of what has not changed, and takes new words from a new transcript."""
    source = dataset.folder.parent / "calls"
    shutil.copytree(source, tmp_path / "calls")
    shutil.copytree(dataset.folder, tmp_path / "data")
    calls.transcript(tmp_path / "calls" / "two.json", [["Bye", [1.0, 1.2]]])
    encoded: list[int] = []
    encode = preparing.encode
    monkeypatch.setattr(preparing, "encode", lambda *given: (encoded.append(1), encode(*given))[1])
    again = prepared(tmp_path / "calls", tmp_path / "data")
    assert len(encoded) == 1  # the voice of the third
    assert [entry.words for entry in again.entries] == [3, 1, 3]
    for one, other in zip(dataset.entries, again.entries, strict=True):
        before, after = dataset.arrays(one, CONFIG).tokens, again.arrays(other, CONFIG).tokens
        np.testing.assert_array_equal(before[1:], after[1:])
        assert (before[0] == after[0]).all() == (one.name != "two")


def test_a_damaged_dataset_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no prepared dataset"):
        Dataset.read(tmp_path)
    shutil.copytree(dataset.folder, tmp_path / "data")
    here = Dataset.read(tmp_path / "data")
    (tmp_path / "data" / "one.npz").write_bytes(b"PK")
    with pytest.raises(ConfigError, match=r"one\.npz is missing or damaged"):
        here.arrays(here.entries[0], CONFIG)
    shutil.copy(tmp_path / "data" / "two.npz", tmp_path / "data" / "one.npz")
    here.arrays(here.entries[0], CONFIG)  # of the same length: nothing can tell
    (tmp_path / "data" / "dataset.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"dataset\.json is damaged"):
        Dataset.read(tmp_path / "data")


def stream(words: list[tuple[str, float]], frames: int, **spelling: int) -> list[int]:
    """With a token a letter, ord less 90."""
    given = [Word(text, start, start + 0.1) for text, start in words]
    return text_stream(given, frames, lambda word: [ord(c) - 90 for c in word], Spelling(**spelling))  # type: ignore


def test_words_begin_in_their_frame_behind_end_of_padding() -> None:
    """ "ab" at 0.16 s is frame 2; "c" at 0.5 s is frame 6."""
    p, e = TEXT_PAD, TEXT_EPAD
    assert stream([("ab", 0.16), ("c", 0.5)], 8) == [p, e, 7, 8, p, e, 9, p]
    assert stream([("ab", 0.16), ("c", 0.5)], 8, end_of_padding=False) == [p, p, 7, 8, p, p, 9, p]
    assert stream([("ab", 0.16), ("c", 0.5)], 8, lead=1) == [e, 7, 8, p, e, 9, p, p]


def test_a_word_waits_until_the_one_before_is_spelled() -> None:
    assert stream([("abc", 0.0), ("d", 0.08)], 5) == [7, 8, 9, 10, TEXT_PAD]


def test_words_that_no_piece_spells_are_named() -> None:
    with pytest.raises(Unusable, match="cannot spell: Zoë"):
        text_stream([Word("Zoë", 0, 1)], 9, lambda word: [TEXT_EPAD], Spelling())


WEIGHTS = Weights()


def source(dataset: Dataset, weights: Weights = WEIGHTS, length: int = 750) -> Source:
    tokenizer, library = Tokenizer(FOUND.checkpoint.tokenizer), VoiceLibrary(CONFIG)
    return Source(dataset, dataset.entries, CONFIG, tokenizer, library, weights, length)


def test_a_row_is_prompt_and_call_as_the_engine_lays_them_out(dataset: Dataset) -> None:
    """Weights begin with the first frame of the call; its acoustic codes come one position later."""
    calls_of = source(dataset, Weights(padding=0.3, semantic=50, acoustic=2))
    row = calls_of.sequence(calls_of.parts[0])
    tokens = dataset.arrays(dataset.entries[0], CONFIG).tokens
    frames = tokens.shape[1]
    first = len(row.inputs) - frames + 1
    assert torch.equal(row.inputs[1:], row.targets[:-1])
    assert not row.text_weight[:first].any()
    assert not row.audio_weight[:first].any()
    np.testing.assert_array_equal(row.targets[first:, 0], tokens[0, :-1])
    np.testing.assert_array_equal(row.targets[first:, 1], tokens[1, :-1])
    np.testing.assert_array_equal(row.targets[first + 1 :, 2:9], tokens[2:9, :-2].T)
    padding = (row.targets[first:, 0] == TEXT_PAD) | (row.targets[first:, 0] == TEXT_EPAD)
    assert torch.equal(row.text_weight[first:], torch.where(padding, 0.3, 1.0))
    assert torch.equal(row.audio_weight[first], torch.tensor([50.0] + [0.0] * 7))
    assert torch.equal(row.audio_weight[first + 1], torch.tensor([50.0] + [2.0] * 7))
    assert row.inputs[first - 2, USER].tolist() == list(SINE_CODES)
    assert 0 <= int(row.targets[first:, AGENT].max()) < CONFIG.card


def test_of_silent_frames_a_share_counts(dataset: Dataset) -> None:
    none, half = source(dataset, Weights(quiet=0)), source(dataset, Weights(quiet=0.5))
    part = none.parts[0]
    sounds = dataset.arrays(dataset.entries[0], CONFIG).sounds
    assert 0 < sounds.sum() < len(sounds)
    assert int((none.sequence(part).audio_weight[:, 0] > 0).sum()) == sounds[:-1].sum()
    drawn = {int((half.sequence(part, step).audio_weight[:, 0] > 0).sum()) for step in range(5)}
    assert len(drawn) > 1
    assert all(sounds.sum() - 1 <= count <= len(sounds) for count in drawn)
    assert torch.equal(half.sequence(part, 3).audio_weight, half.sequence(part, 3).audio_weight)


def test_long_calls_are_cut_and_short_rows_filled_up(dataset: Dataset) -> None:
    calls_of = source(dataset, length=20)
    assert [(p.start, p.stop) for p in calls_of.parts[:2]] == [(0, 19), (19, 38)]
    rows = [calls_of.sequence(part) for part in (calls_of.parts[0], calls_of.parts[-1])]
    assert len(rows[0].inputs) != len(rows[1].inputs)
    batch = stack(rows)
    short = min(rows, key=lambda row: len(row.inputs))
    index, length = rows.index(short), len(short.inputs)
    assert torch.equal(batch.inputs[index, :length], short.inputs)
    assert (batch.inputs[index, length:] == -1).all()
    assert not batch.text_weight[index, length:].any()


def test_what_the_model_cannot_remember_is_refused(dataset: Dataset) -> None:
    small = replace(CONFIG, temporal=replace(CONFIG.temporal, context=60))
    tools = Tokenizer(FOUND.checkpoint.tokenizer), VoiceLibrary(CONFIG)
    with pytest.raises(ConfigError, match=r"one: prompt and part are .* give a shorter --length"):
        Source(dataset, dataset.entries, small, *tools, Weights(), 750)


def test_every_part_comes_once_an_epoch_and_a_step_alone_decides() -> None:
    parts = [Part(_entry(str(number)), 0, 1) for number in range(7)]
    order = Order(parts, 3, seed=4)
    drawn = [part.entry.name for step in range(7) for part in order.batch(step)[0]]
    assert sorted(drawn[:7]) == sorted(drawn[7:14]) == sorted(drawn[14:]) == [str(n) for n in range(7)]
    assert drawn[:7] != drawn[7:14]
    assert Order(parts, 3, seed=4).batch(5) == order.batch(5)
    again = Order(parts, 4, 4, parts[:1], 0.25)
    assert [len(some) for some in again.batch(0)] == [3, 1]


def _entry(name: str) -> Entry:
    return Entry(name, 1, 1, "", "NATF2", False, "", "")


def test_calls_are_held_back_by_seed() -> None:
    entries = [_entry(str(number)) for number in range(10)]
    trained, held = split(entries, 0.2, 1)
    assert (len(trained), len(held)) == (8, 2)
    assert split(entries, 0.2, 1) == (trained, held)
    assert len(split(entries[:5], 0.1, 0)[1]) == 1
    assert not split(entries[:4], 0.1, 0)[1]
    with pytest.raises(ConfigError, match="nothing is left to train on"):
        split(entries[:1], 0.9, 0)


def test_the_export_of_records_is_a_source(tmp_path: Path) -> None:
    """The layout that `personaplex.records export` writes, with its rounding of durations."""
    source_folder = tmp_path / "export"
    calls.write_call(source_folder, "call", voice="NATF2", text_prompt="You sell bread.")
    (source_folder / "data.jsonl").write_text(json.dumps({"path": "call.wav", "duration": 3.04}) + "\n")
    made = prepared(source_folder, tmp_path / "data")
    assert [(entry.name, entry.role, entry.voice) for entry in made.entries] == [
        ("call", "You sell bread.", "NATF2")
    ]
