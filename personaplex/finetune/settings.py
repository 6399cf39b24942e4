"""What decides a training run's result. Kept in its folder: only the same settings go on with it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personaplex.errors import ConfigError
from personaplex.files import read_bounded, replacing
from personaplex.finetune.batches import Weights

FILE = "settings.json"


@dataclass(frozen=True)
class Settings:
    """Of one run. An adapter adds `scale` times b a; `length` is that of a part of a call, in frames."""

    rank: int = 16
    scale: float = 2.0
    kinds: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    weights: Weights = Weights()
    length: int = 750
    batch: int = 8
    pieces: int = 1  # that a batch is run in, one after the other
    steps: int = 1_000
    warmup: int = 50
    rate: float = 2e-4
    decay: float = 0.0  # weight decay
    clip: float = 1.0  # largest norm of a step's gradient
    validation: float = 0.1
    rehearsal: float = 0.25
    seed: int = 0

    def described(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def digest(content: object) -> str:
    """Of anything JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def claim(folder: Path, described: dict[str, Any]) -> None:
    """Makes `folder` that of a run so described, or finds that it is already.

    Raises ConfigError when it holds a run with other settings, naming the first that differs; OSError.
    """
    path = folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(described, indent=1, sort_keys=True)
    if not path.exists():
        with replacing(path) as part:
            part.write_text(text + "\n", encoding="utf-8")
        return
    try:
        earlier = json.loads(read_bounded(path, 2**20))
        assert isinstance(earlier, dict)
    except (OSError, ValueError, AssertionError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: choose another folder") from error
    wanted = json.loads(text)
    for key in sorted({*earlier, *wanted}):
        if earlier.get(key) != wanted.get(key):
            raise ConfigError(
                f"{folder} holds a run with {key} = {json.dumps(earlier.get(key))}, and this one has "
                f"{json.dumps(wanted.get(key))}: go on as it was begun, or choose another folder"
            )
