"""The offline command, as a user runs it: parity end to end, batches, folders, voices, refusals, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from golden import GOLDEN, arrays

from personaplex import cli, loading, sizing
from personaplex.config import PRESET_TINY
from personaplex.errors import BadAudio, ConfigError
from personaplex.loading import choose_device
from personaplex.offline import main
from personaplex.offline_io import Job, JobRun, plan_jobs
from personaplex.tokenlog import TokenLog

ROOT = Path(__file__).parents[2]
TEXT_PROMPT = json.loads((GOLDEN / "config.json").read_text())["text_prompt"]
PARITY = ["--model", str(GOLDEN), "--text-prompt", TEXT_PROMPT, "--greedy", "--device", "cpu"]
TINY = ["--model", "tiny", "--device", "cpu"]


def outputs(folder: Path) -> list[str]:
    return [
        *("--output-wav", str(folder / "agent.wav")),
        *("--output-text", str(folder / "agent.json")),
        *("--output-tokens", str(folder / "agent.npz")),
    ]


def sine(path: Path, seconds: float, rate: int = 24_000, pitch: float = 220.0) -> Path:
    t = np.arange(round(seconds * rate)) / rate
    soundfile.write(path, 0.2 * np.sin(2 * np.pi * pitch * t) * (t % 0.5 < 0.3), rate)
    return path


def test_the_whole_pipeline_is_the_references(tmp_path: Path) -> None:
    """In a process of its own, from recordings to files, through the wav route of the voice."""
    command = [sys.executable, "-m", "personaplex.offline", *PARITY, "--dtype", "float32", *outputs(tmp_path)]
    command += ["--voice-prompt", str(GOLDEN / "voice.wav"), "--save-voice", str(tmp_path / "voice.pt")]
    command += ["--input-wav", str(GOLDEN / "user.wav")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "real-time factor" in done.stdout
    assert_is_golden(tmp_path)
    assert (tmp_path / "voice.pt").is_file()


def assert_is_golden(folder: Path, name: str = "agent") -> None:
    expected = arrays("e2e")
    got = np.load(folder / f"{name}.npz")
    np.testing.assert_array_equal(got["tokens"], expected["outputs"])
    np.testing.assert_array_equal(got["user_codes"], expected["user_codes"])
    text = json.loads((folder / f"{name}.json").read_text())
    spoken = ["" if piece in ("PAD", "EPAD") else piece for piece in text]
    assert spoken == expected["pieces"].tolist()
    assert [piece == "PAD" for piece in text] == (expected["outputs"][:, 0] == 3).tolist()
    pcm, rate = soundfile.read(folder / f"{name}.wav", always_2d=True)
    assert (rate, pcm.shape) == (24_000, (168_000, 1))
    clipped = np.clip(expected["pcm_every16"][: 168_000 // 16], -1, 1)
    assert np.abs(pcm[::16, 0] - clipped).max() < 1 / 32_768 + 1e-5  # one step of 16-bit sound


def test_a_batch_of_four_is_four_solo_runs(tmp_path: Path) -> None:
    """Four recordings of different lengths in two slots: each as if it had been alone."""
    recordings = tmp_path / "users"
    recordings.mkdir()
    pcm, rate = soundfile.read(GOLDEN / "user.wav")
    for name, samples in [("a", pcm[:40_000]), ("b", pcm), ("c", pcm[30_000:80_000]), ("d", pcm[:1])]:
        soundfile.write(recordings / f"{name}.wav", samples, rate, subtype="PCM_16")
    options = [*PARITY, "--voice-prompt", str(GOLDEN / "voice.pt"), "--batch-size", "2"]
    batch = tmp_path / "batch"
    into = [f"--output-{kind}={batch}" for kind in ("wav", "text", "tokens")]
    assert main([*options, "--input-wav", str(recordings), *into]) == 0
    assert_is_golden(batch, "b")
    for name in "acd":
        solo = tmp_path / name
        solo.mkdir()
        assert main([*options, "--input-wav", str(recordings / f"{name}.wav"), *outputs(solo)]) == 0
        for suffix in ("wav", "json"):
            assert (solo / f"agent.{suffix}").read_bytes() == (batch / f"{name}.{suffix}").read_bytes()
        ours, theirs = np.load(solo / "agent.npz"), np.load(batch / f"{name}.npz")
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
        np.testing.assert_array_equal(ours["user_codes"], theirs["user_codes"])


def tiny_run(tmp_path: Path, name: str, *options: str) -> np.ndarray:
    folder = tmp_path / name
    folder.mkdir()
    assert main([*TINY, "--input-wav", str(tmp_path / "user.wav"), *outputs(folder), *options]) == 0
    tokens: np.ndarray = np.load(folder / "agent.npz")["tokens"]
    return tokens


def test_auto_runs_as_many_at_once_as_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for two sessions: both are used, a third is refused, and nothing changes in what is said."""
    planned = sizing.footprint(PRESET_TINY, "float32")
    room = planned.weights + sizing.HOST_WORKSPACE + planned.voice + 2 * planned.session
    monkeypatch.setattr(loading, "free_memory", lambda _: room)
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("one", "two", "three"):
        sine(folder / f"{name}.wav", 0.4)
    asked: list[int] = []
    engine = loading.Parts.engine
    monkeypatch.setattr(
        loading.Parts, "engine", lambda self, config: asked.append(config.slots) or engine(self, config)
    )
    command = [*TINY, "--input-wav", str(folder), "--output-wav", str(tmp_path / "out"), "--batch-size"]
    assert main([*command, "auto"]) == 0
    assert asked == [2]
    assert main([*command, "3"]) == 2
    assert asked == [2]


