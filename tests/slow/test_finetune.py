"""Training runs: that they learn, go on where they were killed, repeat themselves, and say what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import calls
import pytest
import torch
from ports import free_port

from personaplex.config import PRESET_TINY
from personaplex.errors import CheckpointError, ConfigError
from personaplex.finetune import settings as run_settings
from personaplex.finetune.__main__ import main
from personaplex.finetune.adapters import Adapters
from personaplex.finetune.settings import Settings
from personaplex.finetune.state import State
from personaplex.finetune.train import rate_at
from personaplex.model.lora import read_adapter, targets

STEPS = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    for number in range(5):
        calls.write_call(folder / "calls", f"call-{number}", pitch=180 + 20 * number)
    prepared = [
        "prepare",
        str(folder / "calls"),
        "--output",
        str(folder / "data"),
        "--model",
        "tiny",
        "--role",
        "",
    ]
    assert main([*prepared, "--device", "cpu"]) == 0
    return folder / "data"


def command(data: Path, output: Path, *more: str) -> list[str]:
    kept = ("--model", "tiny", "--device", "cpu", "--rank", "2", "--steps", str(STEPS), "--batch-size", "2")
    often = (
        "--warmup",
        "2",
        "--rate",
        "3e-3",
        "--save-every",
        "4",
        "--evaluate-every",
        "8",
        "--samples",
        "0",
    )
    return ["train", str(data), "--output", str(output), *kept, *often, *more]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, undisturbed, with a sample."""
    output = tmp_path_factory.mktemp("run")
    said = ("--samples", "1", "--sample-seconds", "0.8")
    assert main(command(data, output, *said)) == 0
    return output


def history(folder: Path) -> list[dict[str, float]]:
    found: list[dict[str, float]] = torch.load(folder / "checkpoint.pt", weights_only=True)["history"]
    return found


