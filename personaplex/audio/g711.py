"""G.711, the telephone's eight-bit codes for 16-bit samples, by tables: mu-law and A-law, decode and encode.

Both laws are logarithmic in eight segments of 16 steps. A decode table is the law as ITU-T G.711 writes it
down; an encode table gives for each of the 65,536 samples the code as the reference algorithm chooses it, by
truncation of 14 (mu) or 13 (A) bits. Decoding is exact; encoding a decoded sample gives a code of the same
value.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]
Samples = npt.NDArray[np.int16]

_MU_BIAS, _MU_CLIP = 33, 8_158  # of 14-bit magnitudes


def _mu_law_decode() -> Samples:
    code = ~np.arange(256, dtype=np.int64) & 0xFF
    segment, step = code >> 4 & 7, code & 15
    magnitude = (((step << 1) + _MU_BIAS) << segment) - _MU_BIAS
    return (np.where(code & 0x80, -magnitude, magnitude) << 2).astype(np.int16)


def _mu_law_encode() -> Codes:
    sample = np.arange(65_536, dtype=np.uint16).view(np.int16).astype(np.int64) >> 2
    magnitude = np.minimum(np.abs(sample), _MU_CLIP) + _MU_BIAS
    segment = np.floor(np.log2(magnitude)).astype(np.int64) - 5
    code = segment << 4 | (magnitude >> (segment + 1) & 15) | np.where(sample < 0, 0x80, 0)
    codes: Codes = (~code & 0xFF).astype(np.uint8)
    return codes


def _a_law_decode() -> Samples:
    code = np.arange(256, dtype=np.int64) ^ 0x55
    segment, step = code >> 4 & 7, (code & 15) << 1
    magnitude = np.where(segment > 0, (step + 33) << np.maximum(segment - 1, 0), step + 1)
    return (np.where(code & 0x80, magnitude, -magnitude) << 3).astype(np.int16)


def _a_law_encode() -> Codes:
    sample = np.arange(65_536, dtype=np.uint16).view(np.int16).astype(np.int64) >> 3
    magnitude = np.where(sample < 0, -sample - 1, sample)
    segment = np.maximum(np.floor(np.log2(np.maximum(magnitude, 1))).astype(np.int64) - 4, 0)
    step = magnitude >> np.maximum(segment, 1) & 15
    code = segment << 4 | step | np.where(sample < 0, 0, 0x80)
    codes: Codes = (code ^ 0x55).astype(np.uint8)
    return codes


class Law:
    """One of the two laws. `silence` is the code of a sample of 0."""

    def __init__(self, decode: Samples, encode: Codes) -> None:
        self._decode, self._encode = decode, encode
        self.silence = int(encode[0])

    def decode(self, codes: bytes) -> Samples:
        """int16 [len(codes)]."""
        return self._decode[np.frombuffer(codes, np.uint8)]

    def encode(self, samples: Samples) -> bytes:
        """One code for each sample of int16 [samples]."""
        return self._encode[np.ascontiguousarray(samples).view(np.uint16)].tobytes()


MU_LAW = Law(_mu_law_decode(), _mu_law_encode())
A_LAW = Law(_a_law_decode(), _a_law_encode())
