"""`personaplex.offline` as people misuse it: exit code, one line, and their files as they were."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shlex
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from commands import RATE, Row, Say, contents, run_row, sound

from personaplex.offline import main
from personaplex.offline_options import EXAMPLES, parser
from personaplex.voices import save_voice

ROOT = Path(__file__).parents[2]
TINY = "--model tiny --device cpu --seed 1 "
ONE = "--input-wav user.wav --output-wav agent.wav "
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a recording, a folder of two, and a voice recording."""
    monkeypatch.chdir(tmp_path)
    sound("user.wav")
    sound("rec/a.wav")
    sound("rec/b.wav", 0.3)
    sound("me.wav", 0.6)
    return tmp_path


def link() -> None:
    os.symlink("user.wav", "link.wav")


def hard_link() -> None:
    os.link("user.wav", "same.wav")


def folder_link() -> None:
    os.symlink("rec", "reclink")


def text_folder() -> None:
    Path("texts").mkdir()


def voice_folder() -> None:
    Path("voices").mkdir()
    save_voice(Path("voices/me.pt"), torch.zeros(9, 64), torch.zeros(17, 4, dtype=torch.int64))


def long_voice() -> None:
    save_voice(Path("long.pt"), torch.zeros(3_000, 64), torch.zeros(17, 4, dtype=torch.int64))


def long_recording() -> None:
    sound("long.wav", 241.0)


def pointers() -> None:
    Path("voices").mkdir()
    Path("voices/NATF2.pt").write_bytes(POINTER)
    Path("packed").mkdir()
    Path("packed/voices.tgz").write_bytes(POINTER)
    Path("spoken.wav").write_bytes(POINTER)


def pointer_config() -> None:
    Path("checkpoint").mkdir()
    Path("checkpoint/config.json").write_bytes(POINTER)


def unreadable_folder() -> None:
    Path("films").mkdir()
    Path("films/c.m4a").write_bytes(b"....ftypM4A ")


def notes() -> None:
    Path("notes.json").write_text("mine")


