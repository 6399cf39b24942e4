"""Voices: recordings as the reference hears them, verified files, archives unpacked once."""

from __future__ import annotations

import io
import pickle
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from golden import CONFIG, GOLDEN, arrays, model
from numpy.typing import NDArray
from torch import Tensor

from personaplex.audio.voicewav import load_voice_wav
from personaplex.config import PRESET_TINY
from personaplex.engine.script import compose, embed_voice, encode_voice
from personaplex.errors import BadAudio, CheckpointError, UnknownVoice
from personaplex.voicearchive import unpack
from personaplex.voices import Voice, VoiceLibrary, load_voice, save_voice

LM = CONFIG.lm


def test_a_recording_is_heard_as_by_the_reference() -> None:
    expected = arrays("prompt_inputs")
    pcm = load_voice_wav(GOLDEN / "voice.wav")
    np.testing.assert_allclose(pcm[:4800], expected["voice_normalised_first4800"], atol=1e-6)
    codes = encode_voice(model(), torch.from_numpy(pcm))
    np.testing.assert_array_equal(codes, expected["voice_codes"][0])


def test_a_recording_saved_as_a_voice_file_is_the_references_file(tmp_path: Path) -> None:
    codes = encode_voice(model(), torch.from_numpy(load_voice_wav(GOLDEN / "voice.wav")))
    save_voice(tmp_path / "voice.pt", *embed_voice(model().lm, codes))
    ours, theirs = (torch.load(d / "voice.pt", weights_only=True) for d in (tmp_path, GOLDEN))
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype
        assert torch.equal(ours[key], theirs[key]), key
    assert [p.name for p in tmp_path.iterdir()] == ["voice.pt"]
    assert load_voice(tmp_path / "voice.pt", LM).digest == load_voice(GOLDEN / "voice.pt", LM).digest


def test_both_routes_make_the_same_prompt() -> None:
    """A recording and the file saved from it leave the same token ring and, embedded, the same positions."""
    codes = encode_voice(model(), torch.from_numpy(load_voice_wav(GOLDEN / "voice.wav")))
    recorded = compose(Voice.from_codes(codes), [5, 6, 7], LM)
    saved = compose(load_voice(GOLDEN / "voice.pt", LM), [5, 6, 7], LM)
    assert saved.embeddings is not None
    assert recorded.frames == saved.frames
    assert torch.equal(recorded.ring, saved.ring)
    assert torch.equal(recorded.provided, saved.provided)
    prefix = recorded.prefix
    assert torch.equal(recorded.positions[prefix:], saved.positions[prefix:])
    assert torch.equal(model().lm.embed(recorded.positions[:prefix]), saved.embeddings)


def speech(seconds: float, rate: int) -> NDArray[np.float64]:
    t = np.arange(round(seconds * rate)) / rate
    return 0.1 * np.sin(2 * np.pi * 300 * t) * (1 + np.sin(2 * np.pi * 3 * t))


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_any_rate_is_resampled_without_delay(tmp_path: Path, rate: int) -> None:
    for r in (rate, 24_000):
        soundfile.write(tmp_path / f"{r}.wav", speech(2.0, r), r, subtype="FLOAT")
    ours, native = load_voice_wav(tmp_path / f"{rate}.wav"), load_voice_wav(tmp_path / "24000.wav")
    assert len(ours) == len(native) == 48_000
    assert np.abs(ours - native)[480:-480].max() < 2e-3 * np.abs(native).max()


def test_the_first_channel_of_a_stereo_recording_counts(tmp_path: Path) -> None:
    left, right = speech(1.0, 24_000), np.random.default_rng(0).standard_normal(24_000) * 0.1
    soundfile.write(tmp_path / "mono.wav", left, 24_000, subtype="FLOAT")
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], 1), 24_000, subtype="FLOAT")
    np.testing.assert_array_equal(
        load_voice_wav(tmp_path / "stereo.wav"), load_voice_wav(tmp_path / "mono.wav")
    )


@pytest.mark.parametrize("gain", [0.03, 3.0])
def test_loudness_does_not_depend_on_the_recording(tmp_path: Path, gain: float) -> None:
    soundfile.write(tmp_path / "a.wav", speech(1.0, 24_000), 24_000, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", gain * speech(1.0, 24_000), 24_000, subtype="FLOAT")
    a, b = load_voice_wav(tmp_path / "a.wav"), load_voice_wav(tmp_path / "b.wav")
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert a.dtype == np.float32


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (speech(0.39, 24_000), "at least 0.4 s"),
        (np.zeros(24_000), "silent"),
        (np.random.default_rng(0).standard_normal(24_000) * 1e-5, "silent"),
        (np.zeros(0), "no audio"),
        (np.full(24_000, np.nan), "not numbers"),
    ],
)
def test_unusable_recordings(tmp_path: Path, samples: NDArray[np.float64], reason: str) -> None:
    soundfile.write(tmp_path / "voice.wav", samples, 24_000, subtype="FLOAT")
    with pytest.raises(BadAudio, match=reason):
        load_voice_wav(tmp_path / "voice.wav")