def test_seed_voice_and_role_decide_the_conversation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sine(tmp_path / "user.wav", 0.8)
    one = tiny_run(tmp_path, "one", "--seed", "1")
    np.testing.assert_array_equal(tiny_run(tmp_path, "again", "--seed", "1"), one)
    capsys.readouterr()
    free = tiny_run(tmp_path, "free")
    seed = capsys.readouterr().out.split("seed ")[1].split(":")[0]
    np.testing.assert_array_equal(tiny_run(tmp_path, "repeated", "--seed", seed), free)
    others = {
        "seed": ["--seed", "2"],
        "voice": ["--seed", "1", "--voice-prompt", "VARM4"],
        "role": ["--seed", "1", "--text-prompt", "You enjoy having a good conversation."],
        "no role": ["--seed", "1", "--text-prompt", ""],
        "colder": ["--seed", "1", "--temp-audio", "0.1"],
        "narrower": ["--seed", "1", "--topk-audio", "2"],
    }
    for name, options in others.items():
        assert (tiny_run(tmp_path, name, *options) != one).any(), name


def test_smaller_keys_values_and_weights_are_other_numbers(tmp_path: Path) -> None:
    sine(tmp_path / "user.wav", 0.8)
    plain = tiny_run(tmp_path, "plain", "--seed", "1")
    for option in ("--kv", "--weights"):
        small = tiny_run(tmp_path, option, "--seed", "1", option, "int8")
        assert small.shape == plain.shape
        assert np.isfinite(small).all()
        assert not np.array_equal(small, plain)


def test_greedy_needs_no_seed(tmp_path: Path) -> None:
    sine(tmp_path / "user.wav", 0.5)
    one, two = (tiny_run(tmp_path, name, "--greedy") for name in ("one", "two"))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(("rate", "seconds"), [(48_000, 0.5), (16_000, 0.16), (44_100, 0.333)])
