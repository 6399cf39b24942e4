"""Sound files and resampling."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import struct
import threading
import time
import wave
from pathlib import Path

import numpy as np
import pytest
import soundfile
from mutation import memory_within, mutants

from personaplex.audio import readable, wav
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


def written(kind: str, subtype: str = "PCM_16", samples: int = 4_800) -> bytearray:
    """A file of `kind` with a tone."""
    file = io.BytesIO()
    soundfile.write(file, tone(samples, 24_000), 24_000, format=kind, subtype=subtype)
    return bytearray(file.getvalue())


NEVER = 0xFFFFFFFF  # what some recorders leave where a size belongs; others leave 0


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "ULAW"), ("WAV", "IMA_ADPCM"), ("WAVEX", "PCM_24")],
)
@pytest.mark.parametrize(
    ("riff", "size"),
    [(0, 0), (36, 0), (NEVER, 0), (0, NEVER), (NEVER, NEVER), (0x7FFFFFFF, 0x7FFFFFFF), (0, 10**8)],
)
def test_sizes_that_were_never_filled_in(
    tmp_path: Path, kind: str, subtype: str, riff: int, size: int
) -> None:
    data = written(kind, subtype)
    (tmp_path / "whole.wav").write_bytes(data)
    at = data.index(b"data")
    data[4:8], data[at + 4 : at + 8] = struct.pack("<I", riff), struct.pack("<I", size)
    (tmp_path / "cut.wav").write_bytes(data)
    np.testing.assert_array_equal(
        wav.read_wav(tmp_path / "cut.wav")[0], wav.read_wav(tmp_path / "whole.wav")[0]
    )


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("RF64", {20: bytes(24)}),
        ("RF64", {20: b"\xff" * 24}),
        ("AU", {8: bytes(4)}),
        ("AU", {8: b"\xff" * 4}),
        ("CAF", {"data": bytes(8)}),
        ("CAF", {"data": b"\xff" * 8}),
        ("AIFF", {4: bytes(4), "SSND": bytes(4)}),
        ("W64", {16: bytes(8)}),
    ],
)
def test_other_containers_whose_sizes_were_never_filled_in(
    tmp_path: Path, kind: str, sizes: dict[int | str, bytes]
) -> None:
    data = written(kind)
    for place, content in sizes.items():
        at = place if isinstance(place, int) else data.index(place.encode()) + 4
        data[at : at + len(content)] = content
    (tmp_path / "cut").write_bytes(data)
    heard, _ = wav.read_wav(tmp_path / "cut")
    assert heard.shape == (1, 4_800)
    assert np.abs(heard[0] - tone(4_800, 24_000)).max() <= 1 / 32_768


STALE = {  # container -> where its size of the samples stands, how it is written, and what it counts besides
    "WAV": (b"data", 4, "<I", 0),
    "WAVEX": (b"data", 4, "<I", 0),
    "RF64": (b"ds64", 16, "<Q", 0),
    "AIFF": (b"SSND", 4, ">I", 8),
    "AU": (b".snd", 8, ">I", 0),
    "CAF": (b"data", 4, ">q", 4),
}


def stale(kind: str, size: int, more: bytes = b"") -> bytes:
    """A recording of 9600 bytes of samples whose header counts `size` of them, and `more` behind them."""
    data = written(kind)
    chunk, offset, code, besides = STALE[kind]
    at = data.index(chunk) + offset
    data[at : at + struct.calcsize(code)] = struct.pack(code, size + besides)
    return bytes(data) + more


@pytest.mark.parametrize("kind", STALE)
@pytest.mark.parametrize("size", [2_400, 2_401, 9_590])
def test_samples_beyond_what_the_header_counts_are_read_and_said(
    tmp_path: Path, kind: str, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A recorder that brought its header up to date now and then was cut off in between."""
    (tmp_path / "a.wav").write_bytes(stale(kind, size))
    heard, _ = wav.read_wav(tmp_path / "a.wav")
    assert heard.shape == (1, 4_800)
    assert np.abs(heard[0] - tone(4_800, 24_000)).max() <= 1 / 32_768
    (said,) = caplog.messages
    assert said.startswith("a.wav: its header counts ")
    assert f"and {9_600 - size} more follow" in said