def test_a_run_learns_and_leaves_what_it_promises(run: Path) -> None:
    rows = [row for row in history(run) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    checked = [row for row in history(run) if "validation loss" in row]
    assert [row["step"] for row in checked] == [8, 16]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.*"))
    for step in (8, 16):
        folder = run / "samples" / f"step-{step:06}"
        assert {path.suffix for path in folder.iterdir()} == {".wav", ".json"}
    adapter = read_adapter(run / "adapter.safetensors")
    assert adapter.training["steps"] == STEPS
    assert adapter.training["settings"]["rank"] == 2
    best = min(checked, key=lambda row: row["validation loss"])
    assert read_adapter(run / "adapter-best.safetensors").training["steps"] == best["step"]


KILLED = """
import os, signal, sys, torch
from personaplex.finetune.__main__ import main

save, saved = torch.save, []

def dying(content, file):
    saved.append(content)
    if len(saved) == 3:
        file.write(b"half a checkpoint")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(content, file)

torch.save = dying
main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_as_if_nothing_had_happened(data: Path, run: Path, tmp_path: Path) -> None:
    """SIGKILL while the third checkpoint is being written: the second is whole, only the steps behind it are
    lost, and the same command ends with the curve and the adapter of the undisturbed run.
    """
    line = [sys.executable, "-c", KILLED, *command(data, tmp_path, "--save-every", "2")]
    killed = subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert [row["step"] for row in history(tmp_path)] == [1, 2, 3, 4]
    assert list(tmp_path.glob(".checkpoint.pt.*.part"))

    assert main(command(data, tmp_path)) == 0
    assert history(tmp_path) == history(run)
    assert (tmp_path / "adapter.safetensors").read_bytes() == (run / "adapter.safetensors").read_bytes()
    assert not list(tmp_path.glob(".*.part"))


def test_a_finished_run_has_nothing_left_to_do(
    data: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "adapter.safetensors").read_bytes()
    assert main(command(data, run)) == 0
    assert (run / "adapter.safetensors").read_bytes() == before
    assert "use it with --lora" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--rank", "3"), r"holds a run with rank = 2, and this one has 3"),
        (("--quiet-share", "0.5"), "holds a run with weights = "),
        (("--validation", "0"), r"holds a run with validation = 0\.1"),
    ],
)
def test_another_run_is_not_mixed_in(
    data: Path, run: Path, more: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(data, run, *more)) == 2
    assert re.search(reason, capsys.readouterr().err)


def test_other_calls_are_another_run(data: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    described = json.loads((tmp_path / "data" / "dataset.json").read_text())
    described["calls"][0]["transcript"] = "another"
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(described))
    assert main(command(tmp_path / "data", run)) == 2


def test_a_dataset_of_another_codec_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data, tmp_path / "data")
    described = json.loads((tmp_path / "data" / "dataset.json").read_text())
    described["codec"] = "0" * 64
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(described))
    assert main(command(tmp_path / "data", tmp_path / "run")) == 2
    assert "was prepared with another codec than this model's" in capsys.readouterr().err


def test_pieces_and_checkpointing_change_nothing_but_rounding(data: Path, run: Path, tmp_path: Path) -> None:
    more = ("--pieces", "2", "--gradient-checkpointing", "--steps", "3")
    for name, given in (("plain", ("--steps", "3")), ("pieces", more)):
        assert main(command(data, tmp_path / name, *given)) == 0
    plain, pieces = (read_adapter(tmp_path / name / "adapter.safetensors") for name in ("plain", "pieces"))
    for key, (a, b) in plain.pairs.items():
        torch.testing.assert_close(pieces.pairs[key][0], a, rtol=1e-3, atol=2e-3)
        torch.testing.assert_close(pieces.pairs[key][1], b, rtol=1e-3, atol=2e-3)


def test_two_processes_learn_what_one_does(data: Path, tmp_path: Path) -> None:
    """torchrun and DDP over gloo: the same losses step by step, and one process that writes."""
    given = ("--steps", "2", "--validation", "0")
    assert main(command(data, tmp_path / "one", *given)) == 0
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    line = [*torchrun, "--master-port", str(free_port()), "-m", "personaplex.finetune"]
    done = subprocess.run(
        [sys.executable, "-m", *line, *command(data, tmp_path / "two", *given)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("use it with --lora") == 1
    for one, two in zip(history(tmp_path / "one"), history(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_a_loss_that_is_no_number_ends_the_run(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(data, tmp_path, "--rate", "1e30", "--warmup", "0", "--clip", "1e30")) == 1
    assert "is not a number: try a lower --rate (in its batch: call-" in capsys.readouterr().err


def test_a_batch_is_divided_evenly(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(data, tmp_path, "--pieces", "3")) == 2
    assert "a batch of 2 cannot be divided" in capsys.readouterr().err


def test_training_begins_from_an_adapter(data: Path, run: Path, tmp_path: Path) -> None:
    begin = ("--from", str(run / "adapter.safetensors"), "--steps", "2", "--validation", "0")
    assert main(command(data, tmp_path, *begin)) == 0
    assert history(tmp_path)[0]["loss"] < 0.8 * history(run)[0]["loss"]
    other = Adapters(targets(PRESET_TINY.lm, ("heads",)), 2, 2.0)
    with pytest.raises(CheckpointError, match="another rank or other targets"):
        other.adopt("x", read_adapter(run / "adapter.safetensors"))


def test_a_damaged_checkpoint_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    adapters = Adapters(targets(PRESET_TINY.lm, ("heads",)), 2, 2.0)
    optimizer = torch.optim.AdamW(adapters.parameters())
    with pytest.raises(CheckpointError, match="is damaged: delete it"):
        State.load(tmp_path, adapters, optimizer, torch.device("cpu"))


def test_the_rate_warms_up_and_falls_to_a_tenth() -> None:
    given = Settings(rate=1.0, warmup=10, steps=110)
    assert rate_at(0, given) == pytest.approx(0.1)
    assert rate_at(9, given) == rate_at(10, given) == 1.0
    assert rate_at(60, given) == pytest.approx(0.55)
    assert rate_at(110, given) == pytest.approx(0.1)


def test_settings_are_kept_and_compared(tmp_path: Path) -> None:
    run_settings.claim(tmp_path, Settings().described())
    run_settings.claim(tmp_path, Settings().described())
    with pytest.raises(ConfigError, match="seed = 0, and this one has 1"):
        run_settings.claim(tmp_path, replace(Settings(), seed=1).described())
    (tmp_path / "settings.json").write_text("[")
    with pytest.raises(ConfigError, match="is damaged"):
        run_settings.claim(tmp_path, Settings().described())


def test_show_tells_what_an_adapter_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(run / "adapter.safetensors")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["base"]["name"] == "tiny"
    assert shown["matrices"] == 8 + 2 * 8 * 4
