"""Training of the ear: `python -m personaplex.training.hearing FOLDER MINUTES` goes on from its checkpoint.

FOLDER holds `callers/` (see corpus.py); the checkpoint is `FOLDER/ear.pt`. Losses: the phone of each
moment, at 25 Hz before and behind the transformer and from the codes, and the intent from the codes.
Codebooks are fitted when a part of the time has passed and follow their clusters from then on.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from personaplex.config import FRAME_SIZE, SAMPLE_RATE
from personaplex.training import optim
from personaplex.training.corpus import Utterance, as_float, load
from personaplex.training.ear import LABELS, PER_FRAME, Ear, frames_of, phones_at
from personaplex.training.export import CONFIG
from personaplex.training.run import Run
from personaplex.training.synth import LABEL_RATE

UNLABELLED = -1
PHONES = 128  # more than the alphabet has
BATCH = 16
_DELAY = 0.10  # seconds a phone's label lags its sound in the codes
_QUANTISE_FROM = 0.35  # of the run
_LONGEST = 4.0  # seconds
_INTENTS = {label: index for index, label in enumerate(LABELS)}


@dataclass(frozen=True)
class Batch:
    wave: Tensor  # [N, T]
    early: Tensor  # [N, T25] phones at 25 Hz
    late: Tensor  # [N, T37.5] phones from the codes
    intent: Tensor  # [N], -1: none
    ends: Tensor  # [N] frames up to a little behind the last sound


class Noises:
    """Long noises of several colours to cut from, rms 1."""

    def __init__(self, rng: np.random.Generator, seconds: int = 30) -> None:
        count = seconds * SAMPLE_RATE
        frequency = np.maximum(np.fft.rfftfreq(count, 1 / SAMPLE_RATE), 20.0)
        self.waves = []
        for slope in (0.0, 0.5, 1.0):
            spectrum = np.fft.rfft(rng.standard_normal(count)) / frequency**slope
            wave = np.fft.irfft(spectrum, count)
            self.waves.append((wave / np.sqrt(np.mean(wave**2))).astype(np.float32))

    def cut(self, rng: np.random.Generator, count: int) -> np.ndarray:
        wave = self.waves[rng.integers(len(self.waves))]
        start = rng.integers(len(wave) - count)
        return wave[start : start + count]


def disturbed(
    wave: np.ndarray, noises: Noises, others: list[Utterance], rng: np.random.Generator, strength: float
) -> np.ndarray:
    """A caller's wave through a room, a microphone, a line and noise; `strength` 0 .. 1."""
    count = len(wave)
    spectrum = np.fft.rfft(wave)
    bins = len(spectrum)
    curve = np.interp(np.linspace(0, 6, bins), np.arange(7), rng.uniform(-7, 7, 7) * strength)
    if rng.random() < 0.3:
        cut = rng.uniform(3400, 9000) / (SAMPLE_RATE / 2)
        curve = np.where(np.linspace(0, 1, bins) > cut, curve - 40, curve)
    spectrum *= 10 ** (curve / 20)
    if rng.random() < 0.35 * strength:
        length = int(rng.uniform(0.1, 0.45) * SAMPLE_RATE)
        decay = np.exp(-6.9 * np.arange(length) / length)
        room = rng.standard_normal(length) * decay
        room *= rng.uniform(0.2, 0.8) / np.sqrt(np.sum(room**2))
        room[0] += 1
        spectrum *= np.fft.rfft(room, count) if length <= count else 1.0
    wave = np.fft.irfft(spectrum, count).astype(np.float32)
    level = np.sqrt(np.mean(wave**2)) + 1e-5
    if rng.random() < 0.75:
        ratio = rng.uniform(5 + 15 * (1 - strength), 42)
        wave = wave + noises.cut(rng, count) * np.float32(level * 10 ** (-ratio / 20))
    if rng.random() < 0.1:
        babble = as_float(others[rng.integers(len(others))].wave)[:count]
        wave[: len(babble)] += babble * np.float32(level / 0.08 * 10 ** (-rng.uniform(10, 25) / 20))
    return wave * np.float32(10 ** (rng.uniform(-14, 8) / 20))


def batch(
    chosen: list[Utterance],
    noises: Noises,
    others: list[Utterance],
    rng: np.random.Generator,
    strength: float,
) -> Batch:
    """Utterances behind up to 0.4 s of silence, disturbed, with their labels."""
    leads = rng.integers(0, int(0.4 * SAMPLE_RATE), len(chosen))
    frames = max(frames_of(lead + len(u.wave)) for lead, u in zip(leads, chosen, strict=True)) + 3
    wave = np.zeros((len(chosen), frames * FRAME_SIZE), np.float32)
    early, late, ends = [], [], []
    for row, (lead, u) in enumerate(zip(leads, chosen, strict=True)):
        wave[row, lead : lead + len(u.wave)] = as_float(u.wave)
        wave[row] = disturbed(wave[row], noises, others, rng, strength)
        begin = lead / SAMPLE_RATE
        early.append(
            phones_at(u.labels, (np.arange(2 * frames) + 0.5) / 25 - begin - 0.6 * _DELAY, LABEL_RATE)
        )
        times = (np.arange(PER_FRAME * frames) + 0.5) / (12.5 * PER_FRAME) - begin - _DELAY
        late.append(phones_at(u.labels, times, LABEL_RATE))
        if not len(u.labels):  # nobody knows its phones
            early[-1][:], late[-1][:] = UNLABELLED, UNLABELLED
        ends.append(min(frames, frames_of(lead + len(u.wave)) + 2))
    intents = [_INTENTS.get(u.intent, -1) for u in chosen]
    return Batch(
        torch.from_numpy(wave),
        torch.from_numpy(np.stack(early)),
        torch.from_numpy(np.stack(late)),
        torch.tensor(intents),
        torch.tensor(ends),
    )