@pytest.mark.parametrize("kind", ["WAV", "AIFF"])
@pytest.mark.parametrize(
    "more",
    [
        b"ABCD\x04\0\0\0abcdEFGH\x02\0\0\0ab",  # whole chunks, whatever they are called
        b"LIST\xff\xff\0\0INFOICMT",  # one that was cut off
        b"\0LIST\x04\0\0\0abcd",  # behind a byte of padding
        b"TAG" + bytes(125),
        b"ID3\x04" + bytes(500),
        b"\r\n",
    ],
)
def test_metadata_behind_the_samples_is_no_sound(
    tmp_path: Path, kind: str, more: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    if kind == "AIFF":  # sizes the other way round
        more = more.replace(b"\x04\0\0\0", b"\0\0\0\x04").replace(b"\x02\0\0\0", b"\0\0\0\x02")
    padded = more.startswith(b"\0")
    data = stale(kind, 9_600 - padded)[: -1 if padded else None]
    (tmp_path / "a.wav").write_bytes(data + more)
    assert wav.read_wav(tmp_path / "a.wav")[0].shape == (1, 4_800 - padded)
    assert not caplog.messages


def test_an_empty_recording_stays_empty_whatever_follows(tmp_path: Path) -> None:
    """A text chunk behind no samples is no sound."""
    data = written("WAV", samples=0) + b"LIST" + struct.pack("<I", 14) + b"INFOICMT\x01\x00\x00\x00x\x00"
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(BadAudio, match="no audio"):
        wav.read_wav(tmp_path / "a.wav")


@pytest.mark.parametrize("scale", [2.0**15, 2.0**23, 2.0**31])
def test_floats_that_are_integers_are_scaled_and_said(
    tmp_path: Path, scale: float, caplog: pytest.LogCaptureFixture
) -> None:
    soundfile.write(tmp_path / "a.wav", tone(4_800, 24_000) * scale, 24_000, subtype="DOUBLE")
    heard, _ = wav.read_wav(tmp_path / "a.wav")
    assert np.abs(heard[0] - tone(4_800, 24_000)).max() < 1e-6
    assert caplog.messages == [
        f"a.wav: float samples up to {scale / 2:.0f} are taken as integers and divided by {scale:.0f}"
    ]


def test_loud_floats_are_left_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    soundfile.write(tmp_path / "a.wav", tone(4_800, 24_000) * 6, 24_000, subtype="FLOAT")
    assert wav.read_wav(tmp_path / "a.wav")[0].max() == pytest.approx(3.0, abs=1e-3)
    assert not caplog.messages


def test_floats_beyond_every_integer_are_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(4_800, 24_000) * 1e12, 24_000, subtype="FLOAT")
    with pytest.raises(BadAudio, match=r"samples up to 5e\+11, where full scale is 1"):
        wav.read_wav(tmp_path / "a.wav")


def test_a_silent_channel_is_said_where_another_speaks(caplog: pytest.LogCaptureFixture) -> None:
    pcm = np.stack([tone(100, 24_000) * 1e-4, tone(100, 24_000), tone(100, 24_000) * 0.1])
    np.testing.assert_array_equal(wav.one_channel(pcm, "a.wav"), pcm[0])
    assert caplog.messages == ["a.wav: channel 1, which is taken, is silent; channel 2 is not"]
    caplog.clear()
    for quiet in (pcm[1:], pcm[:1], np.zeros((2, 100), np.float32)):
        wav.one_channel(quiet, "a.wav")
    np.testing.assert_array_equal(wav.one_channel(pcm, "a.wav", 3), pcm[2])
    assert not caplog.messages
    with caplog.at_level(logging.ERROR), pytest.raises(BadAudio, match="no channel 4"):
        wav.one_channel(pcm, "a.wav", 4)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\0\0\0\x20ftypM4A \0\0\0\0", "MPEG-4"),
        (b"\x1aE\xdf\xa3" + bytes(40), "WebM"),
        (b"#!AMR\n" + bytes(40), "AMR"),
        (b"\0\x05\x16\x07" + bytes(40), "macOS"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ],
)
def test_known_formats_that_cannot_be_read_are_named(tmp_path: Path, content: bytes, kind: str) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    with pytest.raises(BadAudio, match=kind):
        wav.read_wav(tmp_path / "a.wav")


