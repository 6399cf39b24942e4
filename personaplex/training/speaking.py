"""Training of the mouth: `python -m personaplex.training.speaking FOLDER MINUTES` goes on from its
checkpoint.

FOLDER holds `agent/` (see corpus.py). Principal components, codebooks and the basis are fitted once, to
`FOLDER/analysis.pt`; the decoder's checkpoint is `FOLDER/mouth.pt`.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from personaplex.config import FRAME_SIZE
from personaplex.training import optim
from personaplex.training.corpus import as_float, load
from personaplex.training.export import CONFIG
from personaplex.training.lm import SILENCE
from personaplex.training.mouth import HALF, Analysis, Mouth, basis, features
from personaplex.training.run import Run, save

_HELD_BACK = 60  # utterances of the first shard, never trained on
_BATCH, _LENGTH = 16, 40  # utterances a step, frames of each
COMPRESS = 0.6  # power of a coefficient's size its error is divided by


@dataclass
class Fitted:
    """What is computed once from the corpus."""

    analysis: Analysis
    basis: Tensor  # [coefficients, 960]
    size: Tensor  # [coefficients]: root mean square

    @classmethod
    def load(cls, path: Path) -> Fitted:
        state = torch.load(path, weights_only=True)
        return cls(
            Analysis(state["mean"], state["components"], state["books"]), state["basis"], state["size"]
        )

    def save(self, path: Path) -> None:
        save(path, {**self.analysis.state_dict(), "basis": self.basis, "size": self.size})


@dataclass
class Frames:
    """One utterance: waves [F, 1920] and the features they were analysed into."""

    wave: Tensor
    features: Tensor


def read(folder: Path) -> tuple[list[Frames], list[Frames]]:
    """(trained on, held back)."""
    rows = [
        Frames(
            torch.from_numpy(as_float(u.wave).reshape(-1, FRAME_SIZE)),
            torch.from_numpy(features(as_float(u.wave), u.labels.astype(int))),
        )
        for path in sorted(folder.glob("agent-????.npz"))
        for u in load(path)
    ]
    return rows[_HELD_BACK:], rows[:_HELD_BACK]


def fit(rows: list[Frames], seed: int) -> Fitted:
    generator = torch.Generator().manual_seed(seed)
    analysis = Analysis.fit(torch.cat([r.features for r in rows]), generator)
    waves = torch.cat([r.wave for r in rows])
    vectors = basis(waves[:: max(1, len(waves) // 60_000)], 16 * CONFIG.mimi.filters)
    size = (waves[::10].reshape(-1, HALF) @ vectors.t()).square().mean(0).sqrt() + 1e-4
    return Fitted(analysis, vectors, size)


def sequence(row: Frames, codes: Tensor, draw: random.Random) -> tuple[Tensor, Tensor]:
    """(codes [L, 8], wave [L, 1920]) cut from an utterance, or with silence before and behind it."""
    lead = draw.choice((0, 0, 0, 3, 8))
    start = 0 if lead else draw.randrange(max(1, len(codes) - _LENGTH + 6))
    part, wave = codes[start : start + _LENGTH - lead], row.wave[start : start + _LENGTH - lead]
    rest = _LENGTH - lead - len(part)

    def quiet(count: int) -> tuple[Tensor, Tensor]:
        return torch.full((count, codes.shape[1]), SILENCE), torch.zeros(count, FRAME_SIZE)

    before, behind = quiet(lead), quiet(rest)
    return torch.cat([before[0], part, behind[0]]), torch.cat([before[1], wave, behind[1]])


@torch.no_grad()
def quality(mouth: Mouth, fitted: Fitted, rows: list[Frames]) -> float:
    """Signal to noise ratio in dB of decoded utterances."""
    signal = noise = 0.0
    for row in rows:
        decoded = render(mouth, fitted, fitted.analysis.codes(row.features))
        signal += float(row.wave.square().sum())
        noise += float((row.wave.flatten() - decoded).square().sum())
    return float(10 * np.log10(signal / noise))


@torch.no_grad()
def render(mouth: Mouth, fitted: Fitted, codes: Tensor) -> Tensor:
    """codes [T, 8] -> wave [T * 1920]."""
    out = mouth(fitted.analysis.vectors(codes)[None])[0] * fitted.size**COMPRESS
    return (out @ fitted.basis).flatten()


def train(folder: Path, minutes: float, seed: int = 0) -> Mouth:
    """Trains for so many minutes of a core in all, counting those of earlier runs."""
    torch.manual_seed(seed)
    trained, held = read(folder / "agent")
    if not (folder / "analysis.pt").exists():
        fit(trained, seed).save(folder / "analysis.pt")
    fitted = Fitted.load(folder / "analysis.pt")
    codes = [fitted.analysis.codes(row.features) for row in trained]
    mouth = Mouth(CONFIG.mimi)
    optimizer = optim.Optimizer(mouth, muon=0.003, adam=1.5e-3)
    run = Run(folder / "mouth.pt", minutes, {"mouth": mouth, "optimizer": optimizer})
    draw = random.Random(seed + run.step)
    while run.progress < 1:
        chosen = [draw.randrange(len(trained)) for _ in range(_BATCH)]
        pairs = [sequence(trained[i], codes[i], draw) for i in chosen]
        vectors = fitted.analysis.vectors(torch.stack([pair[0] for pair in pairs]))
        wave = torch.stack([pair[1] for pair in pairs]).reshape(_BATCH, -1, HALF)
        target = wave @ fitted.basis.t() / fitted.size**COMPRESS
        loss = (mouth(vectors + 0.02 * torch.randn_like(vectors)) - target).square().sum(-1).mean()
        optimizer.step(loss, optim.schedule(run.progress, decay_from=0.3))
        run.record({"loss": float(loss.detach())})
        if run.due():
            trained_on = quality(mouth, fitted, trained[:60])
            run.report({"dB unseen": quality(mouth, fitted, held), "dB trained on": trained_on})
    run.save()
    return mouth


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), float(sys.argv[2]))
