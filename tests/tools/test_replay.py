"""Records made by an engine are heard, compared and continued, and what is wrong with one is one line."""

from __future__ import annotations

import dataclasses
import functools
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import Row as Run
from commands import Say, run_row, sound
from numpy.typing import NDArray

from personaplex import playback, replay
from personaplex.config import FRAME_SIZE, EngineConfig, Sampling
from personaplex.engine.engine import Engine
from personaplex.engine.rerun import rerun
from personaplex.loading import ModelSpec, Parts, load_parts, resolve
from personaplex.persona import Persona
from personaplex.record.format import Event, Head, Row, pack_event, pack_head, pack_row, parse
from personaplex.record.options import EXAMPLES
from personaplex.record.page import render
from personaplex.record.transcript import Word, words

FRAMES = 40
PERSONA = Persona("NATM1", "You sell bread.", Sampling(text_seed=5, audio_seed=6))
HEAD = Head("5e551011", 1_790_000_000.0, PERSONA, "0.1.0", "tiny", {"dtype": "float32"})


@functools.cache
def parts() -> Parts:
    return load_parts(resolve(ModelSpec("tiny", device="cpu")), EngineConfig())


def engine(slots: int = 1) -> Engine:
    return parts().engine(EngineConfig(slots=slots))


@functools.cache
def user() -> NDArray[np.float32]:
    t = np.arange((FRAMES + 20) * FRAME_SIZE) / 24_000
    wave = 0.3 * np.sin(2 * np.pi * 180 * t) * (0.5 + 0.5 * np.sin(2 * np.pi * 1.3 * t))
    return wave.astype(np.float32).reshape(-1, FRAME_SIZE)


@functools.cache
def conversation() -> tuple[bytes, NDArray[np.float32], NDArray[np.int64]]:
    """A record of FRAMES frames; the agent's sound [samples]; the tokens of FRAMES + 20 frames of it."""
    machine = engine()
    slot = machine.open(PERSONA)
    entries, pcm, tokens = [pack_head(HEAD)], [], []
    for number, frame in enumerate(user()):
        machine.feed(slot, frame)
        (out,) = machine.step()
        tokens.append(out.tokens)
        if number >= FRAMES:
            continue
        pcm.append(out.pcm)
        entries.append(pack_row(Row(number, 0.08 * number, 0.02, out.tokens, forced=number == 0)))
        if out.text:
            entries.append(pack_event(Event("text", 0.08 * number, {"frame": number, "text": out.text})))
    entries.append(pack_event(Event("end", 3.2, {"cause": "client left"})))
    return b"".join(entries), np.concatenate(pcm), np.stack(tokens)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("call.record").write_bytes(conversation()[0])
    return tmp_path


def run(arguments: str) -> int:
    return replay.main(["call.record", "--device", "cpu", *shlex.split(arguments)])


def test_the_agents_sound_is_what_was_sent() -> None:
    data, pcm, _ = conversation()
    heard = playback.stereo(parse(data), parts().model.mimi)
    assert heard.shape == (2, FRAMES * FRAME_SIZE)
    np.testing.assert_array_equal(heard[0], pcm)
    codes = parse(data).user_codes[1:]
    np.testing.assert_array_equal(
        heard[1, :-FRAME_SIZE], playback.play(parts().model.mimi, codes).reshape(-1)
    )
    assert not heard[1, -FRAME_SIZE:].any()


def test_missing_frames_are_silence_in_their_place() -> None:
    record = parse(conversation()[0])
    kept = np.r_[0:10, 15:40]
    fields = ("frames", "times_s", "latencies_s", "forced", "tokens")
    gap = dataclasses.replace(record, **{name: getattr(record, name)[kept] for name in fields})
    heard = playback.stereo(gap, parts().model.mimi)
    assert heard.shape == (2, FRAMES * FRAME_SIZE)
    assert not heard[0, 10 * FRAME_SIZE : 15 * FRAME_SIZE].any()
    np.testing.assert_array_equal(heard[0, : 10 * FRAME_SIZE], conversation()[1][: 10 * FRAME_SIZE])


def test_stereo_and_transcript(say: Say) -> None:
    assert run("--output-wav both.wav --output-text t.json") == 0
    pcm, rate = soundfile.read("both.wav", dtype="float32")
    assert (pcm.shape, rate) == ((FRAMES * FRAME_SIZE, 2), 24_000)
    np.testing.assert_allclose(pcm[:, 0], np.clip(conversation()[1], -1, 1), atol=1e-4)
    text = json.loads(Path("t.json").read_text())
    assert (text["session"], text["seconds"], text["voice"]) == (HEAD.session, 3.2, "NATM1")
    spoken = "".join(str(e.fields["text"]) for e in parse(conversation()[0]).events if e.type == "text")
    assert [word["text"] for word in text["words"]] == spoken.split()
    assert all(0 <= word["start"] < word["end"] <= 3.2 for word in text["words"])


