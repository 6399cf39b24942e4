"""One tick as one call: CUDA graphs captured on prefixes of slots, or the same work launched eagerly.

Frames go in and out through buffers of fixed address, pinned on the host where the device is CUDA. Between
them a tick allocates nothing, waits for nothing and takes nothing from the host but the prefix of slots it
covers: sampling parameters, ring offsets and the mask of active slots are read on the device. One graph per
prefix, captured at start, therefore serves any mixture of sessions.

Capture needs a GPU and has not run on one yet (`benchmarks.gpu` compares captured and eager ticks bit by
bit). What is captured has run: tests run it on the CPU, kernels in Triton's interpreter, and on torch's meta
device, which shows that it never reads a value on the host.

Without graphs (on a CPU, with offloaded weights, or when asked) `run` launches the same work eagerly.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from personaplex.config import CODEBOOKS, FRAME_SIZE, STREAMS
from personaplex.engine.state import EngineState
from personaplex.engine.step import step
from personaplex.kernels import ops
from personaplex.model import Model
from personaplex.model.self_attention import SelfAttention

_WARM_UP = 2  # eager ticks before each capture, which compile kernels and set up libraries outside of it


@dataclass(frozen=True)
class Frames:
    """Output of one tick, in its own memory: pcm float32 [width, 1920], tokens int64 [width, 17] and
    user_codes int64 [width, 8]. Rows of inactive slots are undefined.
    """

    pcm: NDArray[np.float32]
    tokens: NDArray[np.int64]
    user_codes: NDArray[np.int64]


class TickRunner:
    """Runs the ticks of one engine over its state of `slots` slots."""

    def __init__(self, model: Model, state: EngineState, slots: int, graphs: bool) -> None:
        """Captures the graphs, if any: takes seconds, and memory for the widest tick."""
        self._model, self._state, self._slots = model, state, slots
        device = model.device
        self._on_gpu = device.type == "cuda"
        self.pcm = torch.zeros(slots, FRAME_SIZE, pin_memory=self._on_gpu)
        self._active = torch.zeros(slots, dtype=torch.bool, pin_memory=self._on_gpu)
        self._inputs = [t.to(device) for t in (self.pcm, self._active)]  # the same memory on a CPU
        outputs = ((FRAME_SIZE, torch.float32), (STREAMS, torch.int64), (CODEBOOKS, torch.int64))
        self._outputs = [torch.zeros(slots, size, dtype=kind, device=device) for size, kind in outputs]
        self._results = [torch.zeros_like(t, device="cpu", pin_memory=self._on_gpu) for t in self._outputs]
        self._side_stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if graphs and self._on_gpu and ops.fixed_shapes(self._inputs[0]) and not _offloaded(model):
            self._capture()

    @property
    def widths(self) -> list[int]:
        """The prefixes that have a graph, narrowest first; empty when ticks run eagerly."""
        return sorted(self._graphs)

    def run(self, slots: list[int]) -> Frames:
        """One tick over `slots` (ascending), whose frames are in `pcm`; blocks until it is done."""
        self._active.zero_()
        self._active[slots] = True
        width = slots[-1] + 1
        graph = None
        if self._graphs:
            width = min(w for w in self._graphs if w >= width)
            graph = self._graphs[width]
        with torch.inference_mode():
            if self._on_gpu:
                for inner, outer in zip(self._inputs, (self.pcm, self._active), strict=True):
                    inner[:width].copy_(outer[:width], non_blocking=True)
            if graph is None:
                self._launch(width)
            else:
                graph.replay()
            for outer, inner in zip(self._results, self._outputs, strict=True):
                outer[:width].copy_(inner[:width], non_blocking=True)
            if self._on_gpu:
                torch.cuda.current_stream(self._model.device).synchronize()
        pcm, tokens, user_codes = (result[:width].numpy().copy() for result in self._results)
        return Frames(pcm, tokens, user_codes)

    def _launch(self, width: int) -> None:
        """The work between the buffers."""
        pcm, active = (t[:width] for t in self._inputs)
        out = step(self._model, self._state.rows(0, width), pcm, active, self._side_stream)
        for kept, new in zip(self._outputs, (out.pcm, out.tokens, out.user_codes), strict=True):
            kept[:width].copy_(new)

    def _capture(self) -> None:
        """Widest first: the narrower graphs share its memory pool, since no two of them ever run at once.

        No slot is active meanwhile, so the state gains nothing but garbage that nobody reads.
        """
        device = self._model.device
        side, pool = torch.cuda.Stream(device), None
        gc.collect()  # a collection that frees device memory during a capture would abort it
        with torch.inference_mode():
            for width in reversed(prefixes(self._slots)):
                side.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(side):
                    for _ in range(_WARM_UP):
                        self._launch(width)
                torch.cuda.current_stream(device).wait_stream(side)
                torch.cuda.synchronize(device)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                    self._launch(width)
                pool = graph.pool()
                self._graphs[width] = graph


def prefixes(slots: int) -> list[int]:
    """Widths to capture graphs for: powers of two to 16, then steps of at most half as much, then all slots.

    A wider graph than needed wastes only a few rows of the matmuls: rings of inactive slots are not read.
    """
    widths = [1, 2, 4, 8, 16]
    while widths[-1] < slots:
        last = widths[-1]
        power = 1 << (last.bit_length() - 1)
        widths.append(last + power // 2)
    return [*(w for w in widths if w < slots), slots]


def _offloaded(model: Model) -> bool:
    """True when some weights stay on the host: every tick then copies them, which no graph should hold."""
    matrices: list[Tensor] = []
    for part in model.lm.transformer.modules():
        if isinstance(part, SelfAttention):
            matrices += [m for m in part.inputs if isinstance(m, Tensor)]
    return any(matrix.device != model.device for matrix in matrices)
