"""The command on the tiny model: batches, resuming, refusals, and the page. `tiny` proves the runner only."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import soundfile
from evaluation_scenes import RATE, LoudnessDetector, Said, sound, write_answer

from personaplex import evaluate
from personaplex.evaluation import dataset, results
from personaplex.evaluation.report import Run, page
from personaplex.evaluation.scoring import Scorer, read_record, score

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "personaplex" / "data" / "evaluation-results.schema.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tasks, six samples of up to 3 s, one of them broken."""
    root = tmp_path_factory.mktemp("data")
    write(root / "candor_turn_taking" / "0", 1.9, {"turn_taking.json": [{"timestamp": [1.7, 1.7]}]})
    write(root / "candor_turn_taking" / "1", 2.3, {"turn_taking.json": [{"timestamp": [1.7, 1.7]}]})
    write(root / "candor_turn_taking" / "2", 1.0, {"turn_taking.json": [{"timestamp": [1.7, 1.7]}]})
    (root / "candor_turn_taking" / "2" / "input.wav").write_bytes(b"RIFF")
    write(root / "synthetic_pause_handling" / "0", 1.2, {"pause.json": [{"timestamp": [0.5, 0.9]}]})
    overlap = {"context_text": "a", "current_turn_text": "b", "timestamps": [1.0, 1.5]}
    write(root / "v1.5" / "user_backchannel" / "0", 1.6, {"metadata.json": overlap}, clean=True)
    service = {"prompt_text": "You sell boats.", "question_text": "Any red ones?", "question_index": 0}
    write(root / "service_duplex" / "a", 1.1, {"metadata.json": service})
    return root


def write(folder: Path, seconds: float, files: dict[str, Any], clean: bool = False) -> None:
    folder.mkdir(parents=True)
    pcm = sound([Said("question", 0.05)], seconds)
    for stem in ("input", "clean_input")[: 1 + clean]:
        soundfile.write(folder / f"{stem}.wav", pcm, RATE, subtype="PCM_16")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


@pytest.fixture(autouse=True)
def detector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "Detector", LoudnessDetector)


