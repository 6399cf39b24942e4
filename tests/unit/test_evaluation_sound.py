"""Scores on sound, from files to figures: the design's vectors, the benchmark's faults, scripted agents.

Onsets are allowed 0.1 s and offsets 0.2 s, the detector's own error. Where Silero's model is installed, the
same checks run with it, and it must give the probabilities that are kept.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from evaluation_scenes import (
    AGENTS,
    INTERRUPTED,
    TURN_END,
    KeepingDetector,
    KeptDetector,
    Said,
    backchannel_sample,
    interruption_sample,
    lasts,
    make_set,
    pause_sample,
    scripted,
    sound,
    turn_sample,
    write_answer,
)

from personaplex.audio.wav import resample
from personaplex.errors import ConfigError
from personaplex.evaluation.dataset import Sample, load
from personaplex.evaluation.report import Run
from personaplex.evaluation.report import write as write_page
from personaplex.evaluation.results import results
from personaplex.evaluation.scoring import Scorer, read_record, score, write_json
from personaplex.evaluation.speech import Span
from personaplex.evaluation.vad import Detector, model_file, segments

INSTALLED = all(importlib.util.find_spec(name) for name in ("onnxruntime", "silero_vad"))
SILERO = pytest.mark.skipif(not INSTALLED, reason="needs the extra `evaluate`: onnxruntime and silero-vad")
ONSET, OFFSET = 0.1, 0.2
EVEN = [0.01] * 100


def scored(sample: Sample, said: list[Said], folder: Path, detector: Any, seconds: float = 20.0) -> dict:
    write_answer(folder, said, seconds)
    record = Scorer(detector, "file", expected={"0": EVEN}).record(sample, folder)
    assert record["error"] is None
    return record


def near(value: float, allowed: float = ONSET) -> Any:
    return pytest.approx(value, abs=allowed)


def check_pauses(tmp: Path, detector: Any) -> None:
    sample = pause_sample(tmp / "data")
    for number, (said, official, right, nvidia) in enumerate(
        [
            ([], 0, 0, 0),
            ([Said("uh_huh", 2.04)], 0, 0, 1),
            ([Said("fourteen", 1.94)], 1, 1, 1),
            ([Said("eight", 4.4)], 1, 0, 0),
            ([Said("yeah", 0.9), Said("okay", 1.94)], 1, 0, 1),
        ]
    ):
        record = scored(sample, said, tmp / str(number), detector, 8.0)
        assert record["official"]["takeover"] == official, number
        assert record["event"] == {"takeover": right, "nvidia": nvidia}, number


def check_turns(tmp: Path, detector: Any) -> None:
    sample = turn_sample(tmp / "data")
    for number, (said, official, right) in enumerate(
        [
            ([Said("six", TURN_END + 0.4)], (1, near(0.4)), near(0.4)),
            ([Said("six", TURN_END - 0.5)], (1, 0.0), near(-0.5)),
            ([], (0, None), None),
            ([Said("paris", TURN_END + 1)], (0, None), near(1.0)),
            ([Said("uh_huh", 0.9), Said("six", TURN_END + 0.6)], (1, 0.0), near(0.6)),
        ]
    ):
        record = scored(sample, said, tmp / str(number), detector, 7.0)
        assert (record["official"]["takeover"], record["official"]["latency"]) == official, number
        assert record["event"]["latency"] == right, number


def check_interruptions(tmp: Path, detector: Any) -> None:
    sample, end = interruption_sample(tmp / "data"), INTERRUPTED.end
    before = [Said("fourteen", 2.4, 6.4)]
    size = lasts("fourteen")
    endless = [Said("fourteen", 2.4 + size * number) for number in range(4)]
    for number, (said, taken, stop, censored, response) in enumerate(
        [
            ([*before, Said("seven", end + 0.5)], 1, near(0.4, OFFSET), 0, near(0.5)),
            (endless, 1, near(INTERRUPTED.length, OFFSET), 1, None),
            (before, 0, near(0.4, OFFSET), 0, None),
        ]
    ):
        record = scored(sample, said, tmp / str(number), detector)
        found = record["event"]
        assert record["official"]["takeover"] == taken, number
        assert (found["spoke"], found["censored"], found["stop"]) == (1, censored, stop), number
        assert found["response"] == response, number
        assert found["onset"] == near(6.0), number


def check_backchannels(tmp: Path, detector: Any) -> None:
    sample = backchannel_sample(tmp / "data")
    few = [Said("uh_huh", 4.0), Said("yeah", 9.0), Said("uh_huh", 14.0)]
    record = scored(sample, few, tmp / "few", detector)
    for profile in ("official", "event"):
        found = record[profile]
        assert (found["takeover"], found["events"], found["frequency"]) == (0, 3, 0.15)
        assert found["jsd"] == pytest.approx(0.734, abs=0.02)
    record = scored(sample, [], tmp / "none", detector)
    assert record["official"] == {"takeover": 0, "events": 0, "frequency": 0.0, "jsd": 1.0}
    assert record["event"] == {"takeover": 0, "events": 0, "frequency": 0.0, "jsd": None}
    record = scored(sample, [Said("fourteen", 5.0)], tmp / "turn", detector)
    assert (record["official"]["takeover"], record["event"]["takeover"]) == (1, 1)
    record = scored(sample, [Said("six", 5.0), Said("yeah", 12.0)], tmp / "last", detector)
    assert (record["official"]["takeover"], record["event"]["takeover"]) == (0, 1)
    assert (record["official"]["frequency"], record["event"]["frequency"]) == (0.10, 0.05)


def check_agents(tmp: Path, detector: Any) -> None:
    """Six scripted agents over a synthetic set rank as their manners say."""
    samples, expected = make_set(tmp / "data")
    by_agent = {}
    for agent in AGENTS:
        for sample in samples:
            seconds = soundfile.info(sample.recording()).duration
            folder = tmp / agent / sample.task / sample.id / "0"
            write_answer(folder, scripted(agent, sample), seconds)
        records = score(tmp / agent, samples, Scorer(detector, "file", expected=expected))
        assert not [one["error"] for one in records if one["error"]]
        by_agent[agent] = results(records, load(tmp / "data"), {}, "file")["tasks"]

    def event(task: str, name: str, part: str | None = None) -> dict[str, float | None]:
        found = {agent: by_agent[agent][task]["event"][name] for agent in AGENTS}
        return {agent: (one[part] if part else one)["value"] for agent, one in found.items()}

    pause = event("synthetic_pause_handling", "takeover")
    assert pause["eager"] == 1
    assert not any(pause[one] for one in ("silent", "oracle", "backchanneller", "one-word"))
    answered = event("candor_turn_taking", "answered")
    assert (answered["silent"], answered["backchanneller"]) == (0, 0)
    assert answered["oracle"] == answered["eager"] == answered["one-word"] == 1
    latency = event("candor_turn_taking", "latency", "mean")
    assert (latency["oracle"], latency["one-word"]) == (near(0.4), near(1.0))
    assert latency["eager"] == near(-0.5)
    assert latency["stubborn"] < -0.5 or latency["stubborn"] is None
    taken = event("icc_backchannel", "takeover")
    assert taken == {
        **dict.fromkeys(("silent", "oracle", "backchanneller", "one-word"), 0),
        **dict.fromkeys(("eager", "stubborn"), 1),
    }
    placed = event("icc_backchannel", "jsd")
    assert placed["oracle"] + 0.1 < min(placed["backchanneller"], placed["one-word"])
    stop = event("synthetic_user_interruption", "stop", "mean")
    assert stop["oracle"] == near(0.4, OFFSET)
    stubborn = event("synthetic_user_interruption", "never_stopped")
    assert (stubborn["oracle"], stubborn["stubborn"]) == (0, 1)
    responded = event("synthetic_user_interruption", "answered")
    assert (responded["oracle"], responded["eager"]) == (1, 1)
    assert responded["silent"] == responded["stubborn"] == responded["backchanneller"] == 0
    response = event("synthetic_user_interruption", "response", "mean")
    assert response["oracle"] == near(0.5)
    official = {agent: by_agent[agent]["synthetic_pause_handling"]["official"] for agent in AGENTS}
    assert official["oracle"]["takeover"]["value"] == official["stubborn"]["takeover"]["value"] == 1


ON_SOUND = (check_pauses, check_turns, check_interruptions, check_backchannels, check_agents)
EACH_CHECK = pytest.mark.parametrize("check", ON_SOUND, ids=lambda check: check.__name__)


@EACH_CHECK
def test_on_kept_probabilities(check: Any, tmp_path: Path) -> None:
    check(tmp_path, KeptDetector())


@SILERO
@pytest.mark.parametrize("check", ON_SOUND[:-1], ids=lambda check: check.__name__)
def test_with_the_model(check: Any, tmp_path: Path) -> None:
    detector, kept = KeepingDetector(), KeptDetector()
    check(tmp_path, detector)
    for name, found in detector.kept.items():
        assert segments(found, 512 * len(found)) == segments(kept._kept[name], 512 * len(found))


@SILERO
def test_the_detector_gives_the_packages_segments() -> None:
    """In a process of its own, since the package loads torch and warns."""
    script = Path(__file__).parents[1] / "data" / "evaluation" / "package_segments.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) >= 20
    detector = Detector()
    for case in found:
        pcm = np.load(case["path"])
        mine = [
            [round(16_000 * one.start), round(16_000 * one.end)] for one in detector.segments(pcm, 16_000)
        ]
        assert mine == case["segments"]
    assert sum(len(case["segments"]) for case in found) >= 25
    assert {len(case["segments"]) for case in found} >= {0, 1, 2}


@SILERO
def test_the_sampling_rate_changes_nothing() -> None:
    pcm = sound([Said("six", 1.0), Said("fourteen", 4.0)], 10.0).astype(np.float32) / 32_768
    detector = Detector()
    expected = detector.segments(pcm, 16_000)
    assert len(expected) >= 2
    for rate in (24_000, 48_000):
        found = detector.segments(resample(pcm, 16_000, rate), rate)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert abs(one.start - other.start) <= 0.033
            assert abs(one.end - other.end) <= 0.033


def test_stereo_takes_the_agents_channel(tmp_path: Path) -> None:
    sample = turn_sample(tmp_path / "data")
    write_answer(tmp_path / "mono", [Said("six", TURN_END + 0.4)], 7.0)
    agent, rate = soundfile.read(tmp_path / "mono" / "output.wav", dtype="int16")
    user, _ = soundfile.read(sample.recording(), dtype="int16")
    user = np.pad(user, (0, max(0, len(agent) - len(user))))[: len(agent)]
    expected = Scorer(KeptDetector(), "file").record(sample, tmp_path / "mono")
    for name, channels in (("right", (user, agent)), ("left", (agent, user))):
        folder = tmp_path / name
        folder.mkdir()
        soundfile.write(folder / "output.wav", np.stack(channels, 1), rate, subtype="PCM_16")
        (folder / "output.json").write_text((tmp_path / "mono" / "output.json").read_text())
        assert Scorer(KeptDetector(), "file").record(sample, folder) == expected


def test_a_sample_without_its_marks_shifts_no_other(tmp_path: Path) -> None:
    """The benchmark's scripts pair the marks of one sample with the answer of the next."""
    for number in range(3):
        turn_sample(tmp_path / "data", str(number))
    (tmp_path / "data" / "candor_turn_taking" / "1" / "turn_taking.json").unlink()
    dataset = load(tmp_path / "data")
    assert [one.id for one in dataset.samples] == ["0", "2"]
    assert [(one.id, one.reason) for one in dataset.faults] == [("1", "turn_taking.json is missing")]
    out = tmp_path / "out" / "candor_turn_taking"
    for number in range(3):
        write_answer(out / str(number) / "0", [Said("six", TURN_END + 0.4)], 7.0)
        (out / str(number) / "0" / "clean_output.json").write_text("{}")  # is no answer
    records = score(tmp_path / "out", dataset.samples, Scorer(KeptDetector(), "file"))
    found = results(records, dataset, {}, "file")
    figures = found["tasks"]["candor_turn_taking"]
    assert (figures["answers"], figures["scored"]) == (2, 2)
    assert figures["event"]["latency"]["mean"]["value"] == near(0.4)
    assert found["dataset"] == [{"task": "candor_turn_taking", "found": 3, "declared": 119}]
    assert [one["id"] for one in found["errors"]] == ["1"]