def test_a_flac_stream_of_unknown_length_is_an_error_in_words(tmp_path: Path) -> None:
    """libsndfile gives such a file 2**63 - 1 samples."""
    data = written("FLAC")
    data[21], data[22:26] = data[21] & 0xF0, bytes(4)
    (tmp_path / "a.flac").write_bytes(data)
    with pytest.raises(BadAudio):
        wav.read_wav(tmp_path / "a.flac")


def test_a_pipe_is_read_to_its_end_and_no_further_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(written("WAV", samples=100_000))  # more than a pipe holds

    def read() -> int:
        ours, theirs = os.pipe()

        def feed() -> None:
            with open(theirs, "wb") as pipe, contextlib.suppress(BrokenPipeError):
                pipe.write(content)

        thread = threading.Thread(target=feed)
        thread.start()
        try:
            return wav.read_wav(f"/dev/fd/{ours}")[0].shape[1]
        finally:
            os.close(ours)
            thread.join()

    assert read() == 100_000
    monkeypatch.setattr(readable, "PIPE_LIMIT", 50_000)
    with pytest.raises(BadAudio, match="came through the pipe"):
        read()


def test_a_device_is_written_to_and_stays_one(tmp_path: Path) -> None:
    """Once, a root user's /dev/null became a sound file."""
    wav.write_wav("/dev/null", tone(100, 24_000), 24_000)
    assert not Path("/dev/null").is_file()
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        wav.write_wav("/dev/full", tone(100, 24_000), 24_000)
    os.mkfifo(tmp_path / "pipe")
    heard = []
    thread = threading.Thread(target=lambda: heard.append((tmp_path / "pipe").read_bytes()))
    thread.start()
    wav.write_wav(tmp_path / "pipe", tone(100, 24_000), 24_000)
    thread.join()
    assert heard[0].startswith(b"RIFF")
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    wav.write_wav(tmp_path / ("x" * 251 + ".wav"), tone(100, 24_000), 24_000)
    assert len(list(tmp_path.iterdir())) == 1


def riff(rate: int, channels: int, frames: int) -> bytes:
    """A 16-bit WAV file of silence with a header of our choice."""
    data = bytes(2 * channels * frames)
    head = struct.pack("<IHHIIHH", 16, 1, channels, rate, 0, 2 * channels, 16)
    chunks = b"WAVEfmt " + head + b"data" + struct.pack("<I", len(data)) + data
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


@pytest.mark.parametrize(
    ("rate", "channels", "reason"),
    [
        (1, 1, "1 Hz"),
        (3_999, 1, "3999 Hz"),
        (768_001, 1, "768001 Hz"),
        (2**31 - 1, 1, "2147483647 Hz"),
        (0, 1, "cannot be read"),
        (24_000, 65, "65 channels"),
        (24_000, 1_024, "1024 channels"),
    ],
)
def test_headers_outside_the_bounds(tmp_path: Path, rate: int, channels: int, reason: str) -> None:
    """At 1 Hz a file of 200 KB is 9 GB at 24 kHz, which once ended the process."""
    (tmp_path / "a.wav").write_bytes(riff(rate, channels, 100))
    with pytest.raises(BadAudio, match=reason):
        wav.read_wav(tmp_path / "a.wav")


@pytest.mark.parametrize(("rate", "channels"), [(4_000, 1), (768_000, 2), (48_000, 64)])
def test_headers_at_the_bounds(tmp_path: Path, rate: int, channels: int) -> None:
    (tmp_path / "a.wav").write_bytes(riff(rate, channels, 100))
    pcm, heard = wav.read_wav(tmp_path / "a.wav")
    assert (pcm.shape, heard) == ((channels, 100), rate)


