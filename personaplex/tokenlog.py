"""What was said, frame by frame, as the model's 17 tokens: enough to save, replay or transcribe a session.

A row is one complete (un-delayed) frame: the text token, the agent's 8 codes, the user's 8 codes, and whether
the agent's tokens were forced (a prompt) instead of drawn. numpy only.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from personaplex.config import AGENT, STREAMS, USER
from personaplex.errors import CheckpointError
from personaplex.files import replacing


class TokenLog:
    """A growing record of one session; the arrays it hands out are views, valid until the next `append`."""

    def __init__(self, capacity: int = 256) -> None:
        self._tokens = np.empty((max(1, capacity), STREAMS), np.int32)
        self._forced = np.empty(max(1, capacity), np.bool_)
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
        return self.tokens[:, AGENT].T

    @property
    def user_codes(self) -> NDArray[np.int32]:
        """int32 [8, frames]."""
        return self.tokens[:, USER].T

    def save(self, path: Path) -> None:
        """Writes an .npz with `text`, `agent_codes`, `user_codes` and `forced`; whole or not at all."""
        save_arrays(
            path, text=self.text, agent_codes=self.agent_codes, user_codes=self.user_codes, forced=self.forced
        )

    @classmethod
    def load(cls, path: Path) -> TokenLog:
        """Reads what `save` wrote. Raises CheckpointError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as data:
                parts = (data["text"][:, None], data["agent_codes"].T, data["user_codes"].T)
                columns, forced = np.concatenate(parts, axis=1), data["forced"]
        except (OSError, KeyError, ValueError, IndexError, zipfile.BadZipFile) as error:
            raise CheckpointError("this file is no token log") from error
        if columns.shape[1] != STREAMS or forced.shape != columns.shape[:1] or columns.dtype.kind != "i":
            raise CheckpointError("this file is no token log: its arrays do not fit together")
        log = cls(len(forced))
        log._tokens[: len(forced)], log._forced[: len(forced)] = columns, forced
        log._length = len(forced)
        return log


def save_arrays(path: Path, **arrays: NDArray[np.generic]) -> None:
    """A compressed .npz, written whole or not at all."""
    with replacing(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
