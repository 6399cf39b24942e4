"""Whole sessions of audio: streams of real clients, our own pages heard by others, damage and hostility."""

from __future__ import annotations

import collections
import random
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soxr
import sphn

from personaplex.audio.ogg import FIRST, OggDemuxer, OggMuxer, checksum, page_number
from personaplex.audio.opus import OpusEncoder, packet_samples
from personaplex.audio.transcoder import (
    CONCEAL_LIMIT_S,
    LEAD_SPARE_S,
    NOT_OGG_AFTER_S,
    SAVED_S,
    Transcoder,
)
from personaplex.config import BURST_S, FRAME_SIZE
from personaplex.errors import BadAudio, PersonaplexError, ProtocolError

DATA = Path(__file__).parents[1] / "data"
PRE_SKIP = 2 * OpusEncoder().lookahead  # Ogg counts at 48 kHz


def speech(seconds: float = 4.0) -> np.ndarray:
    """What mic.ogg says: float32 at 24 kHz, whole frames."""
    frames = Transcoder().receive((DATA / "mic.ogg").read_bytes())
    return np.concatenate(frames[: int(seconds * 12.5)])


def frames_of(pcm: np.ndarray) -> np.ndarray:
    return pcm[: len(pcm) // 1_920 * 1_920].reshape(-1, 1_920)


def packets_of(pcm: np.ndarray, samples: int = 480) -> list[bytes]:
    encoder = OpusEncoder()
    return [encoder.encode(pcm[start : start + samples]) for start in range(0, len(pcm), samples)]


def stream(pages: Sequence[Sequence[bytes]], *, serial: int = 1, pre_skip: int = 0) -> list[bytes]:
    muxer = OggMuxer(serial)
    return [*muxer.headers(pre_skip), *(muxer.page(packets, 0) for packets in pages)]


def similarity(heard: np.ndarray, said: np.ndarray, delay: int) -> float:
    """Correlation of what was heard with what was said `delay` samples before, away from both ends."""
    count = min(len(heard) - delay, len(said)) - 4_800
    return float(np.corrcoef(heard[delay + 2_400 : delay + count], said[2_400:count])[0, 1])


@pytest.mark.parametrize("name", ["web.ogg", "mic.ogg", "webcodecs.ogg"])
def test_real_clients_sound_as_sphn_hears_them(name: str) -> None:
    transcoder = Transcoder()
    heard = np.concatenate(transcoder.receive((DATA / name).read_bytes()))
    reference, rate = sphn.read_opus(str(DATA / name))  # decodes at 48 kHz and keeps the pre-skip
    expected = soxr.resample(reference[0], rate, 24_000)
    skipped = {"web.ogg": 1_920, "mic.ogg": 1_920, "webcodecs.ogg": 156}[name]
    assert similarity(expected, heard, skipped) > 0.9999
    assert len(expected) - skipped - len(heard) < 1_920, "all but a begun frame was delivered"
    assert transcoder.counters.concealed == 0


def test_pieces_of_any_size_give_the_same_frames() -> None:
    data = (DATA / "webcodecs.ogg").read_bytes()
    whole = Transcoder().receive(data)
    dice, transcoder, frames, start = random.Random(0), Transcoder(), [], 0
    while start < len(data):
        size = dice.randrange(1, 700)
        frames += transcoder.receive(data[start : start + size])
        start += size
    assert np.array_equal(np.stack(frames), np.stack(whole))


def test_our_stream_as_sphn_hears_it(tmp_path: Path) -> None:
    said, transcoder = speech(), Transcoder()
    pages = transcoder.headers() + [transcoder.send(frame) for frame in frames_of(said)]
    (tmp_path / "ours.ogg").write_bytes(b"".join(pages))
    reference, rate = sphn.read_opus(str(tmp_path / "ours.ogg"))
    heard = soxr.resample(reference[0], rate, 24_000)
    assert similarity(heard, said, 60) > 0.97
    reader = sphn.OpusStreamReader(24_000)  # what the stock Python client plays with
    live = np.concatenate([reader.append_bytes(page) for page in pages])
    assert len(live) == len(said)


def test_our_stream_as_we_hear_it_has_no_delay() -> None:
    said, transcoder = speech(), Transcoder()
    pages = transcoder.headers() + [transcoder.send(frame) for frame in frames_of(said)]
    heard = np.concatenate([frame for page in pages for frame in transcoder.receive(page)])
    assert similarity(heard, said, 0) > 0.97


def test_sphns_stream_as_we_hear_it() -> None:
    said, writer, transcoder = speech(), sphn.OpusStreamWriter(24_000), Transcoder()
    pieces = [writer.append_pcm(frame) for frame in frames_of(said)]
    heard = np.concatenate([frame for piece in pieces for frame in transcoder.receive(piece)])
    # sphn declares a pre-skip of 80 ms and codes with a look-ahead of 6.5 ms: its first 73.5 ms are lost.
    assert similarity(said, heard, 1_920 - 156) > 0.85


@pytest.mark.parametrize("samples", [60, 120, 240, 480, 960, 1_440, 2_880])
def test_packets_of_every_duration(samples: int) -> None:
    said = speech(2.88)
    pages = stream([[packet] for packet in packets_of(said, samples)], pre_skip=PRE_SKIP)
    transcoder = Transcoder()
    heard = np.concatenate(transcoder.receive(b"".join(pages)))
    assert transcoder.counters.concealed == 0
    assert similarity(heard, said, 0) > 0.9


def test_pre_skip_is_discarded_once_per_stream() -> None:
    packets = packets_of(speech(1.6))
    bare = np.concatenate(Transcoder().receive(b"".join(stream([packets], pre_skip=0))))
    skipped = np.concatenate(Transcoder().receive(b"".join(stream([packets], pre_skip=2_000))))
    assert np.array_equal(skipped, bare[1_000 : 1_000 + len(skipped)])


def test_a_stream_without_headers() -> None:
    packets = packets_of(speech(1.6))
    pages = stream([packets])
    assert np.array_equal(
        np.stack(Transcoder().receive(pages[2])), np.stack(Transcoder().receive(b"".join(pages)))
    )


def test_a_chained_stream_starts_afresh() -> None:
    packets = packets_of(speech(1.6))
    transcoder = Transcoder()
    first = transcoder.receive(b"".join(stream([packets], serial=1)))
    second = transcoder.receive(b"".join(stream([packets], serial=2)))
    assert np.array_equal(np.stack(first), np.stack(second)), "the second stream's decoder knows no first"
    assert transcoder.counters.streams == 2


def test_a_new_stream_may_begin_as_often_as_a_client_likes() -> None:
    """A recorder restarted at each unmute, or a whole file for each piece. Once, the ninth was the end."""
    packets = packets_of(speech(0.8))
    now = 0.0
    transcoder = Transcoder(clock=lambda: now)
    for serial in range(200):
        frames = transcoder.receive(b"".join(stream([packets], serial=serial)))
        assert len(frames) == 10
        now += 0.8
    assert transcoder.counters.streams == 200


def test_a_head_costs_no_decoder() -> None:
    """So that a flood of them costs a client's bytes, and the service nothing."""
    transcoder, heads = Transcoder(), stream([], serial=1)[0] * 20_000
    began = time.process_time()
    transcoder.receive(heads)
    assert transcoder.counters.streams == 20_000
    assert time.process_time() - began < 2.0, "a decoder each takes four times that, and megabytes"


@pytest.mark.parametrize("gain", [-24, -12, 0, 6])
def test_the_output_gain_of_the_head_is_applied(gain: int) -> None:
    tone = (0.1 * np.sin(2 * np.pi * 220 * np.arange(19_200) / 24_000)).astype(np.float32)
    plain = np.concatenate(Transcoder().receive(b"".join(with_gain(tone, 0))))
    heard = np.concatenate(Transcoder().receive(b"".join(with_gain(tone, gain))))
    ratio = np.linalg.norm(heard[4_800:]) / np.linalg.norm(plain[4_800:])
    assert 20 * np.log10(ratio) == pytest.approx(gain, abs=0.05)


def test_gain_is_of_its_stream_and_never_leaves_full_scale() -> None:
    tone = (0.1 * np.sin(2 * np.pi * 220 * np.arange(19_200) / 24_000)).astype(np.float32)
    transcoder = Transcoder()
    loud = np.concatenate(transcoder.receive(b"".join(with_gain(tone, 127, serial=1))))
    assert np.isfinite(loud).all()
    assert np.abs(loud).max() == 1.0
    after = transcoder.receive(b"".join(with_gain(tone, 0, serial=2)))
    alone = Transcoder().receive(b"".join(with_gain(tone, 0, serial=2)))
    assert np.array_equal(np.stack(after[1:]), np.stack(alone[1:]))


def with_gain(pcm: np.ndarray, gain: int, serial: int = 1) -> list[bytes]:
    """Pages of `pcm` whose head asks for `gain` dB."""
    head, *pages = stream([packets_of(pcm)], serial=serial)
    spoiled = bytearray(head)
    at = spoiled.find(b"OpusHead") + 16
    spoiled[at : at + 2] = (256 * gain).to_bytes(2, "little", signed=True)
    spoiled[22:26] = bytes(4)
    spoiled[22:26] = checksum(spoiled)
    return [bytes(spoiled), *pages]


FILES = {
    "WebM": b"\x1aE\xdf\xa3\x9fB\x86\x81\x01B\xf7\x81\x01B\xf2\x81\x04webm",
    "MP4": b"\x00\x00\x00\x1cftypiso5\x00\x00\x02\x00iso5iso6mp41",
    "WAV": b"RIFF$\x00\x00\x80WAVEfmt \x10\x00\x00\x00",
    "FLAC": b"fLaC\x00\x00\x00\x22",
    "MP3": b"ID3\x04\x00\x00\x00\x00\x00\x23",
}


@pytest.mark.parametrize("step", [1, 3, 1_000])
@pytest.mark.parametrize("kind", FILES)
def test_what_is_no_ogg_is_named_by_its_first_bytes(kind: str, step: int) -> None:
    data = FILES[kind] + bytes(100)
    pieces = [data[start : start + step] for start in range(0, len(data), step)]
    with pytest.raises(BadAudio, match=f"this is {kind}; send Ogg Opus"):
        collections.deque(map(Transcoder().receive, pieces))


def test_a_recorder_that_changes_its_format_is_named_too() -> None:
    transcoder = Transcoder()
    assert len(transcoder.receive(b"".join(stream([packets_of(speech(0.8))])))) == 10
    with pytest.raises(BadAudio, match="this is WebM"):
        transcoder.receive(FILES["WebM"])


@pytest.mark.parametrize("size", [3, 40, 1_920])
def test_raw_audio_is_named_within_a_second(size: int) -> None:
    now, dice = 50.0, random.Random(1)
    transcoder = Transcoder(clock=lambda: now)
    now = 90.0  # it may be silent for as long as it likes
    transcoder.receive(dice.randbytes(size) + b"abcd")
    now += NOT_OGG_AFTER_S - 0.01
    transcoder.receive(dice.randbytes(size))
    now += 0.01
    with pytest.raises(BadAudio, match=r"no Ogg page \(raw PCM\?\); send Ogg Opus"):
        transcoder.receive(b"")


def test_a_page_that_takes_its_time_is_still_ogg() -> None:
    """Pages of five seconds in small pieces behind the end of one that was joined late, the first damaged."""
    now, heard = 0.0, 0
    packets = packets_of(speech(4.8))
    pages = stream([packets, packets, packets])
    damaged = bytearray(pages[2])
    damaged[500] ^= 1
    transcoder = Transcoder(clock=lambda: now)
    transcoder.receive(pages[2][-700:])
    data = b"".join([*pages[:2], bytes(damaged), *pages[3:]])
    for start in range(0, len(data), 1_000):
        now += 0.3
        heard += len(transcoder.receive(data[start : start + 1_000]))
    assert heard == 120


def test_a_packet_of_ours_is_a_page() -> None:
    """Some clients take all that is in a page for one packet."""
    sender = Transcoder()
    *headers, page = [*sender.headers(), sender.send(speech(0.08))]
    _, packet = (item for item in OggDemuxer().feed(b"".join([*headers, page])))
    assert isinstance(packet, bytes)
    assert packet_samples(packet) == 1_920
    assert page.endswith(packet)


def test_a_corrupt_packet_is_concealed_for_the_duration_of_the_last() -> None:
    said = speech(1.6)
    packets = packets_of(said, 960)
    damaged = [*packets[:10], b"\xff\x3f\xff", *packets[11:]]
    transcoder = Transcoder()
    heard = np.concatenate(transcoder.receive(b"".join(stream([damaged], pre_skip=PRE_SKIP))))
    clean = np.concatenate(Transcoder().receive(b"".join(stream([packets], pre_skip=PRE_SKIP))))
    assert len(heard) == len(clean)
    assert transcoder.counters.concealed == 1
    assert np.array_equal(heard[: 9 * 960], clean[: 9 * 960])
    assert similarity(heard, said, 0) > 0.8


def test_an_empty_packet_is_concealed_for_the_duration_of_the_last() -> None:
    """Once, libopus concealed as much as its buffer held: 5 s of audio from a page of 28 bytes."""
    packets = packets_of(speech(0.8), 240)
    transcoder = Transcoder()
    frames = transcoder.receive(b"".join(stream([[*packets[:40], b"", *packets[40:]]])))
    rest = transcoder.flush()
    assert rest is not None
    assert len(frames) == 10
    assert not rest[240:].any()
    assert transcoder.counters.concealed == 1


def test_a_stream_that_begins_with_an_empty_packet() -> None:
    transcoder = Transcoder()
    transcoder.receive(b"".join(stream([[b""]])))
    rest = transcoder.flush()
    assert rest is not None
    assert not rest[480:].any()


def test_endless_concealment_is_not_a_conversation() -> None:
    transcoder = Transcoder()
    pages = stream([packets_of(speech(0.8)), [b""] * 99, [b""]])
    transcoder.receive(b"".join(pages[:-1]))
    assert CONCEAL_LIMIT_S / 0.02 > 99
    transcoder.receive(pages[-1])
    with pytest.raises(BadAudio, match="nothing could be decoded for 2 s"):
        transcoder.receive(pages[-1])


def test_audio_faster_than_real_time() -> None:
    now = 100.0
    transcoder = Transcoder(clock=lambda: now)
    packets = packets_of(speech(1.6))
    header, tags, *pages = stream([packets] * 20)
    transcoder.receive(header + tags)
    for page in pages[:6]:
        transcoder.receive(page)
    assert BURST_S + LEAD_SPARE_S > 6 * 1.6
    with pytest.raises(ProtocolError, match="faster than real time"):
        transcoder.receive(pages[6])


def test_audio_in_real_time_may_go_on_for_ever() -> None:
    now = 100.0
    transcoder = Transcoder(clock=lambda: now)
    packets = packets_of(speech(1.6))
    for page in stream([packets] * 20):
        transcoder.receive(page)
        now += 1.6
    assert transcoder.counters.frames_in == 20 * 20


def test_silence_is_made_up_for_but_an_hour_of_it_is_not() -> None:
    """Once, all that a peer had not sent could come at once: after an hour 12 s of work for a gateway."""
    now = 100.0
    transcoder = Transcoder(clock=lambda: now)
    empty = stream([[b"\x19"] * 250])[2]  # packets of 120 ms without content: 30 s
    transcoder.receive(b"".join(stream([packets_of(speech(1.6))])))
    now += 25.0
    transcoder.receive(empty)  # a phone that slept
    now += 3_600.0
    for _ in range(int((BURST_S + LEAD_SPARE_S + SAVED_S) / 30)):
        transcoder.receive(empty)
    with pytest.raises(ProtocolError, match="faster than real time"):
        transcoder.receive(empty)


def test_a_sound_card_whose_clock_is_fast_may_go_on_for_ever() -> None:
    """Once, 0.5 % of it ended a session after half an hour."""
    now = 0.0
    transcoder = Transcoder(clock=lambda: now)
    packets = packets_of(speech(1.6))
    header, tags, page = stream([packets])
    transcoder.receive(header + tags)
    for _ in range(400):
        transcoder.receive(page)
        now += 1.6 / 1.02
    assert BURST_S + LEAD_SPARE_S < 400 * 1.6 * 0.02
    assert transcoder.counters.frames_in == 400 * 20


def test_damage_in_real_time_may_go_on_for_ever() -> None:
    """Once, a corrupt packet counted twice: with 5 % of them a session ended after 200 s."""
    now = 100.0
    transcoder = Transcoder(clock=lambda: now)
    packets = packets_of(speech(1.6))
    for position in range(0, len(packets), 4):
        packets[position] = packets[position][:1] + b"\xff" * 1_300  # 20 ms by its first byte, and too long
    for page in stream([packets[:40], packets[40:]] * 40):
        transcoder.receive(page)
        now += 0.8
    assert transcoder.counters.concealed == 40 * len(packets) / 4
    assert transcoder.counters.frames_in == 40 * 20


def test_a_small_page_cannot_claim_minutes_of_work() -> None:
    """255 one-byte packets of 60 ms with code 3 and two frames: 30 s of audio from 600 bytes."""
    transcoder = Transcoder(clock=lambda: 0.0)
    page = stream([[b"\x1b\x02"] * 127])[2]
    with pytest.raises(ProtocolError, match="faster than real time"):
        transcoder.receive(page)
    assert transcoder.counters.packets <= (BURST_S + LEAD_SPARE_S) / 0.12 + 1


def test_not_opus() -> None:
    with pytest.raises(BadAudio, match="not Opus"):
        Transcoder().receive(vorbis_page())


def vorbis_page() -> bytes:
    page = bytearray(OggMuxer(1).page([b"\x01vorbis"], 0))
    page[5] = FIRST
    page[22:26] = bytes(4)
    page[22:26] = checksum(page)
    return bytes(page)


def test_spoiled_streams_only_ever_raise_typed_errors() -> None:
    dice, data = random.Random(4), (DATA / "web.ogg").read_bytes()[:6_000]
    refused = 0
    for _ in range(60):
        spoiled = bytearray(data)
        for _ in range(dice.randrange(1, 30)):
            spoiled[dice.randrange(len(spoiled))] = dice.randrange(256)
        transcoder = Transcoder(clock=lambda: 0.0)
        try:
            for frame in transcoder.receive(bytes(spoiled)):
                assert frame.shape == (1_920,)
                assert np.isfinite(frame).all()
        except PersonaplexError:
            refused += 1
    assert refused < 60, "most damage costs a page, not the session"


def test_packets_of_noise_in_good_pages() -> None:
    dice = random.Random(5)
    for _ in range(40):
        transcoder = Transcoder(clock=lambda: 0.0)
        noise = [dice.randbytes(dice.randrange(80)) for _ in range(50)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                frames = transcoder.receive(b"".join(stream([noise])))
            except PersonaplexError:
                continue
        assert all(np.isfinite(frame).all() for frame in frames)


def test_a_stream_that_goes_on_counts_on() -> None:
    """A resumed session's stream is a new one for its reader, whose pages say how much went before."""
    whole, rest = Transcoder(serial=1), Transcoder(serial=2, frames_before=3)
    silence = np.zeros(FRAME_SIZE, np.float32)
    pages = [whole.send(silence) for _ in range(5)]
    more = [rest.send(silence) for _ in range(2)]
    assert [page_number(page) for page in pages] == [0, 1, 2, 3, 4]
    assert [page_number(page) for page in more] == [3, 4]
    assert [page[6:14] for page in more] == [page[6:14] for page in pages[3:]], "granules"
    assert all(page_number(page) < 0 for page in (*rest.headers(), b"", b"OggS", b"x" * 100))
    reader = Transcoder()
    assert len(reader.receive(b"".join([*rest.headers(), *more]))) == 1, "it needs nothing from before"
