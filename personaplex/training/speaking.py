"""Training of the mouth: `python -m personaplex.training.speaking FOLDER MINUTES` goes on from its
checkpoint.

FOLDER holds `agent/` (see corpus.py). The basis is fitted once, to `FOLDER/basis.pt`; the decoder's
checkpoint is `FOLDER/mouth.pt`.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from personaplex.config import CODEBOOKS, FRAME_SIZE
from personaplex.training import optim, spectra
from personaplex.training.articulation import SILENCE
from personaplex.training.corpus import load
from personaplex.training.export import CONFIG
from personaplex.training.mouth import HALF, LATE, Mouth, basis
from personaplex.training.run import Run, save

_HELD_BACK = 40  # utterances of the first shard, never trained on
_BATCH = {"cpu": 20, "cuda": 160}  # rows a step
_LENGTH = 56  # frames of a row
_FITTED = 3  # shards that the basis is fitted to
_QUIET = (0, 1, 2, 5)  # frames of silence before an utterance
_FULL_SCALE = 32_767.0
COMPRESS = 0.6  # power of a coefficient's size its error is divided by


@dataclass(frozen=True)
class Fitted:
    """What is computed once from the corpus."""

    basis: Tensor  # [coefficients, 960]
    size: Tensor  # [coefficients]: root mean square

    @classmethod
    def load(cls, path: Path) -> Fitted:
        state = torch.load(path, weights_only=True)
        return cls(state["basis"], state["size"])

    def save(self, path: Path) -> None:
        save(path, {"basis": self.basis, "size": self.size})

    def to(self, device: torch.device) -> Fitted:
        return Fitted(self.basis.to(device), self.size.to(device))


@dataclass(frozen=True)
class Frames:
    """Codes [..., F, 8] and the wave [..., F, 1920], int16, that they stand for."""

    codes: Tensor
    pcm: Tensor

    @property
    def wave(self) -> Tensor:
        """[..., F, 1920] float32."""
        return self.pcm.float() / _FULL_SCALE

    def to(self, device: torch.device) -> Frames:
        return Frames(self.codes.to(device), self.pcm.to(device))


def read(path: Path) -> list[Frames]:
    """The utterances of one shard."""
    return [
        Frames(
            torch.from_numpy(u.labels.reshape(-1, CODEBOOKS).astype(np.int64)),
            torch.from_numpy(u.wave.reshape(-1, FRAME_SIZE)),
        )
        for u in load(path)
    ]


class Speech:
    """Utterances one behind the other, in any order, with some silence between them."""

    def __init__(self, lengths: Sequence[int], draw: random.Random) -> None:
        """Silence with room for utterances of so many frames each, which `put` lays where they belong."""
        order = draw.sample(range(len(lengths)), len(lengths))
        self._starts = [0] * len(lengths)
        end = 0
        for index in order:
            self._starts[index] = end + draw.choice(_QUIET)
            end = self._starts[index] + lengths[index]
        end += _LENGTH  # of silence, so that even one utterance fills a row
        self.all = Frames(
            torch.full((end, CODEBOOKS), SILENCE, dtype=torch.uint8),
            torch.zeros(end, FRAME_SIZE, dtype=torch.int16),
        )

    @classmethod
    def of(cls, rows: Sequence[Frames], draw: random.Random) -> Speech:
        made = cls([len(row.codes) for row in rows], draw)
        for index, row in enumerate(rows):
            made.put(index, row)
        return made

    @classmethod
    def read(cls, folder: Path, draw: random.Random) -> Speech:
        """All shards but what is held back."""
        paths = sorted(folder.glob("agent-????.npz"))
        lengths = [frames_of(path) for path in paths]
        lengths[0] = lengths[0][_HELD_BACK:]
        firsts = [0, *itertools.accumulate(len(part) for part in lengths)]
        made = cls([length for part in lengths for length in part], draw)

        def lay(number: int) -> None:
            for index, row in enumerate(read(paths[number])[_HELD_BACK if number == 0 else 0 :]):
                made.put(firsts[number] + index, row)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(lay, range(len(paths))))
        return made

    def put(self, index: int, row: Frames) -> None:
        part = slice(self._starts[index], self._starts[index] + len(row.codes))
        self.all.codes[part], self.all.pcm[part] = row.codes.to(torch.uint8), row.pcm

    def to(self, device: torch.device) -> Speech:
        self.all = self.all.to(device)
        return self

    def rows(self, count: int, draw: random.Random) -> Frames:
        """[count, _LENGTH] frames, each row from anywhere; the sound LATE frames behind its codes."""
        starts = [draw.randrange(LATE, len(self.all.codes) - _LENGTH + 1) for _ in range(count)]
        index = torch.tensor(starts)[:, None] + torch.arange(_LENGTH)
        index = index.to(self.all.codes.device)
        return Frames(self.all.codes[index].long(), self.all.pcm[index - LATE])


def frames_of(path: Path) -> list[int]:
    """Frames of each utterance of a shard."""
    with np.load(path) as file:
        return (file["lengths"] // FRAME_SIZE).tolist()


def fit(rows: list[Frames]) -> Fitted:
    waves = torch.cat([row.wave for row in rows])
    vectors = basis(waves, 16 * CONFIG.mimi.filters)
    size = (waves.reshape(-1, HALF) @ vectors.t()).square().mean(0).sqrt() + 1e-4
    return Fitted(vectors, size)


@torch.no_grad()
def quality(mouth: Mouth, fitted: Fitted, loss: spectra.Loss, rows: list[Frames]) -> tuple[float, float]:
    """Mean errors of decoded utterances: of their spectra, relative, and of their levels in dB."""
    apart = level = 0.0
    for row in rows:
        row = row.to(fitted.basis.device)
        errors = loss(render(mouth, fitted, row.codes)[None], row.wave.reshape(1, -1))
        apart, level = apart + float(errors[0]), level + float(errors[1])
    return apart / len(rows), 10 / np.log(10) * level / len(rows)


def said(mouth: Mouth, fitted: Fitted, codes: Tensor) -> Tensor:
    """codes [N, T, 8] -> waves [N, T * 1920], LATE frames behind them."""
    return waves(fitted, mouth(codes))


def waves(fitted: Fitted, coefficients: Tensor) -> Tensor:
    """coefficients [N, 2 T, C] -> waves [N, T * 1920]."""
    made: Tensor = (coefficients * fitted.size**COMPRESS) @ fitted.basis
    return made.flatten(1)


@torch.no_grad()
def render(mouth: Mouth, fitted: Fitted, codes: Tensor) -> Tensor:
    """codes [T, 8] -> their wave [T * 1920], when all has been said."""
    behind = codes.new_full((LATE, CODEBOOKS), SILENCE)
    return said(mouth, fitted, torch.cat([codes, behind])[None])[0, LATE * FRAME_SIZE :]


def train(folder: Path, minutes: float, seed: int = 0) -> Mouth:
    """Trains for so many minutes in all, counting those of earlier runs."""
    torch.manual_seed(seed)
    device = optim.training_device()
    paths = sorted((folder / "agent").glob("agent-????.npz"))
    some = read(paths[0])
    held, known = some[:_HELD_BACK], some[_HELD_BACK : 2 * _HELD_BACK]
    if not (folder / "basis.pt").exists():
        fit([row for path in paths[:_FITTED] for row in read(path)]).save(folder / "basis.pt")
    fitted = Fitted.load(folder / "basis.pt").to(device)
    loss = spectra.Loss.of(torch.cat([row.wave.flatten() for row in held]).to(device))
    mouth = Mouth(CONFIG.mimi).to(device)
    optimizer = optim.Optimizer(mouth, muon=0.003, adam=1.5e-3, plain=[mouth.books, mouth.taps])
    speech = Speech.read(folder / "agent", random.Random(seed)).to(device)
    run = Run(folder / "mouth.pt", minutes, {"mouth": mouth, "optimizer": optimizer}, device)
    draw = random.Random(seed + run.step)
    while run.progress < 1:
        made = speech.rows(_BATCH[device.type], draw)
        with optim.precision(device):
            coefficients = mouth(made.codes)
        apart, level = loss(waves(fitted, coefficients.float()), made.wave.flatten(1))
        optimizer.step(apart + spectra.LEVEL_WEIGHT * level, optim.schedule(run.progress, decay_from=0.3))
        run.record({"spectra": apart, "level": level})
        if run.due():
            run.report(_measured("unseen", quality(mouth, fitted, loss, held)))
    run.report(
        _measured("unseen", quality(mouth, fitted, loss, held))
        | _measured("trained on", quality(mouth, fitted, loss, known))
    )
    return mouth


def _measured(name: str, errors: tuple[float, float]) -> dict[str, float]:
    return {f"spectra {name}": errors[0], f"dB {name}": errors[1]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), float(sys.argv[2]))