REFUSED = [
    Row("--input-wav user.wav --output-wav ''", 2, "--output-wav: the name is empty"),
    Row("--input-wav '' --output-wav agent.wav", 2, "--input-wav: the name is empty"),
    Row(f"{ONE} --output-text ''", 2, "--output-text: the name is empty"),
    Row(f"--input-wav user.wav --output-wav {'d/' * 1_500}agent.wav", 2, "too many folders in one another"),
    Row("--input-wav user.wav --output-wav user.wav", 2, "--output-wav user.wav would overwrite the input"),
    Row("--input-wav user.wav --output-wav rec/../user.wav", 2, "would overwrite the input user.wav"),
    Row("--input-wav rec/../user.wav --output-wav $PWD/user.wav", 2, "would overwrite"),
    Row("--input-wav user.wav --output-wav link.wav", 2, "would overwrite the input", link),
    Row("--input-wav link.wav --output-wav user.wav", 2, "would overwrite the input", link),
    Row("--input-wav user.wav --output-wav same.wav", 2, "would overwrite the input", hard_link),
    Row("--input-wav user.wav --output-wav ./", 2, "would overwrite the input"),
    Row("--input-wav rec --output-wav rec", 2, "--output-wav rec/a.wav would overwrite the input rec/a.wav"),
    Row("--input-wav rec/ --output-wav reclink/", 2, "would overwrite", folder_link),
    Row("--input-wav user.wav rec/a.wav --output-wav .", 2, "would overwrite the input user.wav"),
    Row("--input-wav user.wav --output-wav o.wav --output-text user.wav", 2, "--output-text user.wav would"),
    Row(
        "--input-wav user.wav --output-wav o.wav --output-tokens user.wav",
        2,
        "--output-tokens user.wav would",
    ),
    Row("--input-wav user.wav --output-wav o.x --output-text ./o.x", 2, "--output-wav would both write o.x"),
    Row(f"{ONE} --voice-prompt me.wav --output-text me.wav", 2, "the input me.wav (--voice-prompt)"),
    Row(f"{ONE} --voice-prompt voices/me.pt --save-voice voices/me.pt", 2, "would overwrite", voice_folder),
    Row(
        f"{ONE} --voice-prompt-dir voices --voice-prompt me --save-voice voices/me.pt",
        *(2, "would overwrite", voice_folder),
    ),
    Row(f"{ONE} --tokenizer me.wav --output-text me.wav", 2, "(--tokenizer)"),
    Row(f"{ONE} --output-text texts", 2, "--output-text texts is a folder", text_folder),
    Row(f"{ONE} --output-tokens texts/", 2, "--output-tokens texts/ is a folder"),
    Row("--input-wav user.wav --output-wav user.wav/agent.wav", 2, "a file is in the way of this folder"),
    Row("--input-wav rec --output-wav user.wav", 2, "--output-wav user.wav is a file"),
    Row("--input-wav rec --output-wav out --output-text notes.json", 2, "is a file", notes),
    Row("--input-wav user.wav --output-wav /proc/agent.wav", 2, "/proc/agent.wav: "),
    Row("--input-wav user.wav --output-wav /proc/new/agent.wav", 2, "error: /proc/"),
    Row("--input-wav nobody.wav --output-wav agent.wav", 2, "no such input: nobody.wav"),
    Row("--input-wav texts --output-wav out", 2, "no recording in texts", text_folder),
    Row("--input-wav films --output-wav out", 2, "no recording in films that can be read", unreadable_folder),
    Row("--input-wav rec user.wav rec/a.wav --output-wav out", 2, "would write the same outputs: a"),
    Row("--output-wav agent.wav", 2, "--input-wav"),
    Row(f"{ONE} --text-prompt caf\udce9", 2, "--text-prompt: is not text in UTF-8 (at character 4)"),
    Row(f"{ONE} --save-voice me", 2, "it must end in .pt"),
    Row(f"{ONE} --save-voice voices/", 2, "it must end in .pt"),
    Row(f"{ONE} --save-voice user.wav/me.pt", 2, "a file is in the way of this folder"),
    Row(f"{ONE} --voice-prompt rec", 2, "no voice 'rec'"),
    Row(f"{ONE} --voice-prompt nobody.wav", 2, "no voice 'nobody.wav'"),
    Row(f"{ONE} --voice-prompt user.wav", 2, "--voice-prompt user.wav: a voice recording must last"),
    Row(
        f"{ONE} --voice-prompt long.pt",
        2,
        "voice long.pt does not fit this model: it has 3001 frames",
        long_voice,
    ),
    Row(
        f"{ONE} --voice-prompt long.wav",
        2,
        "--voice-prompt long.wav: a voice recording must last at most 240 s",
        long_recording,
    ),
    Row(f"{ONE} --voice-prompt-dir voices", 2, "NATF2.pt cannot be read: it is a git-lfs pointer", pointers),
    Row(f"{ONE} --voice-prompt-dir packed/voices.tgz", 2, "voices.tgz is a git-lfs pointer", pointers),
    Row(f"{ONE} --voice-prompt spoken.wav", 2, "the file is a git-lfs pointer", pointers),
    Row(f"{ONE} --model checkpoint", 2, "config.json is a git-lfs pointer", pointer_config),
    Row(f"{ONE} --channel 0", 2, "--channel: must be at least 1, got 0"),
    Row(f"{ONE} --batch-size -1", 2, "--batch-size: must be at least 1"),
    Row(f"{ONE} --batch-size 1.5", 2, "'1.5' is not a whole number"),
    Row(f"{ONE} --seed -2", 2, "--seed: must be at least -1, got -2"),
    Row(f"{ONE} --seed 99999999999999999999", 2, "--seed: must be"),
    Row(f"{ONE} --temp-text inf", 2, "--temp-text: text_temperature must be a finite number"),
    Row(f"{ONE} --temp-audio 1e-9", 2, "--temp-audio: audio_temperature"),
    Row(f"{ONE} --topk-text -1", 2, "--topk-text: text_topk must lie between 0 and 512"),
    Row(f"{ONE} --topk-audio 2049", 2, "--topk-audio: audio_topk must lie between 0 and 2048"),
    Row(f"{ONE} --topk-audio many", 2, "--topk-audio"),
    Row(f"{ONE} --device cpu:5", 2, "unknown device 'cpu:5'"),
    Row(f"{ONE} --device cuda:-1", 2, "unknown device 'cuda:-1'"),
    Row(f"{ONE} --device ''", 2, "unknown device ''"),
    Row(f"{ONE} --dtype float16", 2, "--dtype"),
    Row(f"{ONE} --weights int8 --cpu-offload", 2, "int8"),
]


