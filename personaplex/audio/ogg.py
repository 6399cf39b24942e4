"""Ogg pages carrying one Opus stream: an incremental demuxer and a whole-page muxer (RFC 3533, RFC 7845).

Knows bytes, no audio. The demuxer reads what untrusted peers send. It holds at most one page and one
unfinished packet, none of whose tags are kept, however long (cover art), and it trusts neither granule
positions nor sequence numbers, because real clients get both wrong.
The muxer writes what the strictest known decoder accepts: every call gives exactly one whole page, OpusHead
is page 0 with a single lacing value, OpusTags is page 1, audio starts at page 2.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from personaplex.errors import BadAudio, ProtocolError

CAPTURE = b"OggS"
HEADER_PAGES = 2  # OpusHead and OpusTags
CONTINUED, FIRST, LAST = 1, 2, 4  # bits of a page's header type
PACKET_LIMIT = 8_192  # bytes; the longest legal Opus packet (120 ms at 510 kb/s) has 7650
OUTPUT_PACKET_LIMIT = 4_000  # bytes; the buffer of the reference's web decoder
JUNK_LIMIT = 131_072  # bytes read in vain before the peer is refused; two pages of the largest size

# How files of other kinds begin, and from which byte on: what senders take for Ogg.
FOREIGN = (
    ("WebM", 0, b"\x1aE\xdf\xa3"),
    ("WebM", 0, b"\x1fC\xb6u"),  # a cluster: one that joined a recording under way
    ("MP4", 4, b"ftyp"),
    ("WAV", 0, b"RIFF"),
    ("FLAC", 0, b"fLaC"),
    ("MP3", 0, b"ID3"),
)
_STRAY_BYTES = max(at + len(magic) for _, at, magic in FOREIGN)

_HEADER = struct.Struct("<4sBBqIIIB")  # capture, version, type, granule, serial, sequence, CRC, lacing values
_HEAD = struct.Struct("<8sBBHIhB")  # "OpusHead", version, channels, pre-skip, input rate, gain, family
_REVERSED_BITS = bytes(int(f"{value:08b}"[::-1], 2) for value in range(256))
_NO_CRC = bytes(4)
_TAGS = b"OpusTags"
_VENDOR = b"personaplex"


@dataclass(frozen=True)
class Head:
    """Start of a logical stream.

    `pre_skip` is the number of 48 kHz samples to discard at its beginning, `gain` what to add to its
    loudness, in 1/256 dB.
    """

    serial: int
    channels: int
    pre_skip: int
    gain: int = 0


def checksum(page: bytes | bytearray) -> bytes:
    """The four CRC bytes of `page` (whose CRC field is zero) as they stand in the page.

    Ogg's CRC takes the most significant bit first, zlib's the least; with the bits of every byte reversed the
    two are one function, up to zlib's inversions before and after.
    """
    crc = zlib.crc32(page.translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return crc.to_bytes(4, "big").translate(_REVERSED_BITS)


class OggDemuxer:
    """Cuts a byte stream, in pieces of any size, into Opus packets.

    `dropped_pages` counts pages with a wrong CRC, `resyncs` how often bytes had to be skipped to find a page.
    `astray` is true while the newest bytes belong to nothing that looks like a page, damaged ones included.
    After an error the demuxer must not be used again.
    """

    def __init__(self) -> None:
        self.dropped_pages = 0
        self.resyncs = 0
        self._buffer = bytearray()
        self._in_sync = True
        self._junk = 0
        self._stray = bytearray()  # how bytes begin in which no page was found yet
        self._damaged = False  # the last page was: what follows it may be its rest
        self._serial: int | None = None
        self._partial: bytearray | None = None

    def feed(self, data: bytes) -> list[Head | bytes]:
        """Stream heads and packets (possibly of 0 bytes) completed by `data`, in order; tags are left out.

        Raises ProtocolError for a packet over PACKET_LIMIT and for a stream that goes on without usable
        pages, BadAudio for a stream that is not mono or stereo Opus and for files of another kind (FOREIGN).
        """
        self._buffer += data
        items: list[Head | bytes] = []
        position = 0
        while (start := self._find(position)) is not None:
            size = self._page_size(start)
            if size is None or start + size > len(self._buffer):
                position = start
                break
            if self._is_intact(start, size):
                self._read_page(start, items)
                position = start + size
            elif (packet := self._overlong_packet(start)) is not None:
                self._take(packet, bool(self._buffer[start + 5] & FIRST), items)
                position = start + _HEADER.size + 1 + len(packet)
            else:
                self._drop_page(size)
                position = start + len(CAPTURE)
                continue
            self._in_sync, self._damaged = True, False
            self._junk = max(0, self._junk - (position - start))
        else:
            position = max(position, len(self._buffer) - len(CAPTURE) + 1)
        del self._buffer[:position]
        self._refuse_foreign()
        return items

    @property
    def astray(self) -> bool:
        return bool(self._stray)

    def _find(self, position: int) -> int | None:
        """Next capture pattern at or after `position`, or None; what is skipped counts as junk."""
        start = self._buffer.find(CAPTURE, position)
        if start >= 0:
            self._stray.clear()
        end = start if start >= 0 else max(position, len(self._buffer) - len(CAPTURE) + 1)
        if end > position:
            if self._in_sync:
                self.resyncs += 1
            self._in_sync = False
            if start < 0 and not self._damaged:
                self._stray += self._buffer[position : min(end, position + _STRAY_BYTES)]
            self._waste(end - position)
        return start if start >= 0 else None

    def _page_size(self, start: int) -> int | None:
        """Bytes of the page at `start`, or None while its header is incomplete."""
        if len(self._buffer) < start + _HEADER.size:
            return None
        segments = self._buffer[start + _HEADER.size - 1]
        body = start + _HEADER.size + segments
        if len(self._buffer) < body:
            return None
        return _HEADER.size + segments + sum(self._buffer[start + _HEADER.size : body])

    def _is_intact(self, start: int, size: int) -> bool:
        page = self._buffer[start : start + size]
        stored = bytes(page[22:26])
        page[22:26] = _NO_CRC
        return page[4] == 0 and checksum(page) == stored

    def _overlong_packet(self, start: int) -> bytes | None:
        """The packet of a page that says it has 255 bytes, has more, and is right by its checksum; or None.

        So write clients that know one lacing value. It ends with the buffer, or where the next page begins.
        """
        if self._buffer[start + _HEADER.size - 1 : start + _HEADER.size + 1] != b"\x01\xff":
            return None
        end = self._buffer.find(CAPTURE, start + len(CAPTURE))
        end = len(self._buffer) if end < 0 else end
        body = start + _HEADER.size + 1
        if not 255 < end - body <= PACKET_LIMIT or not self._is_intact(start, end - start):
            return None
        self._partial = None
        self._serial = int.from_bytes(self._buffer[start + 14 : start + 18], "little")
        return bytes(self._buffer[body:end])

    def _drop_page(self, size: int) -> None:
        self.dropped_pages += 1
        self._in_sync, self._damaged = False, True
        self._partial = None
        self._waste(size)

    def _refuse_foreign(self) -> None:
        if not self._stray:
            return
        beginning = bytes(self._stray + self._buffer)
        for name, at, magic in FOREIGN:
            if beginning.startswith(magic, at):
                raise BadAudio(f"this is {name}; send Ogg Opus")

    def _waste(self, size: int) -> None:
        # Good pages pay junk off byte by byte. Were the count reset instead, a peer could wrap each good page
        # in overlapping false headers and buy a 64 KiB checksum for every few bytes sent.
        self._junk += size
        if self._junk > JUNK_LIMIT:
            raise ProtocolError(f"no usable Ogg page within {JUNK_LIMIT} bytes")

    def _read_page(self, start: int, items: list[Head | bytes]) -> None:
        _, _, kind, _, serial, _, _, segments = _HEADER.unpack_from(self._buffer, start)
        if serial != self._serial:
            self._serial, self._partial = serial, None
        position = start + _HEADER.size + segments
        # The rest of a packet whose beginning was lost, or a beginning whose rest will never come.
        orphan = bool(kind & CONTINUED) and self._partial is None
        packet = self._partial if kind & CONTINUED and self._partial is not None else bytearray()
        self._partial = None
        begin = position
        first = bool(kind & FIRST)
        for lace in self._buffer[start + _HEADER.size : position]:
            position += lace
            if len(packet) + position - begin > PACKET_LIMIT:
                packet += self._buffer[begin : begin + len(_TAGS)]
                if not orphan and not packet.startswith(_TAGS):
                    raise ProtocolError(f"Ogg packet of more than {PACKET_LIMIT} bytes")
                packet, begin = packet[: len(_TAGS)], position
            if lace == 255:
                continue
            packet += self._buffer[begin:position]
            if not orphan:
                self._take(bytes(packet), first, items)
            packet, begin, orphan, first = bytearray(), position, False, False
        if segments and self._buffer[start + _HEADER.size + segments - 1] == 255 and not orphan:
            self._partial = packet + self._buffer[begin:position]

    def _take(self, packet: bytes, first: bool, items: list[Head | bytes]) -> None:
        if packet.startswith(b"OpusHead"):
            assert self._serial is not None
            items.append(parse_head(packet, self._serial))
        elif first:
            raise BadAudio("the Ogg stream is not Opus")
        elif not packet.startswith(_TAGS):
            items.append(packet)


def parse_head(packet: bytes, serial: int) -> Head:
    """Reads an OpusHead packet. Raises BadAudio unless it describes mono or stereo Opus: channel mapping
    family 0, or another one of a single stream, whose packets are the same (RFC 7845, section 5.1.1)."""
    if len(packet) < _HEAD.size:
        raise BadAudio("the OpusHead packet is too short")
    _, version, channels, pre_skip, _, gain, family = _HEAD.unpack_from(packet)
    streams = packet[_HEAD.size] if family and len(packet) > _HEAD.size else 1
    if version >> 4 or channels not in (1, 2) or streams != 1:
        raise BadAudio(f"only mono or stereo Opus is understood, not {channels} channels in family {family}")
    return Head(serial=serial, channels=channels, pre_skip=pre_skip, gain=gain)


def page_number(page: bytes) -> int:
    """Which page of its stream this is, from 0 behind the headers; negative for those, and for what is no
    page."""
    if len(page) < _HEADER.size or not page.startswith(CAPTURE):
        return -HEADER_PAGES
    return int(_HEADER.unpack_from(page)[5]) - HEADER_PAGES


class OggMuxer:
    """Writes one logical stream, a whole page per call."""

    def __init__(self, serial: int, pages: int = 0) -> None:
        """`serial` is any 32-bit unsigned integer. `pages`: how many went before, in a stream that goes
        on."""
        self._serial = serial
        self._sequence = HEADER_PAGES + pages

    def headers(self, pre_skip: int, sample_rate: int = 24_000) -> list[bytes]:
        """The OpusHead and OpusTags pages of a mono stream.

        `pre_skip` is in samples at 48 kHz; `sample_rate` (Hz) is informative only.
        """
        head = _HEAD.pack(b"OpusHead", 1, 1, pre_skip, sample_rate, 0, 0)
        tags = _TAGS + struct.pack("<I", len(_VENDOR)) + _VENDOR + struct.pack("<I", 0)
        return [self._page([head], 0, 0, FIRST), self._page([tags], 0, 1, 0)]

    def page(self, packets: Sequence[bytes], granule: int) -> bytes:
        """One page with all of `packets`; `granule` is the 48 kHz position after the last of them.

        Packets are our own encoder's: each at most OUTPUT_PACKET_LIMIT bytes, all within one page.
        """
        page = self._page(packets, granule, self._sequence, 0)
        self._sequence += 1
        return page

    def _page(self, packets: Sequence[bytes], granule: int, sequence: int, kind: int) -> bytes:
        lacing = bytearray()
        for packet in packets:
            assert len(packet) <= OUTPUT_PACKET_LIMIT, len(packet)
            full, rest = divmod(len(packet), 255)
            lacing += b"\xff" * full
            lacing.append(rest)
        assert len(lacing) <= 255, len(lacing)
        header = _HEADER.pack(CAPTURE, 0, kind, granule, self._serial, sequence & 0xFFFFFFFF, 0, len(lacing))
        page = bytearray(header)
        page += lacing
        for packet in packets:
            page += packet
        page[22:26] = checksum(page)
        return bytes(page)