def test_a_file_that_is_no_sound(tmp_path: Path) -> None:
    (tmp_path / "voice.wav").write_bytes(b"RIFF, but nothing more")
    with pytest.raises(BadAudio):
        load_voice_wav(tmp_path / "voice.wav")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A voice folder with two good voices."""
    voices = tmp_path / "voices"
    voices.mkdir()
    for name in ("NATF0", "my-voice"):
        (voices / f"{name}.pt").write_bytes((GOLDEN / "voice.pt").read_bytes())
    return voices


def test_library_of_a_folder(folder: Path) -> None:
    library = VoiceLibrary(LM, folder)
    assert library.names() == ["NATF0", "my-voice"]
    assert library.get("NATF0.pt") is library.get("NATF0")
    assert library.get("NATF0").frames == 30
    with pytest.raises(UnknownVoice):
        library.get("NATF1")
    library.add("NATF1", Voice.from_codes(torch.zeros(8, 4, dtype=torch.int64)))
    assert library.get("NATF1").frames == 4


@pytest.mark.parametrize("name", ["../voices/NATF0", "voices/NATF0", "/etc/passwd", "", "NATF0\0"])
def test_a_name_never_reaches_the_file_system(folder: Path, name: str) -> None:
    with pytest.raises(UnknownVoice):
        VoiceLibrary(LM, folder).get(name)


def test_an_empty_folder_has_no_voices(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An operator's folder may hold recordings only, for the offline command."""
    assert VoiceLibrary(LM, tmp_path).names() == []
    assert "holds no voice" in caplog.text


def test_files_no_session_could_name_are_left_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("v1.2", "._NATF0", "Alice Smith"):
        (folder / f"{name}.pt").write_bytes((GOLDEN / "voice.pt").read_bytes())
    assert VoiceLibrary(LM, folder).names() == ["NATF0", "my-voice"]
    assert caplog.text.count("left out") == 3


def test_a_damaged_file_is_a_typed_error(tmp_path: Path) -> None:
    """Whatever bytes are flipped or missing, no other exception reaches the engine."""
    whole, random = (GOLDEN / "voice.pt").read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole[: random.integers(1, len(whole))] if random.random() < 0.3 else whole)
        for place in random.integers(0, len(damaged), 12):
            damaged[place] = random.integers(0, 256)
        (tmp_path / "voice.pt").write_bytes(damaged)
        try:
            load_voice(tmp_path / "voice.pt", LM)
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_only_tiny_has_voices_of_its_own() -> None:
    assert VoiceLibrary(LM).names() == []
    assert len(VoiceLibrary(PRESET_TINY.lm).names()) == 18


def good() -> dict[str, Tensor]:
    return {"embeddings": torch.zeros(29, 1, 1, 32), "cache": torch.zeros(1, 17, 4, dtype=torch.int64)}


def broken_voices() -> dict[str, tuple[object, str]]:
    text_high, audio_high, negative = (good()["cache"].clone() for _ in range(3))
    text_high[0, 0, 1], audio_high[0, 5, 2], negative[0, 3, 29 % 4] = 257, 2049, -2
    return {
        "list": ([good()], "nothing else"),
        "missing": ({"embeddings": good()["embeddings"]}, "nothing else"),
        "extra": ({**good(), "more": torch.zeros(1)}, "nothing else"),
        "no tensor": ({**good(), "cache": [1]}, "must be tensors"),
        "other model": (
            {**good(), "embeddings": torch.zeros(29, 1, 1, 4096)},
            r"needed \[frames - 1, 1, 1, 32\]",
        ),
        "no frames": ({**good(), "embeddings": torch.zeros(0, 1, 1, 32)}, "needed"),
        "integers": (
            {**good(), "embeddings": torch.zeros(29, 1, 1, 32, dtype=torch.int32)},
            "of torch.int32",
        ),
        "nan": ({**good(), "embeddings": torch.full((29, 1, 1, 32), torch.nan)}, "not numbers"),
        "ring shape": ({**good(), "cache": torch.zeros(1, 17, 3, dtype=torch.int64)}, "needed int64"),
        "ring dtype": ({**good(), "cache": torch.zeros(1, 17, 4)}, "needed int64"),
        "text token": ({**good(), "cache": text_high}, "outside the vocabulary"),
        "audio token": ({**good(), "cache": audio_high}, "outside the vocabulary"),
        "hole": ({**good(), "cache": negative}, "outside the vocabulary"),
    }


