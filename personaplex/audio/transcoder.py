"""Ogg/Opus bytes of one session to frames and back.

Receiving is tolerant: damaged pages are dropped, empty or corrupt packets are concealed for as long as the
last good packet lasted, a head that appears mid-stream starts a new stream, as often as a client likes. It is
also bounded: by the law of real time (`clock`) and by CONCEAL_LIMIT_S, since a page of a few bytes can claim
minutes of audio. No bound is a total for a session's life: whoever keeps to real time may go on for ever.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from personaplex.allowance import Allowance
from personaplex.audio.framer import Framer
from personaplex.audio.ogg import Head, OggDemuxer, OggMuxer
from personaplex.audio.opus import PACKET_SAMPLES, OpusDecoder, OpusEncoder, packet_samples
from personaplex.config import BURST_S, CATCH_UP_RATE, FRAME_SIZE, SAMPLE_RATE, Pcm
from personaplex.errors import BadAudio, ProtocolError

SAVED_S = 60.0  # without audio from a peer, asleep or in the queue, that it may make up for at once
LEAD_SPARE_S = 4.0  # beyond a burst, that a peer may be ahead of the clock: its device's start-up backlog
CONCEAL_LIMIT_S = 2.0  # concealed audio in a row before the stream counts as unreadable
NOT_OGG_AFTER_S = 0.9  # of bytes in which nothing looks like a page
_GRANULES = 48_000 // SAMPLE_RATE  # Ogg counts Opus at 48 kHz whatever the codec's rate


@dataclass
class StreamCounters:
    """What one transcoder has seen."""

    packets: int = 0  # received
    concealed: int = 0  # received packets that were empty or corrupt
    streams: int = 0  # heads received
    frames_in: int = 0
    frames_out: int = 0


class RealTime:
    """Law of real time: a peer may send a burst and LEAD_SPARE_S of audio at once, and from then on what a
    clock that is CATCH_UP_RATE fast has seen, of which up to SAVED_S are kept for it. Without a clock there
    is no such law."""

    def __init__(self, clock: Callable[[], float] | None, burst_s: float) -> None:
        self._clock = clock
        self._lead_s = burst_s + LEAD_SPARE_S
        self._seconds = Allowance(
            CATCH_UP_RATE, self._lead_s + SAVED_S, now=clock() if clock else 0.0, start=self._lead_s
        )

    def spend(self, seconds: float) -> None:
        """Raises ProtocolError when `seconds` of audio come too early."""
        if self._clock is None:
            return
        if not self._seconds.spend(seconds, self._clock()):
            raise ProtocolError(f"audio came faster than real time by more than {self._lead_s:g} s")


class Transcoder:
    """Both directions of one session. `counters`, `dropped_pages` and `resyncs` tell how it went."""

    feed_bytes = (
        1_024  # of Ogg to be fed at once; a page of packets without content lasts 30 s in half of that
    )

    def __init__(
        self,
        *,
        clock: Callable[[], float] | None = None,
        burst_s: float = BURST_S,
        serial: int | None = None,
        frames_before: int = 0,
    ) -> None:
        """`clock` (seconds, monotonic) turns on what goes by time: leave it out for files. `burst_s` is the
        longest burst a peer may send. `serial` of our own stream is random unless given. `frames_before`:
        frames that went out by another stream, which this one continues: pages and granules count on.
        """
        self.counters = StreamCounters()
        self._frames_before = frames_before
        self._demuxer = OggDemuxer()
        self._muxer = OggMuxer(secrets.randbits(32) if serial is None else serial, frames_before)
        self._decoder = OpusDecoder()
        self._encoder = OpusEncoder()
        self._framer = Framer()
        self._clock = clock
        self._real_time = RealTime(clock, burst_s)
        self._astray_since: float | None = None
        self._skip = 0  # samples of the pre-skip still to discard
        self._last_samples = PACKET_SAMPLES  # duration of the last packet that had one
        self._concealed = 0  # samples in a row

    @property
    def dropped_pages(self) -> int:
        return self._demuxer.dropped_pages

    @property
    def resyncs(self) -> int:
        return self._demuxer.resyncs

    def headers(self) -> list[bytes]:
        """The two header pages of our own stream; send each as a message of its own, before any page."""
        return self._muxer.headers(pre_skip=self._encoder.lookahead * _GRANULES)

    def send(self, frame: Pcm) -> bytes:
        """One whole Ogg page with one packet from one frame, float32 [1920]: some clients take all that is in
        a page for one packet."""
        assert frame.shape == (FRAME_SIZE,), frame.shape
        packet = self._encoder.encode(frame)
        self.counters.frames_out += 1
        frames = self._frames_before + self.counters.frames_out
        return self._muxer.page([packet], frames * FRAME_SIZE * _GRANULES)

    def receive(self, data: bytes) -> list[Pcm]:
        """The frames, float32 [1920] each, that `data` completes. `data` may end anywhere in the stream.

        Raises BadAudio for bytes that are no Ogg stream (after NOT_OGG_AFTER_S, if there is a clock), for a
        stream that is not Opus or cannot be decoded for longer than CONCEAL_LIMIT_S, ProtocolError for audio
        faster than real time and for Ogg that is damaged beyond use.
        """
        for item in self._demuxer.feed(data):
            if isinstance(item, Head):
                self._start_stream(item)
            else:
                self._decode(item)
        self._check_astray()
        frames: list[Pcm] = []
        while (frame := self._framer.pop()) is not None:
            frames.append(frame)
        self.counters.frames_in += len(frames)
        return frames

    @property
    def astray(self) -> bool:
        """Whether the newest bytes look like no Ogg. If they still do NOT_OGG_AFTER_S later, `receive`
        raises, even when given b""."""
        return self._demuxer.astray

    def flush(self) -> Pcm | None:
        """The frame begun by the last packets, padded with zeros, or None: for the end of a file."""
        frame = self._framer.flush()
        self.counters.frames_in += frame is not None
        return frame

    def _check_astray(self) -> None:
        if self._clock is None:
            return
        if not self._demuxer.astray:
            self._astray_since = None
        elif self._astray_since is None:
            self._astray_since = self._clock()
        elif self._clock() - self._astray_since >= NOT_OGG_AFTER_S:
            raise BadAudio("no Ogg page (raw PCM?); send Ogg Opus")

    def _start_stream(self, head: Head) -> None:
        self._decoder.start(head.gain)
        self.counters.streams += 1
        self._skip = head.pre_skip // _GRANULES

    def _decode(self, packet: bytes) -> None:
        self.counters.packets += 1
        try:
            samples = packet_samples(packet)
            pcm = self._decoder.decode(packet)
        except BadAudio:
            pcm = self._conceal()
        else:
            self._account(samples)
            self._last_samples, self._concealed = samples, 0
        if self._skip:
            skipped = min(self._skip, len(pcm))
            self._skip -= skipped
            pcm = pcm[skipped:]
        self._framer.push(pcm)

    def _conceal(self) -> Pcm:
        # libopus conceals as much as the buffer holds unless it is told how much was lost.
        samples = self._last_samples
        self.counters.concealed += 1
        self._concealed += samples
        if self._concealed > CONCEAL_LIMIT_S * SAMPLE_RATE:
            raise BadAudio(f"nothing could be decoded for {CONCEAL_LIMIT_S:g} s of audio")
        self._account(samples)
        return self._decoder.conceal(samples)

    def _account(self, samples: int) -> None:
        """Once for each packet, with what is heard of it: a corrupt one may claim another duration than the
        one concealed."""
        self._real_time.spend(samples / SAMPLE_RATE)