def test_the_output_is_as_long_as_the_input(tmp_path: Path, rate: int, seconds: float) -> None:
    sine(tmp_path / "user.wav", seconds, rate)
    tokens = tiny_run(tmp_path, "out")
    pcm, out_rate = soundfile.read(tmp_path / "out" / "agent.wav")
    assert out_rate == 24_000
    assert len(pcm) == round(round(seconds * rate) * 24_000 / rate)
    assert len(tokens) == -(-len(pcm) // 1_920)
    assert len(json.loads((tmp_path / "out" / "agent.json").read_text())) == len(tokens)


def test_one_bad_recording_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recordings = tmp_path / "users"
    recordings.mkdir()
    sine(recordings / "a.wav", 0.2)
    (recordings / "b.wav").write_bytes(b"no sound")
    sine(recordings / "c.flac", 0.2)
    (recordings / "notes.txt").write_text("not a recording")
    assert main([*TINY, "--input-wav", str(recordings), "--output-wav", str(tmp_path / "out")]) == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.wav", "c.wav"]
    assert "failed: b.wav: the file cannot be read as audio" in capsys.readouterr().out


def test_jobs_of_files_and_folders(tmp_path: Path) -> None:
    a, b, out = tmp_path / "a.wav", tmp_path / "more" / "b.WAV", tmp_path / "out"
    b.parent.mkdir()
    a.touch()
    b.touch()
    assert plan_jobs([a], out, None, None) == [Job(a, out, None, None)]
    assert plan_jobs([a, b.parent], out, out, None) == [
        Job(a, out / "a.wav", out / "a.json", None),
        Job(b, out / "b.wav", out / "b.json", None),
    ]
    out.mkdir()
    assert plan_jobs([a], out, None, out) == [Job(a, out / "a.wav", None, out / "a.npz")]
    (b.parent / "a.flac").touch()
    with pytest.raises(ConfigError, match="same outputs: a"):
        plan_jobs([a, b.parent], out, None, None)
    with pytest.raises(ConfigError, match="no recording"):
        plan_jobs([out], out, None, None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--voice-prompt", "NATF9"], "no voice 'NATF9'"),
        (["--voice-prompt", "user.wav", "--batch-size", "0"], "--batch-size"),
        (["--model", "no-such-folder"], "no model 'no-such-folder'"),
        (["--device", "cuda:99"], "this machine has no cuda:99"),
        (["--device", "mps"], "not supported"),
        (["--topk-text", "513"], "text_topk must lie between 0 and 512"),
        (["--temp-audio", "nan"], "audio_temperature must be a finite number"),
        (["--tokenizer", str(GOLDEN / "tokenizer.model")], "256 pieces, the model needs 512"),
    ],
)
def test_a_wrong_set_up_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    sine(tmp_path / "user.wav", 0.2)
    files = ["--input-wav", str(tmp_path / "user.wav"), "--output-wav", str(tmp_path / "agent.wav")]
    assert main([*TINY, *files, *options]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert reason in line
    assert not (tmp_path / "agent.wav").exists()


def test_a_missing_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--input-wav", "nobody.wav", "--output-wav", str(tmp_path / "agent.wav")]) == 2
    assert "no such input: nobody.wav" in capsys.readouterr().err


def test_a_voice_file_in_the_voice_folder(tmp_path: Path) -> None:
    """As the reference reads it: the name, with or without .pt, in --voice-prompt-dir."""
    voices = tmp_path / "voices"
    voices.mkdir()
    (voices / "NATF2.pt").write_bytes((GOLDEN / "voice.pt").read_bytes())
    (voices / "me.wav").write_bytes((GOLDEN / "voice.wav").read_bytes())
    files = ["--input-wav", str(GOLDEN / "user.wav"), "--voice-prompt-dir", str(voices)]
    for prompt in (["--voice-prompt", "NATF2"], [], ["--voice-prompt", "me.wav"]):
        assert main([*PARITY, *files, *prompt, *outputs(tmp_path)]) == 0
        assert_is_golden(tmp_path)


def test_ctrl_c_leaves_no_half_written_file(tmp_path: Path) -> None:
    """The first conversation is written, the second one is interrupted."""
    sine(tmp_path / "a.wav", 0.2)
    sine(tmp_path / "b.wav", 120.0)
    out = tmp_path / "out"
    command = [sys.executable, "-m", "personaplex.offline", *TINY]
    command += ["--output-wav", str(out), "--output-text", str(out)]
    command += ["--input-wav", str(tmp_path / "a.wav"), str(tmp_path / "b.wav")]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listen_to_ctrl_c,
    ) as process:
        try:
            wait_for(process, out / "a.wav")
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == cli.INTERRUPTED
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert sorted(p.name for p in out.iterdir()) == ["a.json", "a.wav"]


def listen_to_ctrl_c() -> None:
    """A shell that runs its tests in the background makes them, and their children, deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(process: subprocess.Popen[str], path: Path) -> None:
    """Until the command has written `path`; fails when it ends first."""
    while not path.exists():
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.05)


def test_a_device_by_name() -> None:
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda")


def test_tokens_load_as_a_log(tmp_path: Path) -> None:
    """What --output-tokens writes is enough to make a TokenLog of the session."""
    sine(tmp_path / "user.wav", 0.3)
    tokens = tiny_run(tmp_path, "out", "--seed", "5")
    log = TokenLog()
    for row in tokens:
        log.append(row)
    heard = np.load(tmp_path / "out" / "agent.npz")["user_codes"]
    np.testing.assert_array_equal(log.user_codes[:, 1:], heard[:, :-1])


def test_a_recording_of_nothing_is_refused(tmp_path: Path) -> None:
    """One sample at 96 kHz is none at 24 kHz: there would be no frame to wait for."""
    soundfile.write(tmp_path / "blip.wav", np.zeros(1, np.float32), 96_000)
    with pytest.raises(BadAudio, match="shorter than one sample"):
        JobRun(Job(tmp_path / "blip.wav", tmp_path / "out.wav", None, None), 0.0)


def test_a_role_text_of_any_length(tmp_path: Path) -> None:
    """Here nobody else waits: a text far longer than the service takes is prefilled all the same."""
    sine(tmp_path / "user.wav", 0.2)
    tokens = tiny_run(tmp_path, "long", "--text-prompt", "word " * 1_500)
    assert len(tokens) == 3
