"""Uncompressed audio of one session to frames and back: linear 16-bit samples, mu-law and A-law at any rate.

Of the same shape as `Transcoder`, for protocols that carry no Ogg. It is bounded by the law of real time: a
peer may send a burst and LEAD_SPARE_S at once, then what a clock that is CATCH_UP_RATE fast has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from personaplex.audio.framer import Framer
from personaplex.audio.g711 import A_LAW, MU_LAW, Law, Samples
from personaplex.audio.resample import Resampler
from personaplex.audio.transcoder import RealTime, StreamCounters
from personaplex.config import BURST_S, FRAME_SIZE, SAMPLE_RATE, Pcm
from personaplex.errors import BadAudio

Encoding = Literal["pcm16", "mulaw", "alaw"]
_LAWS: dict[str, Law] = {"mulaw": MU_LAW, "alaw": A_LAW}


@dataclass(frozen=True)
class PcmFormat:
    """Mono samples; pcm16 is little endian."""

    encoding: Encoding = "pcm16"
    rate: int = SAMPLE_RATE

    @property
    def sample_bytes(self) -> int:
        return 2 if self.encoding == "pcm16" else 1

    @property
    def frame_bytes(self) -> int:
        """Of one frame, 80 ms."""
        return FRAME_SIZE * self.rate // SAMPLE_RATE * self.sample_bytes

    def seconds(self, data: bytes) -> float:
        return len(data) / (self.rate * self.sample_bytes)

    def silence(self, count: int) -> bytes:
        """`count` bytes of it."""
        return bytes([0 if self.encoding == "pcm16" else _LAWS[self.encoding].silence]) * count

    def samples(self, data: bytes) -> Samples:
        """int16 [samples]. Raises BadAudio for half a sample."""
        if len(data) % self.sample_bytes:
            raise BadAudio("16-bit audio has an even number of bytes")
        return np.frombuffer(data, "<i2") if self.encoding == "pcm16" else _LAWS[self.encoding].decode(data)

    def encode(self, samples: Samples) -> bytes:
        if self.encoding == "pcm16":
            return samples.astype("<i2").tobytes()
        return _LAWS[self.encoding].encode(samples)


class PcmTranscoder:
    """Both directions of one session; see `Transcoder`. `set_formats` before the first audio."""

    feed_bytes = 32_768  # fed at once
    astray = False
    dropped_pages = resyncs = 0

    def __init__(self, *, clock: Callable[[], float] | None = None, burst_s: float = BURST_S) -> None:
        self.counters = StreamCounters()
        self._real_time = RealTime(clock, burst_s)
        self._framer = Framer()
        self.set_formats(PcmFormat(), PcmFormat())

    def set_formats(self, heard: PcmFormat, said: PcmFormat) -> None:
        """What the peer sends and what it wants to be sent."""
        self._heard, self._said = heard, said
        self._to_frames = Resampler(heard.rate, SAMPLE_RATE)
        self._to_peer = Resampler(SAMPLE_RATE, said.rate)

    def headers(self) -> list[bytes]:
        return []

    def send(self, frame: Pcm) -> bytes:
        """One frame, float32 [1920], in the peer's format: always `frame_bytes` of it."""
        assert frame.shape == (FRAME_SIZE,), frame.shape
        self.counters.frames_out += 1
        pcm = self._to_peer.push(frame)
        return self._said.encode(np.clip(np.rint(pcm * 32_768), -32_768, 32_767).astype(np.int16))

    def receive(self, data: bytes) -> list[Pcm]:
        """The frames, float32 [1920] each, that `data` completes. Raises BadAudio for half a sample and
        ProtocolError for audio faster than real time."""
        samples = self._heard.samples(data)
        self._real_time.spend(self._heard.seconds(data))
        self._framer.push(self._to_frames.push(samples.astype(np.float32) / np.float32(32_768)))
        frames: list[Pcm] = []
        while (frame := self._framer.pop()) is not None:
            frames.append(frame)
        self.counters.frames_in += len(frames)
        return frames