BROKEN = {
    "sound": ("output.wav", b"RIFF", "cannot be read as audio"),
    "empty": ("output.wav", b"", "cannot be read as audio"),
    "words": ("output.json", b"[]", "holds no chunks"),
    "times": ("output.json", b'{"chunks": [{"text": "a", "timestamp": ["x", 1]}]}', "not seconds"),
    "infinity": ("output.json", b'{"chunks": [{"text": "a", "timestamp": [1e999, 1]}]}', "not seconds"),
    "deep": ("output.json", b"[" * 100_000, "no JSON"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_answer_is_listed_and_the_rest_is_scored(case: str, tmp_path: Path) -> None:
    name, content, reason = BROKEN[case]
    for number in range(2):
        turn_sample(tmp_path / "data", str(number))
        folder = tmp_path / "out" / "candor_turn_taking" / str(number) / "0"
        write_answer(folder, [Said("six", TURN_END + 0.4)], 7.0)
    (tmp_path / "out" / "candor_turn_taking" / "0" / "0" / name).write_bytes(content)
    dataset = load(tmp_path / "data")
    records = score(tmp_path / "out", dataset.samples, Scorer(KeptDetector(), "file"))
    found = results(records, dataset, {}, "file")
    assert [one["id"] for one in found["errors"]] == ["0"]
    assert reason in found["errors"][0]["reason"]
    assert found["tasks"]["candor_turn_taking"]["scored"] == 1


@pytest.mark.parametrize(
    "pieces", ['[[-1, "a"]]', '[[1e400, "a"]]', '[[true, "a"]]', "[1]", "7", "[[" + "9" * 400 + ', "a"]]']
)
def test_a_damaged_text_stream_is_named(pieces: str, tmp_path: Path) -> None:
    sample = turn_sample(tmp_path / "data")
    write_answer(tmp_path / "out", [Said("six", TURN_END + 0.4)], 7.0)
    (tmp_path / "out" / "output.json").write_text(f'{{"chunks": [], "pieces": {pieces}}}')
    record = Scorer(KeptDetector(), "text").record(sample, tmp_path / "out")
    assert record["error"].startswith("output.json")


def test_texts_and_names_need_not_be_unicode(tmp_path: Path) -> None:
    """A lone surrogate: of a file name in another encoding, or escaped in JSON."""
    name = os.fsdecode(b"caf\xe9")
    turn_sample(tmp_path / "data").folder.rename(tmp_path / "data" / "candor_turn_taking" / name)
    folder = tmp_path / "out" / "candor_turn_taking" / name / "0"
    write_answer(tmp_path / "answer", [Said("six", TURN_END + 0.4)], 7.0)
    folder.parent.mkdir(parents=True)
    (tmp_path / "answer").rename(folder)
    words = '{"chunks": [{"text": "\\ud800", "timestamp": [2.6, 2.9]}]}'
    (folder / "output.json").write_text(words)
    dataset = load(tmp_path / "data")
    records = score(tmp_path / "out", dataset.samples, Scorer(KeptDetector(), "file"))
    assert [one["error"] for one in records] == [None]
    write_json(tmp_path / "out" / "results.json", results(records, dataset, {}, "file"))
    write_page(tmp_path / "page.html", [Run.load(tmp_path / "out")])
    assert "caf" in (tmp_path / "page.html").read_text()


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"personaplex-serve\[evaluate\]"):
        Detector()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"personaplex-serve\[evaluate\]"):
        model_file()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 1}', '{"version": 1, "error": null, "task": "t"}']
)
def test_part_of_a_record_is_no_record(content: str, tmp_path: Path) -> None:
    (tmp_path / "sample.json").write_text(content)
    assert read_record(tmp_path) is None


