"""First stage of the language model: copying from the role text, in text alone.

`python -m personaplex.training.copying FOLDER MINUTES` goes on from `FOLDER/copying.pt`. It begins with
pure repetition and goes on to dense documents when that is learned.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from personaplex.training import optim
from personaplex.training.documents import SLOTS, Batch, Document, dense, repetition
from personaplex.training.export import CONFIG
from personaplex.training.lm import Talker
from personaplex.training.run import Part, Run
from personaplex.training.vocabulary import Pieces, cached

MUON, ADAM = 0.006, 2e-3
KINDS = ("repetition", "dense")
_BATCH = 6
_REPETITION_DONE = 0.8  # loss that ends the first stage
_MIX = ((1.0, 0.0), (0.12, 0.88))  # of repetition and dense by stage


def text_loss(talker: Talker, batch: Batch) -> tuple[Tensor, Tensor]:
    """(weighted mean, the loss of each predicted text [N, T - 1]) of documents without sound."""
    hidden = talker.temporal(batch.text[:, :-1], batch.audio[:, :-1])
    each = F.cross_entropy(
        talker.text_logits(hidden).flatten(0, 1).float(), batch.text[:, 1:].flatten(), reduction="none"
    ).view(batch.text[:, 1:].shape)
    weight = batch.weight[:, 1:]
    return (each * weight).sum() / weight.sum(), each


def documents(kind: int, draw: random.Random, pieces: Pieces, unseen: bool = False) -> list[Document]:
    if kind == 0:
        return [repetition(draw, pieces) for _ in range(_BATCH)]
    return [dense(draw, pieces, unseen) for _ in range(_BATCH)]


@torch.no_grad()
def exact_slots(talker: Talker, batches: list[Batch]) -> dict[str, tuple[float, int]]:
    """Share of copied values of which every piece is the likeliest, by slot, and how many there were."""
    right: dict[str, list[bool]] = {slot: [] for slot in SLOTS}
    for batch in batches:
        hidden = talker.temporal(batch.text[:, :-1], batch.audio[:, :-1])
        hits = talker.text_logits(hidden).argmax(-1) == batch.text[:, 1:]
        for row, slots in zip(hits.tolist(), batch.slot[:, 1:].tolist(), strict=True):
            _count(row, slots, right)
    return {slot: (sum(r) / len(r), len(r)) for slot, r in right.items() if r}


def _count(hits: list[bool], slots: list[int], right: dict[str, list[bool]]) -> None:
    """Each run of one slot is one value; padding between its words does not end it."""
    current, good, gap = 0, True, 0
    for hit, slot in zip([*hits, True], [*slots, -1], strict=True):
        if slot == 0 and current and gap < 12:
            gap += 1
            continue
        if slot != current:
            if current:
                right[SLOTS[current - 1]].append(good)
            current, good = max(slot, 0), True
        gap = 0
        if slot > 0:
            good = good and hit


def train(folder: Path, minutes: float, seed: int = 0) -> Talker:
    """Trains for so many minutes in all, counting those of earlier runs."""
    torch.manual_seed(seed)
    pieces, device = Pieces(cached(folder)), optim.training_device()
    talker = Talker(CONFIG.lm).to(device)
    talker.frugal = optim.short_of_memory(device)
    optimizer = optim.Optimizer(talker, muon=MUON, adam=ADAM, plain=talker.plain())
    parts: dict[str, Part] = {"talker": talker, "optimizer": optimizer}
    run = Run(folder / "copying.pt", minutes, parts, device, stage=0, reached=6.0)
    draw, held = random.Random(seed + run.step), random.Random(999)
    tests = [Batch.of(documents(1, held, pieces, unseen=True)).to(device) for _ in range(6)]
    while run.progress < 1:
        stage, reached = run.extra["stage"], run.extra["reached"]
        kind = draw.choices((0, 1), _MIX[stage])[0]
        batch = Batch.of(documents(kind, draw, pieces)).to(device)
        with optim.precision(device):
            loss, each = text_loss(talker, batch)
        optimizer.step(loss, optim.schedule(run.progress, warm=0.005, decay_from=0.35))
        talker.keep_constant()
        slots = float(each.detach()[batch.slot[:, 1:] > 0].mean())
        if kind == 0:
            run.extra["reached"] = 0.97 * reached + 0.03 * slots
        run.extra["stage"] = max(stage, int(run.extra["reached"] < _REPETITION_DONE))
        run.record({KINDS[kind]: slots})
        if run.due():
            run.report({slot: right for slot, (right, _) in exact_slots(talker, tests).items()})
    run.save()
    return talker


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), float(sys.argv[2]))
