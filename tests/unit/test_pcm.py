"""Uncompressed audio: G.711's tables, the resampler's response and delay, frames in and out."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from personaplex.audio.g711 import A_LAW, MU_LAW
from personaplex.audio.pcm import PcmFormat, PcmTranscoder
from personaplex.audio.resample import DELAY_S, Resampler
from personaplex.config import FRAME_SIZE, SAMPLE_RATE, Pcm
from personaplex.errors import BadAudio, ProtocolError

EVERY_SAMPLE = np.arange(-32_768, 32_768).astype(np.int16)
EVERY_CODE = bytes(range(256))
PAIRS = [
    (8_000, 24_000),
    (24_000, 8_000),
    (16_000, 24_000),
    (24_000, 16_000),
    (48_000, 24_000),
    (24_000, 48_000),
]


def tone(frequency: float, rate: int, seconds: float = 0.5) -> Pcm:
    return np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate).astype(np.float32)


# G.711


def test_both_laws_agree_with_pythons_own_where_it_still_has_one() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        audioop = pytest.importorskip("audioop", reason="Python 3.13 has none")
    linear = EVERY_SAMPLE.tobytes()
    assert MU_LAW.decode(EVERY_CODE).tobytes() == audioop.ulaw2lin(EVERY_CODE, 2)
    assert A_LAW.decode(EVERY_CODE).tobytes() == audioop.alaw2lin(EVERY_CODE, 2)
    assert MU_LAW.encode(EVERY_SAMPLE) == audioop.lin2ulaw(linear, 2)
    assert A_LAW.encode(EVERY_SAMPLE) == audioop.lin2alaw(linear, 2)


@pytest.mark.parametrize("law", [MU_LAW, A_LAW])
def test_a_decoded_sample_keeps_its_value_and_codes_are_in_order(law: object) -> None:
    assert isinstance(law, type(MU_LAW))
    values = law.decode(EVERY_CODE)
    assert np.array_equal(law.decode(law.encode(values)), values)
    heard = law.decode(law.encode(EVERY_SAMPLE)).astype(int)
    assert np.all(np.diff(heard) >= 0)
    assert np.all(np.abs(heard - EVERY_SAMPLE) <= np.maximum(24, np.abs(EVERY_SAMPLE.astype(int)) * 0.05))


def test_silence_is_silent() -> None:
    assert MU_LAW.silence == 0xFF
    assert A_LAW.silence == 0xD5
    assert np.abs(MU_LAW.decode(b"\xff")).max() == 0
    assert np.abs(A_LAW.decode(b"\xd5")).max() == 8


# The resampler


@pytest.mark.parametrize(("rate_in", "rate_out"), PAIRS)
def test_a_stream_in_pieces_equals_the_whole(rate_in: int, rate_out: int) -> None:
    noise = np.random.default_rng(1).standard_normal(rate_in // 2).astype(np.float32)
    whole = Resampler(rate_in, rate_out).push(noise)
    assert len(whole) == len(noise) * rate_out // rate_in
    cuts = np.sort(np.random.default_rng(2).integers(0, len(noise), 60))
    resampler = Resampler(rate_in, rate_out)
    pieces = np.concatenate([resampler.push(piece) for piece in np.split(noise, cuts)])
    np.testing.assert_allclose(pieces, whole, atol=1e-5)


@pytest.mark.parametrize(("rate_in", "rate_out"), PAIRS)
def test_a_tone_comes_out_whole_and_2_ms_late(rate_in: int, rate_out: int) -> None:
    heard = Resampler(rate_in, rate_out).push(tone(1_000, rate_in))
    expected = np.sin(2 * np.pi * 1_000 * (np.arange(len(heard)) / rate_out - DELAY_S))
    late = round(2 * DELAY_S * rate_out)
    np.testing.assert_allclose(heard[late:], expected[late:], atol=0.01)


def level_db(pcm: Pcm) -> float:
    return 20 * float(np.log10(np.sqrt(2 * np.mean(pcm[1_000:] ** 2)) + 1e-12))


def test_the_telephones_band_passes_and_its_mirror_does_not() -> None:
    assert level_db(Resampler(24_000, 8_000).push(tone(3_400, 24_000))) > -0.7
    assert level_db(Resampler(24_000, 8_000).push(tone(4_450, 24_000))) < -60  # would be heard at 3550 Hz
    up = Resampler(8_000, 24_000).push(tone(3_300, 8_000))
    spectrum = np.abs(np.fft.rfft(up[1_000:9_000] * np.hanning(8_000)))
    mirror = spectrum[round(4_700 * 8_000 / 24_000)]
    assert 20 * np.log10(mirror / spectrum.max()) < -60


# Frames


@pytest.mark.parametrize("size", [2, 960, 3_840, 4_800, 7_000])
def test_16_bit_audio_at_the_models_rate_passes_unchanged(size: int) -> None:
    samples = np.random.default_rng(3).integers(-32_768, 32_768, 4 * FRAME_SIZE).astype("<i2")
    data, transcoder = samples.tobytes(), PcmTranscoder()
    frames = [frame for at in range(0, len(data), size) for frame in transcoder.receive(data[at : at + size])]
    assert b"".join(map(transcoder.send, frames)) == data
    assert (transcoder.counters.frames_in, transcoder.counters.frames_out) == (4, 4)


@pytest.mark.parametrize("rate", [8_000, 16_000, 24_000, 48_000])
@pytest.mark.parametrize("encoding", ["pcm16", "mulaw", "alaw"])
def test_every_frame_is_a_frames_length_in_any_format(encoding: str, rate: int) -> None:
    form = PcmFormat(encoding, rate)  # type: ignore[arg-type]
    transcoder = PcmTranscoder()
    transcoder.set_formats(form, form)
    heard = transcoder.receive(form.encode((8_000 * tone(500, rate, 0.8)).astype(np.int16)))
    assert len(heard) == 10
    pages = [transcoder.send(frame) for frame in heard]
    assert [len(page) for page in pages] == [form.frame_bytes] * 10
    assert 20 * np.log10(np.std(form.samples(pages[5]).astype(float)) / (8_000 / np.sqrt(2))) > -0.5


def test_samples_beyond_full_scale_are_clipped() -> None:
    page = PcmTranscoder().send(np.full(FRAME_SIZE, 1.5, np.float32))
    assert np.frombuffer(page, "<i2").max() == 32_767


def test_half_a_sample_is_refused() -> None:
    with pytest.raises(BadAudio, match="even"):
        PcmTranscoder().receive(b"\0\0\0")


def test_audio_keeps_to_real_time() -> None:
    now = 0.0
    transcoder = PcmTranscoder(clock=lambda: now, burst_s=6.0)
    second = bytes(2 * SAMPLE_RATE)
    for _ in range(10):
        transcoder.receive(second)
    with pytest.raises(ProtocolError, match="real time"):
        transcoder.receive(second)
    now = 2.0  # the second too much is owed
    transcoder.receive(second)
