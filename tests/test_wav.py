"""Sound files and resampling."""

from __future__ import annotations

import os
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile

from personaplex.audio import wav
from personaplex.errors import BadAudio


def tone(samples: int, rate: int) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(samples) / rate)).astype(np.float32)


def test_round_trip(tmp_path: Path) -> None:
    pcm = tone(4_800, 24_000)
    wav.write_wav(tmp_path / "a.wav", pcm, 24_000)
    heard, rate = wav.read_wav(tmp_path / "a.wav")
    assert rate == 24_000
    assert heard.shape == (1, 4_800)
    assert heard.dtype == np.float32
    assert np.abs(heard[0] - pcm).max() <= 1 / 32_768


def test_the_standard_library_reads_what_we_write(tmp_path: Path) -> None:
    wav.write_wav(tmp_path / "a.wav", np.stack([tone(100, 8_000), np.full(100, 2.0, np.float32)]), 8_000)
    with wave.open(str(tmp_path / "a.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (2, 2, 8_000)
        pairs = np.frombuffer(file.readframes(100), np.int16).reshape(-1, 2)
    assert (pairs[:, 1] == 32_767).all(), "too loud is clipped, it does not wrap around"


@pytest.mark.parametrize(("rate", "channels", "subtype"), [(44_100, 2, "PCM_24"), (8_000, 1, "FLOAT")])
def test_any_rate_and_number_of_channels(tmp_path: Path, rate: int, channels: int, subtype: str) -> None:
    pcm = np.stack([tone(rate, rate)] * channels, axis=1)
    soundfile.write(tmp_path / "a.wav", pcm, rate, subtype=subtype)
    heard, read_rate = wav.read_wav(tmp_path / "a.wav")
    assert (read_rate, heard.shape) == (rate, (channels, rate))
    assert np.abs(heard[-1] - pcm[:, -1]).max() < 1e-4


@pytest.mark.parametrize("content", [b"", b"RIFF", b"not sound at all" * 50])
def test_files_that_are_not_sound(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "secret-name.wav").write_bytes(content)
    with pytest.raises(BadAudio) as caught:
        wav.read_wav(tmp_path / "secret-name.wav")
    assert "secret" not in str(caught.value)


def test_a_file_without_samples(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros((0, 1)), 24_000)
    with pytest.raises(BadAudio, match="no audio"):
        wav.read_wav(tmp_path / "a.wav")


def test_a_file_with_samples_that_are_not_numbers(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.array([0.0, np.nan]), 24_000, subtype="FLOAT")
    with pytest.raises(BadAudio, match="not numbers"):
        wav.read_wav(tmp_path / "a.wav")


def test_a_missing_file_is_the_callers_affair(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        wav.read_wav(tmp_path / "a.wav")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wav.write_wav(tmp_path / "a.wav", tone(100, 24_000), 24_000)
    before = (tmp_path / "a.wav").read_bytes()

    def interrupted(file: int, *args: object, **kwargs: object) -> None:
        os.write(file, b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(soundfile, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wav.write_wav(tmp_path / "a.wav", tone(200, 24_000), 24_000)
    assert (tmp_path / "a.wav").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.wav"]


@pytest.mark.parametrize("rate", [8_000, 16_000, 44_100, 48_000])
def test_resampling_keeps_a_tone(rate: int) -> None:
    pcm = np.stack([tone(rate, rate), np.zeros(rate, np.float32)])
    heard = wav.resample(pcm, rate, 24_000)
    assert heard.shape == (2, 24_000)
    assert heard.dtype == np.float32
    assert np.abs(heard[0, 1_000:-1_000] - tone(24_000, 24_000)[1_000:-1_000]).max() < 1e-3
    assert np.abs(heard[1]).max() < 1e-6
    assert wav.resample(pcm[0], rate, 24_000).shape == (24_000,)


def test_resampling_to_the_same_rate_is_nothing() -> None:
    pcm = tone(100, 24_000)
    assert wav.resample(pcm, 24_000, 24_000) is pcm
