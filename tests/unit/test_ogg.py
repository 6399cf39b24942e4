"""Ogg against independent oracles (mutagen), real clients' streams, and hostile input."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path

import pytest
from mutagen.ogg import OggPage

from personaplex.audio import ogg
from personaplex.audio.ogg import (
    CONTINUED,
    FIRST,
    JUNK_LIMIT,
    PACKET_LIMIT,
    Head,
    OggDemuxer,
    OggMuxer,
    checksum,
)
from personaplex.errors import BadAudio, PersonaplexError, ProtocolError

DATA = Path(__file__).parents[1] / "data"
STREAMS = ["web.ogg", "mic.ogg", "webcodecs.ogg"]


def page(lacing: list[int], body: bytes, *, kind: int = 0, serial: int = 1, sequence: int = 2) -> bytes:
    """A page exactly as asked for, however wrong, with a correct CRC."""
    data = bytearray(struct.pack("<4sBBqIIIB", b"OggS", 0, kind, 0, serial, sequence, 0, len(lacing)))
    data += bytes(lacing) + body
    data[22:26] = checksum(data)
    return bytes(data)


def mutagen_pages(data: bytes) -> list[OggPage]:
    file, pages = io.BytesIO(data), []
    while file.tell() < len(data):
        pages.append(OggPage(file))
    return pages


def head(serial: int = 1, channels: int = 1, pre_skip: int = 312) -> bytes:
    packet = struct.pack("<8sBBHIhB", b"OpusHead", 1, channels, pre_skip, 24_000, 0, 0)
    return page([len(packet)], packet, kind=FIRST, serial=serial, sequence=0)


@pytest.mark.parametrize("name", STREAMS)
def test_streams_of_real_clients(name: str) -> None:
    data = (DATA / name).read_bytes()
    expected = OggPage.to_packets(mutagen_pages(data))[2:]
    demuxer = OggDemuxer()
    first, *packets = demuxer.feed(data)
    assert isinstance(first, Head)
    assert first.channels == 1
    assert first.pre_skip == (312 if name == "webcodecs.ogg" else 3840)
    assert packets == expected
    assert (demuxer.dropped_pages, demuxer.resyncs) == (0, 0)


@pytest.mark.parametrize("size", [1, 2, 27, 100, 4_096])
def test_pages_split_at_any_byte(size: int) -> None:
    data = (DATA / "web.ogg").read_bytes()[:20_000]
    demuxer = OggDemuxer()
    items = [item for start in range(0, len(data), size) for item in demuxer.feed(data[start : start + size])]
    assert items == OggDemuxer().feed(data)


def test_checksum_is_oggs_own() -> None:
    for expected in mutagen_pages((DATA / "mic.ogg").read_bytes())[:50]:
        raw = bytearray(expected.write())  # mutagen computes the CRC itself
        stored, raw[22:26] = bytes(raw[22:26]), bytes(4)
        assert checksum(raw) == stored


def test_muxed_pages_as_mutagen_reads_them() -> None:
    dice = random.Random(0)
    muxer = OggMuxer(serial=0xDEADBEEF)
    packets = [
        [dice.randbytes(dice.choice([0, 1, 80, 254, 255, 256, 510, 4_000])) for _ in range(4)]
        for _ in range(9)
    ]
    pages = muxer.headers(pre_skip=312) + [muxer.page(four, 3_840 * n) for n, four in enumerate(packets, 1)]
    read = [mutagen_pages(data) for data in pages]
    assert all(len(one) == 1 for one in read), "each message is one whole page"
    flat = [one[0] for one in read]
    assert [one.sequence for one in flat] == list(range(11))
    assert [one.first for one in flat] == [True] + [False] * 10
    assert pages[0][26] == 1, "the head's page has exactly one lacing value"
    assert {one.serial for one in flat} == {0xDEADBEEF}
    assert [one.packets for one in flat[2:]] == packets
    assert [one.position for one in flat[2:]] == [3_840 * n for n in range(1, 10)]
    assert [one.write() for one in flat] == pages, "mutagen writes the same bytes, CRC included"
    assert flat[0].packets[0][:8] == b"OpusHead"
    assert flat[1].packets[0][:8] == b"OpusTags"


def test_own_pages_come_back() -> None:
    muxer, demuxer = OggMuxer(7), OggDemuxer()
    stream = b"".join(muxer.headers(pre_skip=312)) + muxer.page([b"ab", b"", b"c" * 255], 3_840)
    assert demuxer.feed(stream) == [Head(serial=7, channels=1, pre_skip=312), b"ab", b"", b"c" * 255]


def test_packets_span_pages() -> None:
    first = page([2, 255], b"ab" + b"x" * 255)
    second = page([255], b"y" * 255, kind=CONTINUED, sequence=3)
    third = page([1, 3], b"z" + b"end", kind=CONTINUED, sequence=4)
    demuxer = OggDemuxer()
    assert demuxer.feed(first) == [b"ab"]
    assert demuxer.feed(second) == []
    assert demuxer.feed(third) == [b"x" * 255 + b"y" * 255 + b"z", b"end"]


def test_halves_of_packets_whose_other_half_is_lost_are_left_out() -> None:
    begun = page([255], b"x" * 255)
    rest = page([1, 3], b"z" + b"end", kind=CONTINUED)
    fresh = page([2], b"ab")
    assert OggDemuxer().feed(rest) == [b"end"]
    assert OggDemuxer().feed(begun + fresh + rest) == [b"ab", b"end"]
    damaged = bytearray(fresh)
    damaged[-1] ^= 1
    assert OggDemuxer().feed(begun + damaged + rest) == [b"end"]
    long_rest = page([255, 255], b"z" * 510, kind=CONTINUED)
    assert OggDemuxer().feed(long_rest + rest) == [b"end"]


def test_empty_and_absent_packets() -> None:
    assert OggDemuxer().feed(page([0, 0], b"")) == [b"", b""]
    assert OggDemuxer().feed(page([], b"")) == []
    assert OggDemuxer().feed(page([255, 0], b"x" * 255)) == [b"x" * 255]


def test_a_stream_without_headers() -> None:
    assert OggDemuxer().feed(page([2], b"ab", sequence=77)) == [b"ab"]


def test_a_chained_stream_with_a_new_serial() -> None:
    chain = head(1) + page([2], b"ab", serial=1) + head(2, pre_skip=0) + page([2], b"cd", serial=2)
    assert OggDemuxer().feed(chain) == [Head(1, 1, 312), b"ab", Head(2, 1, 0), b"cd"]


def test_a_new_serial_does_not_inherit_half_a_packet() -> None:
    assert OggDemuxer().feed(page([255], b"x" * 255) + page([1], b"y", serial=2, kind=CONTINUED)) == []


def test_junk_before_and_between_pages() -> None:
    demuxer = OggDemuxer()
    good = page([2], b"ab")
    assert demuxer.feed(b"junk Ogg OggO" + good + b"OggOggOg" + good) == [b"ab", b"ab"]
    assert demuxer.resyncs == 2
    assert demuxer.dropped_pages == 0


@pytest.mark.parametrize("split", range(1, 5))
def test_a_capture_pattern_split_after_junk(split: int) -> None:
    demuxer, good = OggDemuxer(), page([2], b"ab")
    assert demuxer.feed(b"junk" + good[:split]) + demuxer.feed(good[split:]) == [b"ab"]
    assert demuxer.resyncs == 1


def test_a_damaged_page_is_dropped_and_counted() -> None:
    good, bad = page([2], b"ab"), page([5], b"hello")
    for position in range(4, len(bad)):
        demuxer, damaged = OggDemuxer(), bytearray(bad)
        damaged[position] ^= 0x40
        # A page that claims to be longer hides its successors until it could be complete, and no longer.
        assert demuxer.feed(good + damaged + good * 600) == [b"ab"] * 601
        assert demuxer.dropped_pages == 1


@pytest.mark.parametrize("size", [256, 300, 511, 2_000])
def test_a_packet_longer_than_its_only_lacing_value(size: int) -> None:
    """As fujielab-moshi-client 0.1.2 writes whatever is longer than 255 bytes; the checksum covers it all."""
    long, good = page([255], bytes(range(256)) * 8)[:28] + bytes(size), page([2], b"ab")
    overlong = bytearray(long)
    overlong[22:26] = bytes(4)
    overlong[22:26] = checksum(overlong)
    demuxer = OggDemuxer()
    assert demuxer.feed(bytes(overlong)) == [bytes(size)]
    assert demuxer.feed(bytes(overlong) + good + bytes(overlong) * 2) == [
        bytes(size),
        b"ab",
        *[bytes(size)] * 2,
    ]
    assert (demuxer.dropped_pages, demuxer.resyncs) == (0, 0)
    overlong[-1] ^= 1
    assert demuxer.feed(bytes(overlong) + good) == [b"ab"]
    assert demuxer.dropped_pages == 1


def test_a_damaged_length_does_not_hide_the_page_behind_it() -> None:
    bad = bytearray(page([5], b"hello"))
    bad[27] = 60  # the page claims to reach into its successors
    assert OggDemuxer().feed(bytes(bad) + page([2], b"ab") * 3) == [b"ab"] * 3


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (page([3], b"abc", kind=FIRST), "not Opus"),
        (page([9], b"OpusHead\x01", kind=FIRST), "too short"),
        (head(channels=3), "3 channels"),
        (head(channels=0), "0 channels"),
    ],
)
def test_streams_that_are_not_mono_or_stereo_opus(data: bytes, complaint: str) -> None:
    with pytest.raises(BadAudio, match=complaint):
        OggDemuxer().feed(data)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("family", [1, 255])
def test_a_mapped_head_of_one_stream_is_fine(channels: int, family: int) -> None:
    """RFC 7845, section 5.1.1: the packets of one stream are the same whatever the mapping."""
    mapping = bytes([1, channels - 1, *range(channels)])
    packet = struct.pack("<8sBBHIhB", b"OpusHead", 1, channels, 312, 48_000, 0, family) + mapping
    assert OggDemuxer().feed(page([len(packet)], packet, kind=FIRST)) == [Head(1, channels, 312)]
    two = packet[:19] + bytes([2, 0, *range(channels)])
    with pytest.raises(BadAudio, match="only mono or stereo Opus"):
        OggDemuxer().feed(page([len(two)], two, kind=FIRST))


@pytest.mark.parametrize("size", [8_192, 60_000, 65_025, 200_000])
@pytest.mark.parametrize("feed", [65_600, 1_000])
def test_tags_may_be_long(size: int, feed: int) -> None:
    """A cover, for example; and no more of them is kept than of any packet."""
    tags, pages = b"OpusTags" + bytes(size), b""
    while tags:
        body, tags = tags[: 255 * 255], tags[255 * 255 :]
        laces = [255] * (len(body) // 255) + ([len(body) % 255] if len(body) < 255 * 255 else [])
        pages += page(laces, body, kind=0 if not pages else CONTINUED)
    if size + 8 == 255 * 255:
        pages += page([0], b"", kind=CONTINUED)
    data = head() + pages + page([5], b"hello")
    demuxer, items = OggDemuxer(), []
    for start in range(0, len(data), feed):
        items += demuxer.feed(data[start : start + feed])
        assert len(demuxer._partial or b"") <= PACKET_LIMIT
    assert items[1:] == [b"hello"]


def test_a_head_in_the_same_page_as_the_rest_is_understood() -> None:
    packet = head()[28:]
    data = page([len(packet), 8, 5], packet + b"OpusTags" + b"hello", kind=FIRST)
    assert OggDemuxer().feed(data)[1:] == [b"hello"]


def test_a_stereo_head_is_fine() -> None:
    assert OggDemuxer().feed(head(channels=2)) == [Head(1, 2, 312)]


def test_oversized_packets() -> None:
    body = b"x" * (255 * 33)
    with pytest.raises(ProtocolError, match="8192"):
        OggDemuxer().feed(page([255] * 33, body))
    demuxer = OggDemuxer()
    demuxer.feed(page([255] * 32, body[: 255 * 32]))
    with pytest.raises(ProtocolError, match="8192"):
        demuxer.feed(page([255], body[:255], kind=CONTINUED))


def test_a_stream_that_never_has_a_page() -> None:
    demuxer = OggDemuxer()
    for _ in range(JUNK_LIMIT // 1_000):
        assert demuxer.feed(bytes(1_000)) == []
        assert len(demuxer._buffer) < 4
    with pytest.raises(ProtocolError, match="no usable Ogg page"):
        demuxer.feed(bytes(1_000))


def test_false_headers_around_good_pages_buy_no_unlimited_checksums() -> None:
    """Once, 30 bytes of header could each cost a checksum over 64 KiB."""
    false = page([255] * 255, b"")[:26] + b"\xff" + b"\xff" * 255
    stream = (false[:40] + page([2], b"ab")) * (2 * JUNK_LIMIT // 70)
    with pytest.raises(ProtocolError, match="no usable Ogg page"):
        OggDemuxer().feed(stream)


def test_random_bytes_raise_typed_errors_in_bounded_memory() -> None:
    dice = random.Random(2)
    good = [head(), page([2], b"ab"), page([255], b"x" * 255), page([1], b"y", kind=CONTINUED)]
    for _ in range(300):
        demuxer = OggDemuxer()
        try:
            for _ in range(50):
                piece = dice.choice([*good, b"OggS", dice.randbytes(dice.randrange(300))])
                if dice.random() < 0.3:
                    spoiled = bytearray(piece)
                    for _ in range(dice.randrange(4)):
                        spoiled[dice.randrange(len(spoiled)) if spoiled else 0 : 0] = dice.randbytes(1)
                    piece = bytes(spoiled)
                for item in demuxer.feed(piece):
                    assert isinstance(item, Head) or len(item) <= PACKET_LIMIT
                assert len(demuxer._buffer) <= 65_307 + len(piece)
                assert len(demuxer._partial or b"") <= PACKET_LIMIT
        except PersonaplexError:
            continue


def test_a_cut_stream_at_every_byte() -> None:
    data = (DATA / "webcodecs.ogg").read_bytes()[:700]
    whole = OggDemuxer().feed(data)
    for cut in range(len(data)):
        demuxer = OggDemuxer()
        assert demuxer.feed(data[:cut]) + demuxer.feed(data[cut:]) == whole
        assert demuxer.resyncs == 0, ogg.__doc__
