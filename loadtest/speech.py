"""What the sessions of a load test say: recorded speech, encoded once and cut into pages for each of them.

All share the recordings; each session starts somewhere else in them and goes round. Only the Ogg pages are
made per session, with a serial and sequence of their own, as every client's are; protocols without Ogg send
the frames as they are.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from personaplex.audio.ogg import OggMuxer
from personaplex.audio.opus import PACKET_SAMPLES, OpusEncoder
from personaplex.audio.pcm import PcmFormat, PcmTranscoder
from personaplex.audio.transcoder import Transcoder
from personaplex.audio.wav import one_channel, read_wav, resample
from personaplex.config import FRAME_SIZE, SAMPLE_RATE
from personaplex.errors import BadAudio, PersonaplexError

_GRANULES = 48_000 // SAMPLE_RATE  # Ogg counts Opus at 48 kHz whatever the codec's rate
DEFAULT = Path(__file__).parent.parent / "tests" / "data" / "mic.ogg"


class Speech:
    """Opus packets of 20 ms, four to a frame."""

    def __init__(self, frames: Sequence[Sequence[bytes]], pre_skip: int) -> None:
        self._frames, self._pre_skip = frames, pre_skip

    def __len__(self) -> int:
        """Frames in one round."""
        return len(self._frames)

    @classmethod
    def load(cls, paths: Sequence[Path]) -> Speech:
        """Encodes recordings (wav, flac, or Ogg/Opus as clients send it), one after the other.

        Raises BadAudio for a file that cannot be read or holds less than a frame.
        """
        encoder, frames = OpusEncoder(), []
        for path in paths:
            for frame in _frames(path):
                parts = frame.reshape(-1, PACKET_SAMPLES)
                frames.append([encoder.encode(part) for part in parts])
        if not frames:
            raise BadAudio("there is no speech to send")
        return cls(frames, encoder.lookahead * _GRANULES)

    def stream(self, start: int) -> tuple[list[bytes], Iterator[bytes]]:
        """A stream of its own: its header pages, and pages from frame `start` on."""
        muxer = new_stream()
        return self.headers(muxer), self.pages(muxer, start)

    def headers(self, muxer: OggMuxer) -> list[bytes]:
        return muxer.headers(pre_skip=self._pre_skip)

    def pages(self, muxer: OggMuxer, start: int) -> Iterator[bytes]:
        """One page of 80 ms after the other, for ever, from frame `start` (any number) on."""
        number = 0
        while True:
            number += 1
            packets = self._frames[(start + number) % len(self._frames)]
            yield muxer.page(packets, number * FRAME_SIZE * _GRANULES)


class PlainSpeech:
    """Frames of 80 ms in a format without packets and pages."""

    def __init__(self, frames: Sequence[bytes]) -> None:
        self._frames = frames

    @classmethod
    def load(cls, paths: Sequence[Path], form: PcmFormat) -> PlainSpeech:
        """Encodes recordings, as `Speech.load`."""
        encoder = PcmTranscoder()
        encoder.set_formats(form, form)
        frames = [encoder.send(frame) for path in paths for frame in _frames(path)]
        if not frames:
            raise BadAudio("there is no speech to send")
        return cls(frames)

    def stream(self, start: int) -> tuple[list[bytes], Iterator[bytes]]:
        """No headers, and frames for ever, from frame `start` (any number) on."""
        return [], self._from(start)

    def _from(self, start: int) -> Iterator[bytes]:
        for number in itertools.count(start + 1):
            yield self._frames[number % len(self._frames)]


def load(paths: Sequence[Path], form: PcmFormat | None) -> Speech | PlainSpeech:
    """Recordings in the format of a protocol; None for Ogg and Opus. Raises BadAudio."""
    return Speech.load(paths) if form is None else PlainSpeech.load(paths, form)


def new_stream() -> OggMuxer:
    """A muxer with a serial of its own."""
    return OggMuxer(secrets.randbits(32))


def _frames(path: Path) -> list[np.ndarray]:
    if not path.is_file():
        raise BadAudio(f"{path.name} is no file")
    try:
        data = path.read_bytes()
        if data.startswith(b"OggS"):
            return Transcoder().receive(data)
        pcm, rate = read_wav(path)
    except (OSError, PersonaplexError) as error:
        raise BadAudio(f"{path.name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    mono = resample(one_channel(pcm, path.name), rate, SAMPLE_RATE)
    return list(mono[: len(mono) // FRAME_SIZE * FRAME_SIZE].reshape(-1, FRAME_SIZE))