def command(data: Path, out: Path, *more: str) -> list[str]:
    options = ["--model", "tiny", "--device", "cpu", "--repeats", "2", *more]
    return ["run", str(data), "--output", str(out), *options]


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All answers, made one after the other."""
    out = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "Detector", LoudnessDetector)
        assert evaluate.main(command(data, out, "--batch-size", "1")) == 1  # one sample is broken
    return out


def read(out: Path) -> dict[str, Any]:
    found = json.loads((out / "results.json").read_text())
    jsonschema.validate(found, SCHEMA)
    return found


def test_every_sample_is_answered_at_the_length_of_its_recording(data: Path, alone: Path) -> None:
    found = read(alone)
    assert {name: task["answers"] for name, task in found["tasks"].items()} == {
        "synthetic_pause_handling": 2,
        "candor_turn_taking": 6,
        "user_backchannel": 2,
        "service_duplex": 2,
    }
    assert [(one["id"], one["repeat"]) for one in found["errors"]] == [("2", 0), ("2", 1)]
    assert found["tasks"]["candor_turn_taking"]["scored"] == 4
    for folder in (alone / "candor_turn_taking" / "0", alone / "candor_turn_taking" / "1"):
        heard = soundfile.info(data / "candor_turn_taking" / folder.name / "input.wav")
        said = soundfile.info(folder / "0" / "output.wav")
        assert said.frames == round(heard.frames * 24_000 / heard.samplerate)
    assert (alone / "user_backchannel" / "0" / "0" / "clean_output.wav").is_file()


def test_repeats_differ_and_seeds_are_noted(alone: Path) -> None:
    folders = [alone / "candor_turn_taking" / "1" / str(repeat) for repeat in range(2)]
    first, second = (soundfile.read(folder / "output.wav")[0] for folder in folders)
    assert not np.array_equal(first, second)
    records = [read_record(folder) for folder in folders]
    assert len({record["seed"] for record in records if record}) == 2


def test_killed_in_the_middle_and_resumed_in_a_batch_it_gives_the_same(
    data: Path, alone: Path, tmp_path: Path
) -> None:
    """kill -9 while the third answer is being scored; the rest is then made three at a time."""
    out, ready = tmp_path / "out", tmp_path / "ready"
    script = (
        "import sys; from pathlib import Path; import evaluation_scenes, personaplex.evaluate as evaluate\n"
        f"evaluate.Detector = lambda: evaluation_scenes.StallingDetector(5, Path({str(ready)!r}))\n"
        f"sys.exit(evaluate.main({command(data, out, '--batch-size', '2')!r}))"
    )
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment) as process:
        end = time.monotonic() + 120
        while not ready.exists():
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
        process.kill()
    complete = sorted(out.glob("*/*/*/sample.json"))
    assert 0 < len([one for one in complete if not json.loads(one.read_text())["error"]]) < 10
    assert not (out / "results.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in complete if not json.loads(path.read_text())["error"]}

    assert evaluate.main(command(data, out, "--batch-size", "3")) == 1
    assert (out / "results.json").read_text() == (alone / "results.json").read_text()
    for path, written in kept.items():
        assert path.stat().st_mtime_ns == written
    for path in alone.glob("*/*/*/*output.*"):
        assert path.read_bytes() == (out / path.relative_to(alone)).read_bytes(), path


def test_answers_of_other_settings_are_not_mixed(
    data: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ["--tasks", "synthetic_pause_handling"]
    assert evaluate.main(command(data, tmp_path, *tasks)) == 0
    before = read(tmp_path)
    assert evaluate.main(command(data, tmp_path, *tasks, "--seed", "1")) == 2
    assert "2 answers there were made with other settings" in capsys.readouterr().err
    assert read(tmp_path) == before
    assert evaluate.main(command(data, tmp_path, *tasks, "--seed", "1", "--force")) == 0
    assert read(tmp_path)["run"]["seed"] == 1
    assert evaluate.main(command(data, tmp_path, *tasks, "--seed", "1")) == 0  # nothing left to do
    assert "2 of 2 answers are there already" in capsys.readouterr().out


def test_scoring_anew_changes_nothing(alone: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (alone / "results.json").read_text()
    assert evaluate.main(["score", str(alone)]) == 1
    after = json.loads((alone / "results.json").read_text())
    assert after["tasks"] == json.loads(before)["tasks"]
    assert {one["id"] for one in after["errors"]} == {"2"}
    assert "Turn taking" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--voice", "nobody"], "no voice 'nobody'"),
        (["--model", "nothing"], "no model 'nothing'"),
        (["--batch-size", "0"], "at least 1"),
        (["--tasks", "chess"], "no task is called 'chess'"),
        (["--judge-url", "ftp://x", "--judge-model", "m"], "--judge-url"),
        (["--judge-url", "http://x"], "--judge-model"),
        (["--icc-gt", "missing.json"], "no distribution"),
        (["--device", "tpu"], "device"),
    ],
)
def test_a_wrong_set_up_is_refused(
    more: list[str], reason: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(command(data, tmp_path / "out", *more)) == 2
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*/*"))


def test_scoring_loads_no_torch_and_no_engine() -> None:
    script = (
        "import sys, personaplex.evaluate\n"
        "loaded = {'torch', 'personaplex.engine', 'personaplex.loading'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {loaded}' if loaded else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


class Page(HTMLParser):
    """What a page holds, and whether its tags match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.text += text


def answered(data: Path, out: Path, delays: dict[str, float]) -> Run:
    """A run of a scripted agent that answers the turns so much after their end."""
    for name, delay in delays.items():
        said = [] if delay is None else [Said("six", 1.7 + delay)]
        write_answer(out / "candor_turn_taking" / name / "0", said, 4.0)
    found = dataset.load(data, ["candor_turn_taking"])
    records = score(out, found.samples, Scorer(LoudnessDetector(), "file"))
    summary = results.results(records, found, {"model": "<script>", "data": str(data)}, "file")
    (out / "results.json").write_text(json.dumps(summary))
    read(out)
    return Run.load(out)


def test_the_page_shows_the_worst_first_with_its_sound(data: Path, tmp_path: Path) -> None:
    slow = answered(data, tmp_path / "slow & steady", {"0": 0.3, "1": 2.0})
    early = answered(data, tmp_path / "early", {"0": -0.4, "1": 0.5})
    text = page([slow, early])
    shown = Page(text)
    assert "<script>" not in text
    assert "slow & steady" in shown.text
    captions = re.findall(r"<figcaption>(\d+), repeat 0: answered 1, latency (-?[\d.]+)", text)
    assert [name for name, _ in captions] == ["1", "0", "1", "0"]
    assert [float(value) for _, value in captions] == pytest.approx([2.0, 0.3, 0.5, -0.4], abs=0.05)
    assert "PersonaPlex 7b-v1, released" in shown.text
    assert "0.908" in shown.text
    assert "3 of 119" in shown.text
    sources = [attributes["src"] or "" for tag, attributes in shown.tags if tag == "audio"]
    assert len(sources) == 4
    assert all(source.startswith("data:audio/ogg;base64,") for source in sources)
    links = [attributes.get("href") for _, attributes in shown.tags]
    assert not any(links)  # needs nothing but itself
    assert not re.search(r"https?://", text)