@pytest.mark.parametrize("name", ["output.wav", "output.json"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    sample = turn_sample(tmp_path / "data")
    write_answer(tmp_path / "out", [Said("six", TURN_END + 0.4)], 7.0)
    (tmp_path / "out" / name).unlink()
    record = Scorer(KeptDetector(), "file").record(sample, tmp_path / "out")
    assert name in record["error"]


BAD_MARKS = [
    "[]",
    "{}",
    "nonsense",
    '[{"timestamp": [1]}]',
    '[{"timestamp": [2, 1]}]',
    '[{"timestamp": [-1, 1]}]',
    '[{"timestamp": [true, 1]}]',
    '[{"timestamp": [NaN, 1]}]',
    '[{"timestamp": null}]',
    "[1]",
    '[{"timestamp": [1, ' + "9" * 400 + "]}]",
]


@pytest.mark.parametrize("content", BAD_MARKS)
def test_bad_marks_are_a_listed_fault(content: str, tmp_path: Path) -> None:
    sample = turn_sample(tmp_path, "1")
    turn_sample(tmp_path, "0")
    (sample.folder / "turn_taking.json").write_text(content)
    dataset = load(tmp_path)
    assert [one.id for one in dataset.samples] == ["0"]
    assert dataset.faults[0].reason.startswith("turn_taking.json")


def test_samples_are_in_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("10", "9", "1"):
        turn_sample(tmp_path / "v1.0", name)
    assert [one.id for one in load(tmp_path).samples] == ["1", "9", "10"]
    assert [one.id for one in load(tmp_path, limit=2).samples] == ["1", "9"]


def test_unknown_tasks_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task of the benchmark"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="no task is called"):
        load(tmp_path, ["turns"])
    turn_sample(tmp_path)
    with pytest.raises(ConfigError, match="no task icc_backchannel"):
        load(tmp_path, ["icc_backchannel"])


def test_probabilities_to_segments() -> None:
    """Windows of 32 ms: 250 ms of speech at least, gaps under 100 ms are no end, 30 ms of padding."""
    loud, soft, quiet = [0.9] * 10, [0.4] * 10, [0.0] * 10
    length = 512 * 60
    assert segments([*quiet, *loud, *quiet, *quiet, *quiet, *quiet], length) == [Span(0.29, 0.67)]
    assert segments([*quiet, *loud[:7], *quiet, *quiet, *quiet], length) == []  # 224 ms
    assert segments([*quiet, *loud, *soft, *quiet, *quiet, *quiet], length) == [Span(0.29, 0.99)]
    gap = [*quiet, *loud, 0.0, 0.0, 0.0, *loud, *quiet, *quiet]
    assert segments(gap, length) == [Span(0.29, 1.086)]
    end = [*quiet, *quiet, *loud]
    assert segments(end, 512 * 30 - 100) == [Span(0.61, (512 * 30 - 100) / 16_000)]
    assert segments([], 0) == []