@pytest.mark.parametrize("fault", broken_voices())
def test_voice_files_of_another_shape(tmp_path: Path, fault: str) -> None:
    content, reason = broken_voices()[fault]
    torch.save(content, tmp_path / "voice.pt")
    with pytest.raises(CheckpointError, match=reason):
        load_voice(tmp_path / "voice.pt", LM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_voice_files_of_any_float(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save({**good(), "embeddings": good()["embeddings"].to(dtype)}, tmp_path / "voice.pt")
    assert load_voice(tmp_path / "voice.pt", LM).frames == 30


class Touch:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("plain", [True, False])
def test_a_voice_file_never_runs_code(tmp_path: Path, plain: bool) -> None:
    hostile = {**good(), "cache": Touch(tmp_path / "ran")}
    if plain:
        (tmp_path / "voice.pt").write_bytes(pickle.dumps(hostile, protocol=2))
    else:
        torch.save(hostile, tmp_path / "voice.pt")
    with pytest.raises(CheckpointError):
        load_voice(tmp_path / "voice.pt", LM)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"hello", (GOLDEN / "voice.pt").read_bytes()[:3000]])
def test_damaged_voice_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "voice.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"voice voice\.pt cannot be read"):
        load_voice(tmp_path / "voice.pt", LM)


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def voices_archive(tmp_path: Path, voices: int = 18) -> Path:
    content = (GOLDEN / "voice.pt").read_bytes()
    return archive(tmp_path / "voices.tgz", {f"voices/V{i}.pt": content for i in range(voices)})


def test_an_archive_is_unpacked_once(tmp_path: Path) -> None:
    source = voices_archive(tmp_path)
    assert len(VoiceLibrary(LM, source).names()) == 18
    (tmp_path / "voices" / "V0.pt").unlink()
    assert len(VoiceLibrary(LM, source).names()) == 17
    assert sorted(p.name for p in tmp_path.iterdir()) == ["voices", "voices.tgz"]


def test_several_may_unpack_at_once(tmp_path: Path) -> None:
    """Threads stand for processes: only the file system is shared, and they meet there in the same way."""
    for attempt in range(5):
        (tmp_path / str(attempt)).mkdir()
        source = voices_archive(tmp_path / str(attempt))
        ready = threading.Barrier(4)

        def unpack_together(source: Path = source, ready: threading.Barrier = ready) -> int:
            ready.wait(timeout=30)
            return len(list(unpack(source).glob("*.pt")))

        with ThreadPoolExecutor(4) as pool:
            found = [pool.submit(unpack_together) for _ in range(4)]
            assert [f.result() for f in found] == [18] * 4
        assert sorted(p.name for p in source.parent.iterdir()) == ["voices", "voices.tgz"]


def test_losing_the_race_keeps_the_winners_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process moves its folder into place between our unpacking and our move."""
    source = voices_archive(tmp_path)
    rename = Path.rename

    def lose(ours: Path, target: Path) -> Path:
        target.mkdir()
        (target / "winner.pt").write_bytes(b"")
        return rename(ours, target)

    monkeypatch.setattr(Path, "rename", lose)
    assert [p.name for p in unpack(source).iterdir()] == ["winner.pt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["voices", "voices.tgz"]


def test_an_archive_cannot_link_elsewhere(tmp_path: Path) -> None:
    source = tmp_path / "voices.tgz"
    with tarfile.open(source, "w:gz") as tar:
        link = tarfile.TarInfo("voices/V0.pt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(CheckpointError, match="cannot be unpacked"):
        unpack(source)
    assert [p.name for p in tmp_path.iterdir()] == ["voices.tgz"]


@pytest.mark.parametrize("name", ["../evil.pt", "/tmp/personaplex-evil.pt", "voices/../../evil.pt"])
def test_an_archive_cannot_write_elsewhere(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    source = archive(inner / "voices.tgz", {name: b"x"})
    with pytest.raises(CheckpointError, match="cannot be unpacked"):
        unpack(source)
    assert not (tmp_path / "evil.pt").exists()
    assert not Path("/tmp/personaplex-evil.pt").exists()
    assert [p.name for p in inner.iterdir()] == ["voices.tgz"]


@pytest.mark.parametrize("damage", ["cut", "garbage", "no voices"])
def test_damaged_archives(tmp_path: Path, damage: str) -> None:
    source = voices_archive(tmp_path)
    if damage == "cut":
        source.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
    elif damage == "garbage":
        source.write_bytes(b"not an archive")
    else:
        archive(source, {"readme.txt": b"hello"})
    with pytest.raises(CheckpointError, match="cannot be unpacked"):
        VoiceLibrary(LM, source)
    assert [p.name for p in tmp_path.iterdir()] == ["voices.tgz"]
