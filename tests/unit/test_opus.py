"""Opus packets against sphn, and the arithmetic of their durations against libopus."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import opuslib.api.decoder
import pytest

from personaplex.audio.opus import OpusDecoder, OpusEncoder, packet_samples
from personaplex.audio.transcoder import Transcoder
from personaplex.errors import BadAudio, ConfigError

DATA = Path(__file__).parents[1] / "data"


def tone(samples: int, hertz: float = 440.0) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * hertz * np.arange(samples) / 24_000)).astype(np.float32)


def signal_to_noise(encoder: OpusEncoder, parts: np.ndarray) -> float:
    """dB, of what a decoder makes of the packets of `parts`, but for the first 0.2 s."""
    decoder = OpusDecoder()
    heard = np.stack([decoder.decode(encoder.encode(part)).copy() for part in parts])
    assert heard.shape == parts.shape
    assert heard.dtype == np.float32
    delayed = heard.reshape(-1)[encoder.lookahead :]
    said = parts.reshape(-1)[: len(delayed)]
    return float(10 * np.log10(np.var(said[4_800:]) / np.var((delayed - said)[4_800:])))


def test_a_tone_survives() -> None:
    assert signal_to_noise(OpusEncoder(), tone(24_000).reshape(-1, 480)) > 20


def test_lookahead_in_samples_at_24_khz() -> None:
    assert OpusEncoder().lookahead == 60  # 2.5 ms


@pytest.mark.parametrize("samples", [60, 120, 240, 480, 960, 1_440, 2_880])
def test_every_duration_an_encoder_makes(samples: int) -> None:
    encoder, decoder = OpusEncoder(), OpusDecoder()
    packet = encoder.encode(tone(samples))
    assert packet_samples(packet) == samples
    assert len(decoder.decode(packet)) == samples


def test_encoder_takes_any_float_layout() -> None:
    wide = np.stack([tone(480), tone(480)], axis=1).astype(np.float64)
    assert OpusEncoder().encode(wide[:, 0]) == OpusEncoder().encode(tone(480))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_samples_that_are_not_sound_do_not_spoil_what_follows(value: float) -> None:
    encoder, decoder = OpusEncoder(), OpusDecoder()
    decoder.decode(encoder.encode(np.full(480, value, np.float32)))
    for part in tone(4_800).reshape(-1, 480):
        heard = decoder.decode(encoder.encode(part))
        assert np.isfinite(heard).all()
    assert np.abs(heard).max() > 0.2


def test_speech_is_closer_than_at_a_lower_bitrate_with_more_work() -> None:
    spoken = np.concatenate(Transcoder().receive((DATA / "mic.ogg").read_bytes())).reshape(-1, 480)
    assert signal_to_noise(OpusEncoder(), spoken) > signal_to_noise(OpusEncoder(32_000, 5), spoken) + 2


@pytest.mark.parametrize("bitrate", [32_000, 48_000])
def test_bitrate_is_kept(bitrate: int) -> None:
    encoder, dice = OpusEncoder(bitrate), np.random.default_rng(0)
    noise = dice.normal(0, 0.1, (100, 480)).astype(np.float32)
    size = sum(len(encoder.encode(part)) for part in noise)
    assert 0.8 * bitrate / 4 < size < 1.2 * bitrate / 4  # two seconds


def test_refused_settings() -> None:
    with pytest.raises(ConfigError, match="complexity 11"):
        OpusEncoder(complexity=11)


def test_packet_samples_agrees_with_libopus_on_every_beginning() -> None:
    state = opuslib.api.decoder.create_state(24_000, 1)
    count = opuslib.api.decoder.libopus_get_nb_samples
    for toc in range(256):
        for second in range(256):
            packet = bytes([toc, second, 0, 0])
            expected = count(state, packet, len(packet))
            if expected > 0:
                assert packet_samples(packet) == expected
            else:
                with pytest.raises(BadAudio):
                    packet_samples(packet)
    opuslib.api.decoder.destroy(state)


@pytest.mark.parametrize("packet", [b"", b"\x03"])
def test_packets_too_short_to_have_a_duration(packet: bytes) -> None:
    with pytest.raises(BadAudio):
        packet_samples(packet)


def test_corrupt_packets_are_told_from_good_ones() -> None:
    decoder = OpusDecoder()
    with pytest.raises(BadAudio, match="corrupt"):
        decoder.decode(b"\x03\x3f")


def test_concealment_lasts_as_long_as_asked() -> None:
    encoder, decoder = OpusEncoder(), OpusDecoder()
    for part in tone(4_800).reshape(-1, 480):
        decoder.decode(encoder.encode(part))
    lost = decoder.conceal(480).copy()
    assert lost.shape == (480,)
    assert np.abs(lost).max() > 0.1, "concealment goes on with the tone, it is not silence"
    assert len(decoder.conceal(2_880)) == 2_880


def test_stereo_is_mixed_down() -> None:
    import opuslib

    encoder = opuslib.Encoder(24_000, 2, opuslib.APPLICATION_AUDIO)
    decoder = OpusDecoder()
    left = tone(48_000, 300)
    pairs = np.stack([left, np.zeros_like(left)], axis=1)
    heard = np.concatenate(
        [
            decoder.decode(encoder.encode_float(part.tobytes(), 480)).copy()
            for part in pairs.reshape(-1, 480, 2)
        ]
    )
    assert np.std(heard[9_600:]) == pytest.approx(np.std(left) / 2, rel=0.05)


def test_random_packets_only_ever_raise_bad_audio() -> None:
    dice, decoder = np.random.default_rng(3), OpusDecoder()
    for _ in range(3_000):
        packet = dice.bytes(int(dice.integers(1, 60)))
        try:
            pcm = decoder.decode(packet)
        except BadAudio:
            continue
        assert len(pcm) == packet_samples(packet)
        assert np.isfinite(pcm).all()


def test_codecs_give_their_memory_back() -> None:
    """libopus states are about 40 KB; a leak of 3000 would be 120 MB."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3_000):
        OpusEncoder()
        OpusDecoder()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # KiB


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-W", "error", "-B", "-c", textwrap.dedent(code)]
    return subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)


def test_a_missing_library_is_named() -> None:
    done = run_python(
        """
        import ctypes.util
        ctypes.util.find_library = lambda name: None
        from personaplex.errors import ConfigError
        try:
            import personaplex.audio.opus
        except ConfigError as error:
            print(error)
        """
    )
    assert "install libopus0" in done.stdout, done.stderr


def test_importing_opus_is_silent_under_warnings_as_errors() -> None:
    """opuslib's source makes the compiler warn; with its bytecode out of reach it does so at every import."""
    done = run_python(
        """
        import sys
        sys.pycache_prefix = "/nonexistent"
        import personaplex.audio.opus
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_ctypes_releases_the_interpreter() -> None:
    assert isinstance(opuslib.api.libopus, ctypes.CDLL), "CDLL calls run without the interpreter lock"
