"""Opus at 24 kHz mono through libopus: one encoder, one decoder, and the arithmetic of packet durations.

Calls go to libopus by ctypes into buffers allocated once, because opuslib's own `decode` copies every sample
through a Python list and costs three times the codec itself. They keep the interpreter's lock: a call takes
20 to 80 us, and a thread that gives the lock away so often gets it back late whenever another one is awake. A
codec object belongs to one session and one thread at a time.
"""

from __future__ import annotations

import ctypes
import warnings
import weakref
from typing import Any

import numpy as np

from personaplex.config import SAMPLE_RATE, Pcm
from personaplex.errors import BadAudio, ConfigError

try:
    with warnings.catch_warnings():
        # opuslib 3.0.1 compares integers by identity, which the compiler reports once, at first import.
        warnings.simplefilter("ignore", SyntaxWarning)
        import opuslib
        import opuslib.api
        import opuslib.api.ctl
        import opuslib.api.decoder
        import opuslib.api.encoder
except Exception as error:  # opuslib raises a bare Exception when it finds no shared library
    raise ConfigError(
        "the Opus library is missing: install libopus0 (Debian, Ubuntu), opus (Fedora, Homebrew, Arch)"
    ) from error


_LIBOPUS = ctypes.PyDLL(opuslib.api.libopus._name, handle=opuslib.api.libopus._handle)
_ADDRESS = ctypes.c_void_p
_encode = _LIBOPUS.opus_encode_float
_encode.argtypes = (_ADDRESS, _ADDRESS, ctypes.c_int, _ADDRESS, ctypes.c_int32)
_decode = _LIBOPUS.opus_decode_float
_decode.argtypes = (_ADDRESS, ctypes.c_char_p, ctypes.c_int32, _ADDRESS, ctypes.c_int, ctypes.c_int)

PACKET_SAMPLES = 480  # 20 ms, the usual packet
LONGEST_SAMPLES = 2_880  # 120 ms, the longest packet there is
SHORTEST_SAMPLES = 60  # 2.5 ms, the grain of all packets
_ENCODED_LIMIT = 4_000  # bytes; what libopus recommends and the reference's web decoder accepts

_SILK_SAMPLES = (240, 480, 960, 1_440)
_HYBRID_SAMPLES = (240, 480)
_CELT_SAMPLES = (60, 120, 240, 480)


def packet_samples(packet: bytes) -> int:
    """Samples at 24 kHz that `packet` decodes to, from its first two bytes (RFC 6716, section 3.1).

    Raises BadAudio when they cannot begin an Opus packet.
    """
    if not packet:
        raise BadAudio("empty Opus packet")
    config, code = packet[0] >> 3, packet[0] & 3
    if config < 12:
        samples = _SILK_SAMPLES[config & 3]
    elif config < 16:
        samples = _HYBRID_SAMPLES[config & 1]
    else:
        samples = _CELT_SAMPLES[config & 3]
    if code == 3:
        if len(packet) < 2:
            raise BadAudio("truncated Opus packet")
        samples *= packet[1] & 0x3F
    elif code:
        samples *= 2
    if not 0 < samples <= LONGEST_SAMPLES:
        raise BadAudio("Opus packet of an impossible duration")
    return samples


class OpusDecoder:
    """Decodes packets to 24 kHz mono, stream after stream; stereo packets are mixed down by libopus."""

    def __init__(self) -> None:
        self._state = opuslib.api.decoder.create_state(SAMPLE_RATE, 1)
        weakref.finalize(self, opuslib.api.decoder.destroy, self._state)
        self._address = ctypes.cast(self._state, _ADDRESS)
        self._pcm: Pcm = np.zeros(LONGEST_SAMPLES, np.float32)
        self._samples = self._pcm.ctypes.data
        self._louder = False

    def start(self, gain: int) -> None:
        """Begins a new stream, as a new decoder would, whose loudness is changed by `gain` / 256 dB, within
        +-128 dB. What that lifts over full scale is clipped."""
        opuslib.api.decoder.decoder_ctl(self._state, opuslib.api.ctl.reset_state)
        opuslib.api.decoder.decoder_ctl(self._state, opuslib.api.ctl.set_gain, gain)
        self._louder = gain > 0

    def decode(self, packet: bytes) -> Pcm:
        """float32 [samples]: a view that the next call overwrites. Raises BadAudio for a corrupt packet."""
        count = _decode(self._address, packet, len(packet), self._samples, LONGEST_SAMPLES, 0)
        if count < 0:
            raise BadAudio("corrupt Opus packet")
        return self._heard(count)

    def conceal(self, samples: int) -> Pcm:
        """What libopus puts in place of `samples` lost ones (a multiple of 60, at most 2880); a view too."""
        assert samples in range(SHORTEST_SAMPLES, LONGEST_SAMPLES + 1, SHORTEST_SAMPLES), samples
        count = _decode(self._address, None, 0, self._samples, samples, 0)
        assert count == samples, (count, samples)
        return self._heard(count)

    def _heard(self, count: int) -> Pcm:
        pcm = self._pcm[:count]
        return np.clip(pcm, -1.0, 1.0, out=pcm) if self._louder else pcm


class OpusEncoder:
    """Encodes 24 kHz mono in libopus's low-delay mode: 2.5 ms of look-ahead, no speech mode.

    Bits are cheaper than work: 48 kb/s at complexity 0 takes less than half the CPU of 32 kb/s at complexity
    5 and follows the waveform more closely; benchmarks/codec.py measures both.
    """

    def __init__(self, bitrate: int = 48_000, complexity: int = 0) -> None:
        """`bitrate` in bits per second. Raises ConfigError for a value libopus refuses."""
        application = opuslib.APPLICATION_RESTRICTED_LOWDELAY
        self._state = opuslib.api.encoder.create_state(SAMPLE_RATE, 1, application)
        weakref.finalize(self, opuslib.api.encoder.destroy, self._state)
        try:
            self._control(opuslib.api.ctl.set_bitrate, bitrate)
            self._control(opuslib.api.ctl.set_complexity, complexity)
        except opuslib.OpusError as error:
            raise ConfigError(f"Opus refuses bitrate {bitrate}, complexity {complexity}") from error
        self.lookahead: int = self._control(opuslib.api.ctl.get_lookahead)  # samples at 24 kHz
        self._address = ctypes.cast(self._state, _ADDRESS)
        self._pcm: Pcm = np.zeros(LONGEST_SAMPLES, np.float32)
        self._samples = self._pcm.ctypes.data
        self._packet = ctypes.create_string_buffer(_ENCODED_LIMIT)

    def encode(self, pcm: Pcm) -> bytes:
        """One packet from float32 [samples]: 60, 120, 240, 480, 960, 1440, 1920, 2400 or 2880
        of them (2.5 to 120 ms)."""
        samples = len(pcm)
        self._pcm[:samples] = pcm
        size = _encode(self._address, self._samples, samples, self._packet, _ENCODED_LIMIT)
        assert size > 0, (size, samples)
        return ctypes.string_at(self._packet, size)

    def _control(self, request: Any, value: int | None = None) -> Any:
        return opuslib.api.encoder.encoder_ctl(self._state, request, value)