@pytest.mark.parametrize("row", REFUSED, ids=str)
def test_refused_before_the_work(row: Row, say: Say, folder: Path) -> None:
    arguments = row.arguments.replace("$PWD", str(folder))
    run_row(main, Row(arguments, row.code, row.says, row.arrange), say, TINY)


def cut_off() -> None:
    """What a recorder leaves that was killed: a header whose sizes were never filled in."""
    data = bytearray(Path("user.wav").read_bytes())
    data[4:8] = data[40:44] = bytes(4)
    Path("user.wav").write_bytes(data)


def integers_as_floats() -> None:
    pcm, _ = soundfile.read("user.wav")
    soundfile.write("user.wav", pcm * 32_768, RATE, subtype="FLOAT")


def two_channels() -> None:
    pcm, _ = soundfile.read("user.wav")
    soundfile.write("user.wav", np.stack([0 * pcm, pcm], axis=1), RATE)


def folder_in_the_way() -> None:
    Path("out/a.wav").mkdir(parents=True)


def other_formats() -> None:
    for name in ("c.aiff", "d.w64", "e.flac", "f.caf", "g.AU", "h.mp3", "i.opus"):
        pcm, _ = soundfile.read("user.wav")
        container = "OGG" if name.endswith("opus") else name.rpartition(".")[2].upper()
        soundfile.write(
            f"rec/{name}", pcm, RATE, format=container, subtype="OPUS" if container == "OGG" else None
        )
    Path("rec/x.m4a").write_bytes(b"....ftypM4A ")


def companions() -> None:
    Path("rec/._a.wav").write_bytes(b"\0\5\x16\7")
    Path("rec/notes.txt").write_text("mine")
    Path("rec/.DS_Store").write_bytes(b"?")
    os.mkfifo("rec/pipe.wav")


def dead_link() -> None:
    os.symlink("nowhere.wav", "rec/c.wav")


def film() -> None:
    Path("film.wav").write_bytes(b"\0\0\0\x20ftypM4A ")


RUN = [
    Row(f"{ONE} --dtype bfloat16", 0, ""),
    Row(ONE, 0, "", cut_off),
    Row(
        ONE,
        0,
        "user.wav: float samples up to 9831 are taken as integers",
        integers_as_floats,
    ),
    Row(ONE, 0, "channel 1, which is taken, is silent; channel 2 is not (--channel 2)", two_channels),
    Row(f"{ONE} --channel 2", 0, "", two_channels),
    Row(f"{ONE} --channel 3", 1, "user.wav: there is no channel 3: the recording has 2", two_channels),
    Row("--input-wav film.wav --output-wav agent.wav", 1, "it is MPEG-4", film),
    Row("--input-wav rec --output-wav out", 0, "rec: macOS metadata left out: ._a.wav", companions),
    Row(
        "--input-wav rec --output-wav out",
        0,
        "left out, no recordings by their names: notes.txt, pipe",
        companions,
    ),
    Row(
        "--input-wav rec --output-wav out", 1, "x.m4a: skipped: libsndfile does not read .m4a", other_formats
    ),
    Row("--input-wav rec --output-wav out", 1, "a.wav: out/a.wav: a folder is in the way", folder_in_the_way),
    Row("--input-wav rec --output-wav out", 1, "c.wav: rec/c.wav: No such file", dead_link),
    Row("--input-wav user.wav --output-wav /dev/full --output-text said.json", 1, "No space left on device"),
    Row("--input-wav user.wav --output-wav /dev/null --output-text said.json", 0, ""),
    Row("--input-wav user.wav --output-wav User.wav", 0, ""),  # another file, where case counts
]
WRITTEN = {  # all files that some rows write
    "--input-wav rec --output-wav out": ["out/a.wav", "out/b.wav"],
    "--input-wav user.wav --output-wav /dev/full --output-text said.json": ["said.json"],
    "--input-wav user.wav --output-wav /dev/null --output-text said.json": ["said.json"],
}


