"""What was said, frame by frame, as the model's 17 tokens: enough to save, replay or transcribe a session.

A row is one complete (un-delayed) frame: the text token, the agent's 8 codes, the user's 8 codes, and whether
the agent's tokens were forced (a prompt) instead of drawn. numpy only.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaplex.config import AGENT, STREAMS, UNGENERATED, USER
from personaplex.errors import CheckpointError
from personaplex.files import read_bounded, replacing

_ARRAYS = ("text", "agent_codes", "user_codes", "forced")
_FILE_LIMIT = 2**26  # bytes; a day of frames takes 40 MB
_ARRAY_LIMIT = 2**27  # bytes of one array; a day of eight codes as int64 takes 70 MB
_LOWEST, _HIGHEST = UNGENERATED, 2**31 - 1


class TokenLog:
    """A growing record of one session; the arrays it hands out are views, valid until the next `append`."""

    def __init__(self, capacity: int = 256) -> None:
        self._tokens: NDArray[np.int32] = np.empty((max(1, capacity), STREAMS), np.int32)
        self._forced: NDArray[np.bool_] = np.empty(max(1, capacity), np.bool_)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, tokens: Sequence[int] | NDArray[np.integer], forced: bool = False) -> None:
        """Adds one frame: 17 ids in stream order."""
        if self._length == len(self._forced):
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
            self._forced = np.concatenate([self._forced, np.empty_like(self._forced)])
        self._tokens[self._length] = tokens
        self._forced[self._length] = forced
        self._length += 1

    @property
    def tokens(self) -> NDArray[np.int32]:
        """int32 [frames, 17] in stream order."""
        return self._tokens[: self._length]

    @property
    def forced(self) -> NDArray[np.bool_]:
        """bool [frames]."""
        return self._forced[: self._length]

    @property
    def text(self) -> NDArray[np.int32]:
        """int32 [frames]."""
        return self.tokens[:, 0]

    @property
    def agent_codes(self) -> NDArray[np.int32]:
        """int32 [8, frames]."""
        codes: NDArray[np.int32] = self.tokens[:, AGENT]
        return codes.T

    @property
    def user_codes(self) -> NDArray[np.int32]:
        """int32 [8, frames]."""
        codes: NDArray[np.int32] = self.tokens[:, USER]
        return codes.T

    def save(self, path: Path) -> None:
        """Writes an .npz with `text`, `agent_codes`, `user_codes` and `forced`; whole or not at all.

        Only its owner may read it: it is what somebody said.
        """
        arrays = {
            "text": self.text,
            "agent_codes": self.agent_codes,
            "user_codes": self.user_codes,
            "forced": self.forced,
        }
        _write(path, arrays, 0o600)

    @classmethod
    def load(cls, path: Path) -> TokenLog:
        """Reads what `save` wrote. Raises CheckpointError for anything else."""
        try:
            with zipfile.ZipFile(io.BytesIO(read_bounded(path, _FILE_LIMIT))) as file:
                text, agent, user, forced = (_array(file, name) for name in _ARRAYS)
                columns = np.concatenate((text[:, None], agent.T, user.T), axis=1)
        except Exception as error:  # damaged archives and headers raise nearly anything
            raise CheckpointError("this file is no token log") from error
        frames = len(columns)
        if columns.shape[1] != STREAMS or forced.shape != (frames,) or forced.dtype != np.bool_:
            raise CheckpointError("this file is no token log: its arrays do not fit together")
        if columns.dtype.kind != "i" or (
            frames and not _LOWEST <= columns.min() <= columns.max() <= _HIGHEST
        ):
            raise CheckpointError("this file is no token log: it holds other numbers than tokens")
        log = cls(frames)
        log._tokens[:frames], log._forced[:frames] = columns, forced
        log._length = frames
        return log


def save_arrays(path: Path, **arrays: NDArray[np.generic]) -> None:
    """A compressed .npz, written whole or not at all."""
    _write(path, arrays, 0o666)


def _write(path: Path, arrays: Mapping[str, NDArray[np.generic]], mode: int) -> None:
    """`mode` is what the umask leaves of it, as for every new file."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags, mode)

    with replacing(path) as part, open(part, "xb", opener=opener) as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _array(file: zipfile.ZipFile, name: str) -> NDArray[np.generic]:
    """One array of an .npz, of no more memory than its bytes. Raises ValueError, and what zipfile raises.

    np.load would allocate what the array's header claims before it reads any of it.
    """
    entry = file.getinfo(f"{name}.npy")
    if entry.file_size > _ARRAY_LIMIT or entry.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    ):
        raise ValueError("larger than any session, or packed in another way")
    data = io.BytesIO(file.read(entry))
    npy: Any = np.lib.format  # older stubs know no types of it
    if npy.read_magic(data) != (1, 0):
        raise ValueError("another version of the format")
    shape, fortran, dtype = npy.read_array_header_1_0(data)
    if dtype.kind not in "ib":
        raise ValueError("neither integers nor booleans")
    return np.frombuffer(data.read(), dtype).reshape(shape, order="F" if fortran else "C")
