"""Training of the mouth: `python -m personaplex.training.speaking FOLDER MINUTES` goes on from its
checkpoint.

FOLDER holds `agent/` (see corpus.py). The basis is fitted once, to `FOLDER/basis.pt`; the decoder's
checkpoint is `FOLDER/mouth.pt`.
"""

from __future__ import annotations

import random
import sys
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
from personaplex.training.mouth import HALF, Mouth, basis
from personaplex.training.run import Run, save

_HELD_BACK = 40  # utterances of the first shard, never trained on
_BATCH, _LENGTH = 20, 56  # rows a step, frames of each
_FITTED = 1_500  # utterances that the basis is fitted to
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


@dataclass(frozen=True)
class Frames:
    """One utterance: codes [F, 8] and the wave [F, 1920], int16, that they stand for."""

    codes: Tensor
    pcm: Tensor

    @property
    def wave(self) -> Tensor:
        """[F, 1920] float32."""
        return self.pcm.float() / _FULL_SCALE


def read(folder: Path) -> tuple[list[Frames], list[Frames]]:
    """(trained on, held back)."""
    rows = [
        Frames(
            torch.from_numpy(u.labels.reshape(-1, CODEBOOKS).astype(np.int64)),
            torch.from_numpy(u.wave.reshape(-1, FRAME_SIZE)),
        )
        for path in sorted(folder.glob("agent-????.npz"))
        for u in load(path)
    ]
    return rows[_HELD_BACK:], rows[:_HELD_BACK]


def fit(rows: list[Frames]) -> Fitted:
    waves = torch.cat([r.wave for r in rows[:: max(1, len(rows) // _FITTED)]])
    vectors = basis(waves, 16 * CONFIG.mimi.filters)
    size = (waves.reshape(-1, HALF) @ vectors.t()).square().mean(0).sqrt() + 1e-4
    return Fitted(vectors, size)


def sequence(rows: list[Frames], draw: random.Random) -> Frames:
    """_LENGTH frames: utterances one after the other with some silence between them."""
    codes, wave, length = [], [], 0
    while length < _LENGTH:
        row, quiet = draw.choice(rows), draw.choice((0, 1, 2, 5))
        codes += [torch.full((quiet, CODEBOOKS), SILENCE), row.codes]
        wave += [torch.zeros(quiet, FRAME_SIZE, dtype=torch.int16), row.pcm]
        length += quiet + len(row.codes)
    start = draw.randrange(length - _LENGTH + 1)
    part = slice(start, start + _LENGTH)
    return Frames(torch.cat(codes)[part], torch.cat(wave)[part])


@torch.no_grad()
def quality(mouth: Mouth, fitted: Fitted, loss: spectra.Loss, rows: list[Frames]) -> tuple[float, float]:
    """Mean errors of decoded utterances: of their spectra, relative, and of their levels in dB."""
    apart = level = 0.0
    for row in rows:
        errors = loss(said(mouth, fitted, row.codes[None]), row.wave.reshape(1, -1))
        apart, level = apart + float(errors[0]), level + float(errors[1])
    return apart / len(rows), 10 / np.log(10) * level / len(rows)


def said(mouth: Mouth, fitted: Fitted, codes: Tensor) -> Tensor:
    """codes [N, T, 8] -> waves [N, T * 1920]."""
    return waves(fitted, mouth(codes))


def waves(fitted: Fitted, coefficients: Tensor) -> Tensor:
    """coefficients [N, 2 T, C] -> waves [N, T * 1920]."""
    made: Tensor = (coefficients * fitted.size**COMPRESS) @ fitted.basis
    return made.flatten(1)


@torch.no_grad()
def render(mouth: Mouth, fitted: Fitted, codes: Tensor) -> Tensor:
    """codes [T, 8] -> wave [T * 1920]."""
    return said(mouth, fitted, codes[None])[0]


def train(folder: Path, minutes: float, seed: int = 0) -> Mouth:
    """Trains for so many minutes of a core in all, counting those of earlier runs."""
    torch.manual_seed(seed)
    trained, held = read(folder / "agent")
    if not (folder / "basis.pt").exists():
        fit(trained).save(folder / "basis.pt")
    fitted = Fitted.load(folder / "basis.pt")
    loss = spectra.Loss.of(torch.cat([row.wave.flatten() for row in held]))
    mouth = Mouth(CONFIG.mimi)
    optimizer = optim.Optimizer(mouth, muon=0.003, adam=1.5e-3, plain=[mouth.books, mouth.taps])
    run = Run(folder / "mouth.pt", minutes, {"mouth": mouth, "optimizer": optimizer})
    draw = random.Random(seed + run.step)
    while run.progress < 1:
        made = [sequence(trained, draw) for _ in range(_BATCH)]
        wanted = torch.stack([row.wave for row in made]).flatten(1)
        with optim.precision(wanted.device):
            coefficients = mouth(torch.stack([row.codes for row in made]))
        apart, level = loss(waves(fitted, coefficients.float()), wanted)
        optimizer.step(apart + spectra.LEVEL_WEIGHT * level, optim.schedule(run.progress, decay_from=0.3))
        run.record({"spectra": float(apart.detach()), "level": float(level.detach())})
        if run.due():
            run.report(_measured("unseen", quality(mouth, fitted, loss, held)))
    run.report(
        _measured("unseen", quality(mouth, fitted, loss, held))
        | _measured("trained on", quality(mouth, fitted, loss, trained[: len(held)]))
    )
    return mouth


def _measured(name: str, errors: tuple[float, float]) -> dict[str, float]:
    return {f"spectra {name}": errors[0], f"dB {name}": errors[1]}


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), float(sys.argv[2]))
