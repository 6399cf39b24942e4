"""Scripted dialogues over a real socket: what a client hears is kept where it heard it, and scored."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
from echo_service import EchoService
from evaluation_scenes import (
    LoudnessDetector,
    Said,
    lasts,
    write_sample,
)

from loadtest.arrivals import Arrival
from loadtest.caller import Caller
from loadtest.dialogue import Dialogues, check_places, write_all
from loadtest.target import Target
from personaplex.errors import ConfigError
from personaplex.evaluation.dataset import load
from personaplex.evaluation.scoring import Scorer, score

LOCUSTFILE = Path(__file__).parents[2] / "loadtest" / "locustfile.py"
LATEST_S = 0.6  # an echo on a busy machine


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two short turns: who echoes them answers at once, or what they say twice."""
    for number in range(2):
        said = [Said("paris", 0.2)]
        mark = {"timestamp": [0.2 + lasts("paris")] * 2}
        write_sample(tmp_path / "data", "candor_turn_taking", str(number), said, 1.6 + 0.08 * number, mark)
    return tmp_path / "data"


def arrival(number: int) -> Arrival:
    return Arrival(number, 0.0, 99.0, "NATF2", "assistant", seed=1)


def test_a_dialogue_is_said_once_and_its_answer_kept_where_it_was_heard(data: Path, tmp_path: Path) -> None:
    dialogues = Dialogues(data)
    with EchoService() as service:
        taken = [dialogues.take(arrival(number)) for number in range(3)]
        callers = [Caller(Target(service.url), one, said.speech, dialogue=said) for one, said in taken]
        threads = [threading.Thread(target=caller.run) for caller in callers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert "text_prompt=You+enjoy+having" in service.requests[0]
    assert [caller.outcome.cause for caller in callers] == ["", "", ""]
    assert [(said.sample.id, said.repeat) for _, said in taken] == [("0", 0), ("1", 0), ("0", 1)]
    out = tmp_path / "out"
    dialogues.describe(out, {"sessions": 3})
    assert write_all([said for _, said in taken], out) == []
    records = score(out, load(data).samples, Scorer(LoudnessDetector(), "text"))
    assert len(records) == 3
    for record in records:
        assert record["error"] is None
        (user,), (agent,) = record["user"], record["agent"]
        assert 0 < agent[0] - user[0] < LATEST_S  # later by the way there and back
        assert agent[1] - agent[0] == pytest.approx(user[1] - user[0], abs=0.25)
        assert record["seconds"] == pytest.approx(1.6 + 0.08 * int(record["id"]), abs=0.081)
        assert record["words"]  # the echo's text, one word a frame
        assert record["event"]["answered"] == 0 or record["event"]["latency"] < 0.5


def test_a_refused_session_is_listed_and_the_rest_is_kept(data: Path, tmp_path: Path) -> None:
    dialogues = Dialogues(data)
    (_, silent), (_, refused) = dialogues.take(arrival(0)), dialogues.take(arrival(1))
    silent.heard.live_at = 5.0
    faults = write_all([refused, silent], tmp_path / "out")
    assert faults == ["candor_turn_taking/1: the session never was live"]
    records = score(tmp_path / "out", load(data).samples, Scorer(LoudnessDetector(), "text"))
    assert [(one["id"], bool(one["error"])) for one in records] == [("0", False), ("1", True)]
    pcm, rate = soundfile.read(tmp_path / "out" / "candor_turn_taking" / "0" / "0" / "output.wav")
    assert (len(pcm), rate) == (round(silent.seconds * 24_000), 24_000)
    assert not np.any(pcm)


def test_under_locust_answers_are_kept_and_scored(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers"
    with EchoService() as service:
        command = [
            *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", service.url),
            *("--arrivals", "1@4", "--require", "lost<=0", "--dialogues", str(data), "--answers", str(out)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    noted = json.loads((out / "run.json").read_text())
    assert noted["data"] == str(data.resolve())
    records = score(out, load(data).samples, Scorer(LoudnessDetector(), "text"))
    assert len(records) == noted["sessions"] >= 2
    assert not [record["error"] for record in records if record["error"]]
    assert all(record["agent"] for record in records)


def test_answers_need_a_folder_to_themselves(data: Path, tmp_path: Path) -> None:
    check_places("", "")
    check_places(str(data), str(tmp_path / "new"))
    for dialogues, answers in ((str(data), ""), ("", str(tmp_path / "new"))):
        with pytest.raises(ConfigError, match="--dialogues and --answers belong together"):
            check_places(dialogues, answers)
    with pytest.raises(ConfigError, match="data holds something already"):
        check_places(str(data), str(data))


def test_a_folder_without_anything_to_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task of the benchmark"):
        Dialogues(tmp_path)
