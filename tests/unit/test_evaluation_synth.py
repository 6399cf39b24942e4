"""The synthetic set: its marks are where the speech is, and its layout is the benchmark's."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import soundfile
from evaluation_scenes import speak

from personaplex.errors import ConfigError
from personaplex.evaluation import synth
from personaplex.evaluation.dataset import TASKS, load
from personaplex.evaluation.speech import Span, Word
from personaplex.evaluation.synth import EXPECTED_FILE, RATE, espeak, synthesise, trimmed
from personaplex.evaluation.transcript import Transcript, Whisper, from_chunks, from_pieces, within_speech


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("set")
    assert synthesise(root, 3, speak=speak) == 24
    return root


def test_every_mark_is_exact(made: Path) -> None:
    samples = load(made).samples
    assert len(samples) == 24
    for sample in samples:
        pcm, rate = soundfile.read(sample.recording())
        truth = [
            Span(*one) for one in json.loads((sample.folder / "truth.json").read_text())["user"]["input"]
        ]
        assert rate == RATE
        loud = np.zeros(len(pcm), bool)
        for one in truth:
            loud[round(one.start * rate) : round(one.end * rate)] = True
            edges = pcm[[round(one.start * rate), round(one.end * rate) - 1]]
            assert np.abs(edges).min() > 0  # speech begins and ends at the very sample
        assert not np.abs(pcm[~loud]).any()
        if sample.pauses:
            assert sample.pauses == (Span(truth[0].end, truth[1].start),)
            assert 0.4 <= sample.pauses[0].length <= 1.0
        if sample.end is not None:
            assert sample.end == truth[-1].end
        if sample.marked is not None:
            assert sample.marked == truth[-1]
    assert {one.task for one in samples} <= set(TASKS)


def test_speech_that_is_not_for_the_agent_is_softer(made: Path) -> None:
    for task, expected in (("user_interruption", {0}), ("background_speech", {-8, -15})):
        found = set()
        for sample in load(made, [task]).samples:
            pcm, rate = soundfile.read(sample.recording())
            clean, _ = soundfile.read(sample.recording("clean_input"))
            assert sample.marked is not None
            start, end = (round(one * rate) for one in (sample.marked.start, sample.marked.end))
            assert np.array_equal(pcm[:start], clean[:start])
            assert not clean[start:].any()
            found.add(round(20 * np.log10(np.abs(pcm[start:end]).max() / 0.5)))
        assert found == expected


def test_backchannels_are_expected_at_the_gaps(made: Path) -> None:
    expected = json.loads((made / EXPECTED_FILE).read_text())
    for sample in load(made, ["icc_backchannel"]).samples:
        weights = expected[sample.id]
        assert sum(weights) == pytest.approx(1.0)
        truth = json.loads((sample.folder / "truth.json").read_text())["user"]["input"]
        places = [(end + 0.15) / 0.2 for _, end in truth[:-1]]
        assert all(weights[int(place)] > 0 for place in places)
        middles = [(start + end) / 2 / 0.2 for start, end in truth]
        assert not any(weights[int(place)] for place in middles)


def test_the_same_seed_gives_the_same_set(made: Path, tmp_path: Path) -> None:
    synthesise(tmp_path, 1, speak=speak)
    for path in tmp_path.glob("*/*/*"):
        assert path.read_bytes() == (made / path.relative_to(tmp_path)).read_bytes()
    synthesise(tmp_path / "other", 1, seed=1, speak=speak)
    first = "synthetic_pause_handling/0/pause.json"
    assert (tmp_path / "other" / first).read_text() != (made / first).read_text()


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_espeak_speaks_without_silence_around() -> None:
    pcm = espeak("Hello there.", synth.VOICES[0])
    assert 0.4 * RATE < len(pcm) < 2 * RATE
    assert np.abs(pcm).max() == pytest.approx(0.5)
    assert np.abs(pcm[[0, -1]]).min() >= 0.5 * synth.TRIM


def test_without_espeak_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="espeak-ng"):
        espeak("Hello", "en")
    with pytest.raises(ConfigError, match="silent"):
        trimmed(np.zeros((1, 100), np.float32), RATE)


# The text stream


def test_pieces_become_words_with_the_times_of_their_frames() -> None:
    pieces = [(10, " Hel"), (11, "lo"), (14, ","), (15, " you"), (60, " there"), (100, " un"), (101, "heard")]
    found = from_pieces(pieces, [Span(0.8, 1.5), Span(4.9, 5.2)], 10.0)
    assert found.words == (
        Word("Hello,", pytest.approx(0.8), pytest.approx(1.2)),
        Word("you", pytest.approx(1.2), pytest.approx(1.5)),
        Word("there", pytest.approx(4.8), pytest.approx(5.2)),
    )
    assert found.unheard == pytest.approx(1 / 4)
    assert from_pieces([], [Span(0, 1)], 2.0).unheard is None


def test_a_word_lasts_a_second_at_most() -> None:
    found = from_pieces([(0, "so"), (50, " it")], [Span(0.0, 4.5)], 5.0)
    assert [(word.start, word.end) for word in found.words] == [(0.0, 1.0), (4.0, 4.5)]


def test_recognised_words_begin_with_the_speech_they_overlap() -> None:
    words = (Word("What", 0.0, 0.8), Word("is", 0.8, 1.0), Word("that", 3.0, 3.2), Word("hm", 5.0, None))
    found = within_speech(Transcript(words), [Span(0.5, 2.0), Span(2.9, 3.1)])
    assert [(word.start, word.end) for word in found.words] == [
        (0.5, 0.8),
        (0.8, 1.0),
        (3.0, 3.1),
        (5.0, None),
    ]
    assert within_speech(Transcript(words), []).words == words


class FakeWhisper(ModuleType):
    """faster-whisper as far as it is used."""

    class WhisperModel:
        def __init__(self, name: str, **options: object) -> None:
            self.model = SimpleNamespace(is_multilingual=False)
            if name == "unknown":
                raise ValueError("Invalid model size")

        def transcribe(self, pcm: np.ndarray, **options: object) -> tuple[Iterator[object], None]:
            assert (pcm.dtype, options["word_timestamps"]) == (np.float32, True)
            words = [SimpleNamespace(word=" Hi", start=np.float64(1), end=1.5), SimpleNamespace(word=" ")]
            return iter([SimpleNamespace(words=words), SimpleNamespace(words=None)]), None


def test_whisper_gives_words_with_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_whisper", FakeWhisper("faster_whisper"))
    assert Whisper("tiny.en").words(np.zeros(100, np.float32)).words == (
        Word("Hi", pytest.approx(0.94), pytest.approx(1.44)),
    )
    with pytest.raises(ConfigError, match="cannot load 'unknown'"):
        Whisper("unknown")
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(ConfigError, match=r"personaplex-serve\[transcribe\]"):
        Whisper("tiny.en")


def test_chunks_are_put_in_order() -> None:
    chunks = [{"text": " b", "timestamp": [2, None]}, {"text": "a", "timestamp": [1, 1.5]}]
    found = from_chunks({"chunks": [*chunks, {"text": " ", "timestamp": [3, 4]}]}, "output.json")
    assert found.words == (Word("a", 1.0, 1.5), Word("b", 2.0, None))