@pytest.mark.parametrize("row", RUN, ids=lambda row: f"{row}-{row.code}-{row.says[:20]}")
def test_done_as_far_as_can_be(row: Row, say: Say) -> None:
    said = run_row(main, row, say, TINY)
    expected = WRITTEN.get(row.arguments, ["agent.wav"] if "agent.wav" in row.arguments else [])
    if "in the way" in row.says:
        expected = ["out/b.wav"]
    if "x.m4a" in row.says:
        expected = [f"out/{stem}.wav" for stem in "abcdefghi"]
    if row.code == 0 or "rec" in row.arguments:
        assert all(Path(name).stat().st_size > 44 or name.endswith("json") for name in expected)
    if not row.says:
        assert not said, "nothing to be said"


def test_an_unfilled_header_is_read_to_the_end() -> None:
    cut_off()
    assert main([*shlex.split(TINY), *shlex.split(ONE)]) == 0
    assert len(soundfile.read("agent.wav")[0]) == round(0.2 * RATE)


def tokens(*arguments: str) -> np.ndarray:
    assert main([*shlex.split(TINY + ONE), "--output-tokens", "t.npz", *arguments]) == 0
    heard: np.ndarray = np.load("t.npz")["user_codes"]
    return heard


def test_the_channel_and_the_scale_are_heard() -> None:
    plain = tokens()
    integers_as_floats()
    np.testing.assert_array_equal(tokens(), plain)
    shutil.copy(sound("again.wav"), "user.wav")
    two_channels()
    np.testing.assert_array_equal(tokens("--channel", "2"), plain)
    assert (tokens() != plain).any()


def test_a_slash_makes_a_folder() -> None:
    arguments = [
        *shlex.split(TINY),
        "--input-wav",
        "user.wav",
        "--output-wav",
        "new/",
        "--output-text",
        "said/",
    ]
    for _ in range(2):  # existing outputs are replaced
        assert main(arguments) == 0
        assert sorted(contents(Path("new")) | contents(Path("said"))) == ["user.json", "user.wav"]


@pytest.mark.parametrize("prompt", ["NATM1", "NATM1.pt", "me.wav", "kept.pt"])
def test_every_voice_can_be_saved(prompt: str) -> None:
    if prompt == "kept.pt":
        assert main([*shlex.split(TINY + ONE), "--voice-prompt", "NATM1", "--save-voice", prompt]) == 0
    spoken = []
    for voice in (
        ["--voice-prompt", prompt, "--save-voice", "new/saved.pt"],
        ["--voice-prompt", "new/saved.pt"],
    ):
        assert main([*shlex.split(TINY + ONE), "--output-tokens", "t.npz", *voice]) == 0
        spoken.append(np.load("t.npz")["tokens"])
    np.testing.assert_array_equal(*spoken)