@pytest.mark.parametrize(
    ("claim", "reason"), [(2**36 - 1, "more than"), (0, "does not say"), (2**29, "cannot be read")]
)
def test_nothing_is_allocated_for_what_a_header_claims(tmp_path: Path, claim: int, reason: str) -> None:
    """A FLAC file of 200 bytes may claim 2**36 samples: 256 GiB."""
    soundfile.write(tmp_path / "a.flac", np.zeros(9_000), 24_000)
    content = bytearray((tmp_path / "a.flac").read_bytes())
    content[21] = content[21] & 0xF0 | claim >> 32  # 36 bits of STREAMINFO
    content[22:26] = (claim & 0xFFFFFFFF).to_bytes(4, "big")
    assert len(content) < 200
    (tmp_path / "a.flac").write_bytes(content)
    with memory_within(32), pytest.raises(BadAudio, match=reason):
        wav.read_wav(tmp_path / "a.flac")


def test_a_header_without_sizes_in_front_of_too_much_is_not_copied(tmp_path: Path) -> None:
    """A file of holes takes no room on a disk, and its copy all of it."""
    path = tmp_path / "holes.wav"
    soundfile.write(path, np.zeros(9), 24_000)
    data = bytearray(path.read_bytes()[:44])
    data[4:8] = data[40:44] = bytes(4)
    path.write_bytes(data)
    os.truncate(path, 2**40)
    began = time.monotonic()
    with pytest.raises(BadAudio, match="more than 4 GiB: cut it up"):
        wav.read_wav(path)
    assert time.monotonic() - began < 1


def test_what_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of silence FLAC needs next to nothing, so the samples are counted as they come."""
    soundfile.write(tmp_path / "a.flac", np.zeros((60_000, 2)), 24_000)
    assert wav.read_wav(tmp_path / "a.flac", 120_000)[0].shape == (2, 60_000)
    with pytest.raises(BadAudio, match="more than 119999 samples"):
        wav.read_wav(tmp_path / "a.flac", 119_999)
    monkeypatch.setattr(wav, "_check_header", lambda *header: None)  # a header that lies
    with pytest.raises(BadAudio, match="more than 119999 samples"):
        wav.read_wav(tmp_path / "a.flac", 119_999)


@pytest.mark.parametrize("kind", ["WAV PCM_16", "FLAC PCM_16", "OGG VORBIS", "MP3 MPEG_LAYER_III"])
def test_a_long_file_is_the_same_read_in_pieces(tmp_path: Path, kind: str) -> None:
    container, subtype = kind.split()
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (150_000, 2))  # more than one block
    soundfile.write(tmp_path / "a", noise, 44_100, format=container, subtype=subtype)
    whole, _ = soundfile.read(tmp_path / "a", dtype="float32")
    np.testing.assert_array_equal(wav.read_wav(tmp_path / "a")[0], whole.T)


def test_a_folder_is_no_sound(tmp_path: Path) -> None:
    with pytest.raises(BadAudio, match="folder"):
        wav.read_wav(tmp_path)


@pytest.mark.parametrize("kind", ["WAV PCM_16", "WAV IMA_ADPCM", "FLAC PCM_16", "OGG VORBIS", "CAF ALAC_16"])
def test_damaged_files_raise_nothing_else(tmp_path: Path, kind: str) -> None:
    container, subtype = kind.split()
    soundfile.write(tmp_path / "a", tone(3_000, 24_000), 24_000, format=container, subtype=subtype)
    refused = 0
    with memory_within(64):
        for content in mutants((tmp_path / "a").read_bytes(), 200, random.Random(11)):
            (tmp_path / "b").write_bytes(content)
            try:
                pcm, _ = wav.read_wav(tmp_path / "b")
                assert np.isfinite(pcm).all()
            except BadAudio:
                refused += 1
    assert refused > 20


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
