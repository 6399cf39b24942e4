"""Silero's speech detector by onnxruntime and numpy: without its package, and without torch.

Its model comes in two packages, as two graphs of the same network: `silero-vad` and `faster-whisper`.
Neither is imported; their files are found and read.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from personaplex.config import Pcm
from personaplex.errors import ConfigError

RATE = 16_000
WINDOW = 512  # samples, 32 ms
CONTEXT = 64  # samples before each window that the model also sees

SILERO_VAD = ("silero_vad", Path("data") / "silero_vad_16k_op15.onnx")
FASTER_WHISPER = ("faster_whisper", Path("assets") / "silero_vad_v6.onnx")

State = tuple[npt.NDArray[np.float32], ...]


def find(*places: tuple[str, Path]) -> Path | None:
    """The first model among `places` (package, file in it) that is installed."""
    for package, file in places:
        for folder in folders(package):
            if (folder / file).is_file():
                return folder / file
    return None


def folders(package: str) -> list[Path]:
    """Where an installed package's files are; it is found, not imported."""
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module of this name that has no file
        return []
    return [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []


class Silero:
    """One loaded model. It keeps nothing between calls, so any number of streams may share it."""

    def __init__(self, path: Path, hint: str) -> None:
        """Raises ConfigError with `hint` when onnxruntime is not installed or cannot read `path`."""
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigError(hint) from error
        options = onnxruntime.SessionOptions()
        options.inter_op_num_threads = options.intra_op_num_threads = 1
        options.log_severity_level = 4
        try:
            self._session: Any = onnxruntime.InferenceSession(
                str(path), sess_options=options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's own kinds
            raise ConfigError(f"the speech detector {path.name} cannot be read") from error
        self._whole = {one.name for one in self._session.get_inputs()} == {"input", "h", "c"}

    def start(self) -> State:
        """The state of a stream that begins."""
        if self._whole:
            return np.zeros((1, 1, 128), np.float32), np.zeros((1, 1, 128), np.float32)
        return (np.zeros((2, 1, 128), np.float32),)

    def run(self, windows: Pcm, state: State) -> tuple[Sequence[float], State]:
        """Probabilities of speech in consecutive `windows`, float32 [n, 64 + 512] at 16 kHz, and the state
        after them. `state` is that before them."""
        if not len(windows):
            return [], state
        if self._whole:  # windows in a row, in one call
            h, c = state
            found, h, c = self._session.run(None, {"input": windows, "h": h, "c": c})
            return np.ravel(found).tolist(), (h, c)
        (memory,) = state
        row = []
        for window in windows:
            feed = {"input": window[None], "state": memory, "sr": np.array(RATE, np.int64)}
            output, memory = self._session.run(None, feed)
            row.append(float(output.item()))
        return row, (memory,)


def windows_of(pcm: Pcm) -> Pcm:
    """float32 [samples] at 16 kHz, that begins with CONTEXT samples of before, as [n, 64 + 512]; n is how
    many whole windows there are."""
    count = (len(pcm) - CONTEXT) // WINDOW
    if count <= 0:
        return np.zeros((0, CONTEXT + WINDOW), np.float32)
    view = np.lib.stride_tricks.sliding_window_view(pcm, CONTEXT + WINDOW)[::WINDOW]
    return np.ascontiguousarray(view[:count])