def test_a_pipe_is_read(folder: Path) -> None:
    read, write = os.pipe()
    content = Path("user.wav").read_bytes()

    def feed() -> None:
        with open(write, "wb") as pipe:
            pipe.write(content)

    thread = threading.Thread(target=feed)
    thread.start()
    try:
        arguments = ["--input-wav", f"/dev/fd/{read}", "--output-wav", "agent.wav"]
        assert main([*shlex.split(TINY), *arguments]) == 0
    finally:
        os.close(read)
        thread.join()
    assert len(soundfile.read("agent.wav")[0]) == round(0.2 * RATE)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses what would make a file longer, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_cannot_be_written_at_the_end_is_named_and_the_rest_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sound("rec/a.wav", 1.0)
    with largest_file(20_000):
        assert (
            main([*shlex.split(TINY), "--input-wav", "rec", "--output-wav", "out", "--output-text", "out"])
            == 1
        )
    assert "error: a.wav: out/a.wav: File too large" in capsys.readouterr().err
    assert sorted(contents(Path("out"))) == ["a.json", "b.json", "b.wav"]


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    """64 KB."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound("two/a.wav", 7.0)
    sound("two/b.wav", 1.0)
    arguments = [*shlex.split(TINY), "--input-wav", "two", "--output-wav", str(small_disk)]
    assert main(arguments) == 1
    assert f"error: a.wav: {small_disk}/a.wav: No space left on device" in capsys.readouterr().err
    assert sorted(contents(small_disk)) == ["b.wav"]
    (small_disk / "b.wav").unlink()
    with contextlib.suppress(OSError):
        (small_disk / "rest").write_bytes(bytes(65_536))
    assert main(arguments) == 2
    assert "no output can be written" in capsys.readouterr().err


def in_a_process(*command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        timeout=120,
    )


def test_names_and_text_that_the_terminal_cannot_show() -> None:
    name = os.fsdecode(b"caf\xe9.wav")
    os.rename("user.wav", name)
    command = [sys.executable, "-m", "personaplex.offline", *shlex.split(TINY)]
    done = in_a_process(*command, "--input-wav", name, "--output-wav", "out/", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert b"caf\\udce9.wav" in done.stdout
    assert list(contents(Path("out"))) == [name]


RUN_AS_MAIN = "import runpy, sys; runpy.run_module('{module}', run_name='__main__')"


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("personaplex.offline", "torch", "model"),
        ("personaplex.client", "websockets", "client"),
        ("personaplex.server", "ray", "serve"),
        ("k8s", "kubernetes", "k8s"),
    ],
)
def test_a_missing_package_is_one_line(module: str, package: str, extra: str) -> None:
    options = ["--model", "echo"] if module == "personaplex.server" else []
    hide = f"import sys; sys.modules['{package}'] = None; sys.argv[1:] = {options}; "
    done = in_a_process(sys.executable, "-c", hide + RUN_AS_MAIN.format(module=module))
    assert done.returncode == 2, done.stderr
    wanted = f"error: the Python package {package} is missing: pip install 'personaplex-serve[{extra}]'\n"
    assert done.stderr.decode() == wanted


def test_ctrl_c_while_packages_load_is_one_line() -> None:
    interrupt = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'torch': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
    )
    done = in_a_process(sys.executable, "-c", interrupt + RUN_AS_MAIN.format(module="personaplex.offline"))
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")


def test_the_examples_of_the_help_work(folder: Path) -> None:
    text = parser().format_help()
    shutil.copytree("rec", "calls")
    for example in EXAMPLES:
        assert example in text
        before = contents(folder)
        if "|" in example:
            shell = example.replace("python -m", f"{shlex.quote(sys.executable)} -m")
            assert in_a_process("bash", "-c", shell).returncode == 0
        else:
            assert main(shlex.split(example)[3:]) == 0
        after = contents(folder)
        assert {name: data for name, data in before.items() if after[name] != data}.keys() <= {"agent.wav"}
    assert sorted(contents(Path("answers"))) == ["a.json", "a.wav", "b.json", "b.wav"]
    assert Path("me.pt").is_file()
    assert json.loads(Path("answers/a.json").read_text())
    assert struct.unpack("<I", Path("agent.wav").read_bytes()[40:44])[0] == 2 * round(0.2 * RATE)
