"""A prepared dataset: calls as tokens, ready to be trained on again and again.

    dataset.json     what it was made of and how, its calls, and the faults of those that could not be used
    NAME.npz         tokens int32 [17, frames]; sounds bool [frames], where the agent does; voice int16 [8, F]
                     of a call that brings a recorded voice
    NAME.user.wav    the user's channel, for samples that are generated while training

Codes and text are those of one codec and one tokenizer, whose digests are kept: training with others is
refused.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaplex.config import STREAMS, LMConfig
from personaplex.errors import ConfigError
from personaplex.files import read_bounded, replacing
from personaplex.finetune.source import Fault
from personaplex.model.identity import Base

FILE = "dataset.json"
FORMAT = 1
_LIMIT = 2**28  # bytes of dataset.json


@dataclass(frozen=True)
class Entry:
    """One prepared call. `voice` is a name of the library; with `recorded_voice` it is "" and the call's file
    holds the voice's codes. `source` and `transcript` are digests of what it was made of."""

    name: str
    frames: int
    words: int
    role: str
    voice: str
    recorded_voice: bool
    source: str
    transcript: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """`dataset.json` of `folder`."""

    folder: Path
    codec: str
    tokenizer: str
    entries: tuple[Entry, ...]
    faults: tuple[Fault, ...] = ()
    made: dict[str, Any] = field(default_factory=dict)  # options of `prepare`

    @classmethod
    def read(cls, folder: Path) -> Dataset:
        """Raises ConfigError for a folder that holds none, or a damaged one."""
        try:
            data = json.loads(read_bounded(folder / FILE, _LIMIT))
            if data["format"] != FORMAT:
                raise ConfigError(f"{folder} has format {data['format']!r}, this version reads {FORMAT}")
            entries = tuple(Entry(**{**one, "notes": tuple(one["notes"])}) for one in data["calls"])
            faults = tuple(Fault(**one) for one in data["faults"])
            return cls(folder, data["codec"], data["tokenizer"], entries, faults, dict(data["made"]))
        except FileNotFoundError as error:
            raise ConfigError(f"{folder} is no prepared dataset: run `prepare` first") from error
        except OSError as error:
            raise ConfigError(f"{folder / FILE} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{folder / FILE} is damaged: run `prepare` again") from error

    def write(self) -> None:
        """Raises OSError."""
        content = {
            "format": FORMAT,
            "codec": self.codec,
            "tokenizer": self.tokenizer,
            "made": self.made,
            "calls": [dataclasses.asdict(entry) for entry in self.entries],
            "faults": [dataclasses.asdict(fault) for fault in self.faults],
        }
        with replacing(self.folder / FILE) as part:
            part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    def check_base(self, base: Base) -> None:
        """Raises ConfigError when it was prepared with another codec or tokenizer than the model's."""
        for what, mine, theirs in (
            ("codec", self.codec, base.codec),
            ("tokenizer", self.tokenizer, base.tokenizer),
        ):
            if mine != theirs:
                raise ConfigError(f"{self.folder} was prepared with another {what} than this model's")

    def user_wav(self, entry: Entry) -> Path:
        return self.folder / f"{entry.name}.user.wav"

    def arrays(self, entry: Entry, config: LMConfig) -> Arrays:
        """The call's tokens. Raises ConfigError for a damaged file."""
        return read_arrays(self.folder, entry, config)


@dataclass(frozen=True, eq=False)
class Arrays:
    """tokens int64 [17, frames], sounds bool [frames], voice int64 [8, F] or None."""

    tokens: NDArray[np.int64]
    sounds: NDArray[np.bool_]
    voice: NDArray[np.int64] | None = None


def write_arrays(folder: Path, name: str, arrays: Arrays) -> None:
    """Raises OSError."""
    content = {"tokens": arrays.tokens.astype(np.int32), "sounds": arrays.sounds}
    if arrays.voice is not None:
        content["voice"] = arrays.voice.astype(np.int16)
    with replacing(folder / f"{name}.npz") as part, part.open("wb") as file:
        np.savez_compressed(file, **content)  # type: ignore[arg-type]


def read_arrays(folder: Path, entry: Entry, config: LMConfig) -> Arrays:
    path = folder / f"{entry.name}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            tokens, sounds = file["tokens"].astype(np.int64), file["sounds"].astype(bool)
            voice = file["voice"].astype(np.int64) if entry.recorded_voice else None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
        raise ConfigError(f"{path} is missing or damaged: run `prepare` again") from error
    highest = np.full((STREAMS, 1), config.card - 1)
    highest[0] = config.text_card - 1
    whole = tokens.shape == (STREAMS, entry.frames) and sounds.shape == (entry.frames,)
    if not whole or (tokens < 0).any() or (tokens > highest).any():
        raise ConfigError(f"{path} does not hold what {FILE} says: run `prepare` again")
    return Arrays(tokens, sounds, voice)


def split(entries: Sequence[Entry], share: float, seed: int) -> tuple[list[Entry], list[Entry]]:
    """(trained on, held back): `share` of the calls at random, at least one of five or more."""
    order = np.random.default_rng(seed).permutation(len(entries))
    count = round(share * len(entries))
    if share > 0 and not count and len(entries) >= 5:
        count = 1
    held = {int(index) for index in order[:count]}
    trained = [entry for index, entry in enumerate(entries) if index not in held]
    if not trained:
        raise ConfigError(f"nothing is left to train on: {len(entries)} calls, {count} held back")
    return trained, [entry for index, entry in enumerate(entries) if index in held]
