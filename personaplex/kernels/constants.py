"""Numbers that every implementation of an operation must agree on."""

from __future__ import annotations

RMS_EPS = 1e-8
LAYER_NORM_EPS = 1e-5

INT8_MAX = 127  # int8 codes lie in -127..127
SMALLEST_SCALE = 2.0**-14  # of quantized vectors: the smallest normal float16
LARGEST_SCALE = 65_504.0  # the largest float16

NOISE_STRIDE = 32  # noise counters per step: one for each token sampled in it
UNIFORM_BITS = 23  # (x + 1/2) / 2**23 is exact in float32 and never 0 or 1
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio

LARGE_MATRIX = 1 << 22  # weights from which a CPU matmul is worth more than one thread