def losses(ear: Ear, data: Batch, levels: int) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(loss, latents, parts by name); codes count once they are fitted."""
    latents, front, middle = ear.latent(data.wave)
    heard = latents
    commit = latents.new_zeros(())
    if ear.fitted:
        quantised = ear.vectors(ear.codes(latents.detach()), levels)
        commit = (latents - quantised).square().mean() / latents.detach().var()
        heard = latents + (quantised - latents).detach()
    heads = ear.heads(heard, front, middle, data.ends)
    early, middle_loss = phone_loss(heads.front, data.early), phone_loss(heads.middle, data.early)
    late = phone_loss(heads.codes, data.late)
    known = data.intent >= 0
    intent = (
        F.cross_entropy(heads.intent[known], data.intent[known], label_smoothing=0.05)
        if known.any()
        else late.new_zeros(())
    )
    right = (heads.intent[known].argmax(-1) == data.intent[known]).float().mean()
    sound = data.late > 0
    hit = (heads.codes.argmax(-1) == data.late)[sound].float().mean()
    loss = late + 0.3 * early + 0.3 * middle_loss + 0.4 * intent + 0.1 * commit
    parts = {"early": early, "late": late, "intent": intent, "right": right, "phones": hit, "commit": commit}
    return loss, latents.detach(), {name: float(value.detach()) for name, value in parts.items()}


def phone_loss(logits: Tensor, phones: Tensor) -> Tensor:
    """Cross entropy in which silence counts less and what is not labelled not at all."""
    flat = phones.flatten()
    each = F.cross_entropy(logits.flatten(0, 1), flat, reduction="none", ignore_index=UNLABELLED)
    weight = torch.where(flat > 0, 1.0, 0.4) * (flat != UNLABELLED)
    return (each * weight).sum() / weight.sum().clamp(min=1.0)


class Shelf:
    """The corpus in memory, sorted by length so that batches hold little padding; new shards are taken in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: set[Path] = set()
        self.utterances: list[Utterance] = []
        self.refresh()

    def refresh(self) -> None:
        fresh = [p for p in sorted(self.folder.glob("*-????.npz")) if p not in self.seen]
        for path in fresh:
            self.utterances += [u for u in load(path) if len(u.wave) < _LONGEST * SAMPLE_RATE]
            self.seen.add(path)
        if fresh:
            self.utterances.sort(key=lambda u: len(u.wave))

    def draw(self, draw: random.Random, count: int) -> list[Utterance]:
        width = 400
        start = draw.randrange(max(1, len(self.utterances) - width))
        return [
            self.utterances[min(len(self.utterances) - 1, start + draw.randrange(width))]
            for _ in range(count)
        ]


def train(folder: Path, minutes: float, seed: int = 0) -> Ear:
    """Trains for so many minutes of a core in all, counting those of earlier runs."""
    torch.manual_seed(seed)
    ear = Ear(CONFIG.mimi, PHONES)
    heads = [p for n, p in ear.named_parameters() if "head" in n]
    optimizer = optim.Optimizer(ear, muon=0.002, adam=1.5e-3, plain=[*heads, *ear.bank.parameters()])
    run = Run(folder / "ear.pt", minutes, {"ear": ear, "optimizer": optimizer})
    draw, rng = random.Random(seed + run.step), np.random.default_rng(seed + run.step)
    generator = torch.Generator().manual_seed(seed + run.step)
    shelf, noises = Shelf(folder / "callers"), Noises(rng)
    while run.progress < 1:
        strength = min(1.0, 0.25 + 3 * run.progress)
        data = batch(shelf.draw(draw, BATCH), noises, shelf.utterances, rng, strength)
        if run.progress > _QUANTISE_FROM and not ear.fitted:
            refit(ear, shelf, noises, draw, rng, generator)
        loss, latents, parts = losses(ear, data, 8 if draw.random() < 0.6 else draw.randint(1, 8))
        optimizer.step(loss, optim.schedule(run.progress))
        if ear.fitted and run.step % 3 == 0:
            ear.follow(latents.flatten(0, 1))
        run.record(parts)
        if run.due():
            run.report()
            shelf.refresh()
    run.save()
    return ear


@torch.no_grad()
def refit(
    ear: Ear,
    shelf: Shelf,
    noises: Noises,
    draw: random.Random,
    rng: np.random.Generator,
    generator: torch.Generator,
) -> None:
    """Codebooks by k-means on the latents of many disturbed utterances."""
    rows = [
        ear.latent(batch(shelf.draw(draw, 32), noises, shelf.utterances, rng, 0.7).wave)[0].flatten(0, 1)
        for _ in range(20)
    ]
    ear.fit(torch.cat(rows), generator)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), float(sys.argv[2]))