def test_a_transcript_needs_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "resolve", None)
    assert run("--output-text t.json") == 0


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([(0, " he"), (1, "llo"), (4, " you")], [("hello", 0.0, 0.16), ("you", 0.32, 0.4)]),
        ([(0, "a "), (2, "b")], [("a", 0.0, 0.08), ("b", 0.16, 0.24)]),
        ([(1, "x y z"), (2, "z")], [("x", 0.08, 0.16), ("y", 0.08, 0.16), ("zz", 0.08, 0.24)]),
        ([(0, " "), (1, ""), (2, "\n"), (3, "c")], [("c", 0.24, 0.32)]),
        ([(0, "a"), (1, ""), (2, "b")], [("ab", 0.0, 0.24)]),
        ([(99, "late"), (-1, "early"), (None, "none"), (0, None)], []),
    ],
)
def test_words_of_pieces(
    pieces: list[tuple[object, object]], expected: list[tuple[str, float, float]]
) -> None:
    events = tuple(Event("text", 0.0, {"frame": frame, "text": text}) for frame, text in pieces)
    record = dataclasses.replace(parse(conversation()[0]), events=events)
    assert words(record) == [Word(*word) for word in expected]


# The model again


def test_the_same_model_says_the_same(say: Say, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--compare") == 0
    assert capsys.readouterr().out == "the same: 40 frames (3.2 s), token for token\n"


def test_in_any_slot_beside_any_others() -> None:
    tokens = parse(conversation()[0]).tokens
    machine = engine(3)
    others = [machine.open(Persona("NATF0", "You wait.")), machine.open(PERSONA)]
    slot = machine.open(PERSONA)
    rows = rerun(machine, slot, tokens)
    for number in range(FRAMES):
        for other in others:
            machine.feed(other, user()[number])
        machine.step()
        np.testing.assert_array_equal(next(rows), tokens[number])


def changed(number: int, stream: int) -> bytes:
    """The record with one token of row `number` changed."""
    record = parse(conversation()[0])
    entries = [pack_head(HEAD)]
    for row, tokens in enumerate(record.tokens.copy()):
        tokens[stream] ^= 1 if row == number else 0
        entries.append(pack_row(Row(row, 0.0, 0.0, tokens)))
    return b"".join(entries)


@pytest.mark.parametrize(
    ("number", "stream", "says"),
    [(7, 0, "frame 7 (0.56 s) on: text"), (9, 3, "frame 9 (0.72 s) on: codebook 2 of"), (0, 1, "frame 0 ")],
)
def test_a_difference_is_found_where_it_is(
    number: int, stream: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("call.record").write_bytes(changed(number, stream))
    assert run("--compare") == 1
    assert says in capsys.readouterr().out


def test_another_seed_is_another_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    head = dataclasses.replace(HEAD, persona=dataclasses.replace(PERSONA, sampling=Sampling()))
    data = conversation()[0]
    Path("call.record").write_bytes(pack_head(head) + data[len(pack_head(HEAD)) :])
    assert run("--compare") == 1
    assert "differs from frame" in capsys.readouterr().out


def test_it_goes_on_as_it_would_have() -> None:
    """The user's last frame is in no row, so from then on the user is another. What does not depend on it,
    the text and first codebook of the frame after the end, is as it was; so is all that was recorded."""
    record, whole = parse(conversation()[0]), conversation()[2]
    found = resolve(ModelSpec("tiny", device="cpu"))
    longer = replay.continued(record, parts(), found, 5, None)
    assert longer.frames.tolist() == list(range(FRAMES + 5))
    np.testing.assert_array_equal(longer.tokens[:FRAMES], record.tokens)
    np.testing.assert_array_equal(longer.tokens[FRAMES, :2], whole[FRAMES, :2])
    assert longer.ended is None


def test_a_continued_record_is_longer(say: Say) -> None:
    sound("more.wav", 0.5)
    assert run("--continue --seconds 0.8 --input-wav more.wav --output-wav b.wav --output-text t.json") == 0
    pcm, _ = soundfile.read("b.wav", dtype="float32")
    assert len(pcm) == (FRAMES + 10) * FRAME_SIZE
    np.testing.assert_allclose(pcm[: FRAMES * FRAME_SIZE, 0], np.clip(conversation()[1], -1, 1), atol=1e-4)
    assert pcm[FRAMES * FRAME_SIZE :, 0].any()
    assert json.loads(Path("t.json").read_text())["seconds"] == 4.0


# Damage and refusals


def cut() -> None:
    end = pack_event(Event("end", 3.2, {"cause": "client left"}))
    Path("call.record").write_bytes(conversation()[0].removesuffix(end))


def damaged() -> None:
    data = bytearray(conversation()[0])
    data[len(data) // 2] ^= 4
    Path("call.record").write_bytes(data)


def empty() -> None:
    Path("call.record").write_bytes(pack_head(HEAD))


def late() -> None:
    row = Row(4, 0.0, 0.0, parse(conversation()[0]).tokens[4])
    Path("call.record").write_bytes(pack_head(HEAD) + pack_row(row))


def foreign_codes() -> None:
    tokens = np.full(17, 2_048)
    Path("call.record").write_bytes(pack_head(HEAD) + pack_row(Row(0, 0.0, 0.0, tokens)))


def foreign_text() -> None:
    tokens = np.array([31_000, *[5] * 16])
    Path("call.record").write_bytes(pack_head(HEAD) + pack_row(Row(0, 0.0, 0.0, tokens)))


def nameless() -> None:
    data = conversation()[0]
    head = pack_head(dataclasses.replace(HEAD, model=""))
    Path("call.record").write_bytes(head + data[len(pack_head(HEAD)) :])


def text_file() -> None:
    Path("call.record").write_text("hello")


ROWS = [
    Run("", 2, "nothing to do"),
    Run("--continue", 2, "nothing to do"),
    Run("--continue --compare", 2, "--continue needs an output"),
    Run("--output-wav call.record", 2, "would overwrite the input call.record"),
    Run("--output-wav a.wav --html a.wav", 2, "would both write a.wav"),
    Run("--output-wav ./", 2, "is a folder"),
    Run("--input-wav x.wav --output-wav a.wav", 2, "needs --continue"),
    Run("--continue --input-wav x.wav --output-wav a.wav", 2, "x.wav: No such file"),
    Run("--continue --seconds 0 --output-wav a.wav", 2, "--seconds"),
    Run("--compare --model missing", 2, "missing"),
    Run("--compare", 2, "this file is no record", text_file),
    Run("--compare", 2, "holds no frame", empty),
    Run("--compare", 2, "the beginning of this conversation is missing", late),
    Run("--compare", 2, "name its own --model", foreign_codes),
    Run("--compare", 2, "name its own --model", foreign_text),
    Run("--output-wav a.wav", 2, "name its own --model", foreign_codes),
    Run("--output-wav a.wav", 2, "does not say which model", nameless),
    Run("--output-wav a.wav --model tiny", 0, "", nameless),
    Run("--output-text t.json", 0, "its session was cut short", cut),
    Run("--compare", 0, "before it are good", damaged),
    Run("--output-wav a.wav", 0, "before it are good", damaged),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_one_line_and_no_half_work(row: Run, say: Say) -> None:
    run_row(replay.main, row, say, "call.record --device cpu ")


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    for example in EXAMPLES:
        _, _, command = example.partition("personaplex.replay ")
        assert replay.main([*shlex.split(command), "--device", "cpu"]) == 0
    with pytest.raises(SystemExit):
        replay.main(["--help"])
    assert all(example in capsys.readouterr().out for example in EXAMPLES[:1])


# The page


def page_of(persona: Persona) -> str:
    record = parse(conversation()[0])
    head = dataclasses.replace(record.head, persona=persona)
    return render(dataclasses.replace(record, head=head), np.zeros((2, FRAMES * FRAME_SIZE), np.float32))


def test_a_page_holds_all_of_it_and_runs_nothing_of_the_clients(say: Say) -> None:
    assert run("--html call.html") == 0
    page = Path("call.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    role = "</script><script>alert(1)</script><!-- {{sound}} \N{GRINNING FACE}"
    page = page_of(dataclasses.replace(PERSONA, text_prompt=role))
    assert "<script>alert" not in page
    data = page.split('id="data">')[1].split("</script>")[0]
    facts = json.loads(data)
    assert facts["role"] == role
    assert facts["seconds"] == pytest.approx(3.2)
    assert [len(lane) for lane in facts["peaks"]] == [FRAMES, FRAMES]
    assert len(facts["delays"]) == FRAMES
