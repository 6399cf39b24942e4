"""Training of the ear: `python -m personaplex.training.hearing FOLDER MINUTES` goes on from its checkpoint.

FOLDER holds `callers/` (see corpus.py); the checkpoint is `FOLDER/ear.pt`. A row of a batch is two callers
one after the other. Losses: the state of each frame, that a question is over whatever it was, the phones at
25 Hz before and behind the transformer where they are known, and the intent as it can be guessed from the
question's end on.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from personaplex.config import FRAME_SECONDS, FRAME_SIZE, SAMPLE_RATE
from personaplex.training import grammar, optim
from personaplex.training.corpus import OTHER, Utterance, as_float, load
from personaplex.training.ear import ASKED, LABELS, QUIET, SPEAKING, Ear, frames_of, phones_at
from personaplex.training.export import EAR
from personaplex.training.grammar import UNKNOWN
from personaplex.training.run import Run
from personaplex.training.run import load as load_state
from personaplex.training.synth import LABEL_RATE, Array
from personaplex.training.unseen import paused

UNLABELLED = -1
PHONES = 128  # more than the alphabet has
ROWS = 8
_DELAY = 0.10  # seconds a phone's label lags its sound behind the transformer
_LONGEST = 4.0  # seconds
_INTENTS = {label: index for index, label in enumerate(LABELS)}
_SURE = 0.56  # seconds of silence that end a question; a pause inside one is shorter
_UNSURE = 0.44  # from here to there either state may be told
_KEPT = 1.6  # seconds for which a question's intent stands
_GUESSED = (-0.15, 0.9)  # seconds around a question's end at which its intent should be known
_SOURCES = {"callers": 0.4, "robots": 0.14, "joe": 0.16, "festival": 0.12, "kokoro": 0.18}
# How much faster, and with it higher, a source's few voices may be made: men's sooner than women's.
_RATES = {"joe": (0.85, 1.35), "festival": (0.85, 1.35), "kokoro": (0.74, 1.15)}
_ANY_RATE = (0.86, 1.17)
_STRONGEST = 0.7  # disturbance
_PAUSED = 0.15  # share of callers without phones who pause inside a sentence
_NO_QUESTION = 0.12  # share of speech for the phones' sake


@dataclass(frozen=True)
class Batch:
    wave: Tensor  # [N, samples]
    early: Tensor  # [N, T25] phones at 25 Hz
    late: Tensor  # [N, T25] the same, _DELAY later
    guess: Tensor  # [N, T25] intents near the questions' ends
    state: Tensor  # [N, T] the first level's codes


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
    rows: list[list[Utterance]],
    noises: Noises,
    others: list[Utterance],
    rng: np.random.Generator,
    strength: float,
) -> Batch:
    """Rows of utterances one after the other, disturbed, with their labels."""
    placed = [_place(row, rng) for row in rows]
    frames = max(frames_of(end) for *_, end in placed)
    wave = np.zeros((len(rows), frames * FRAME_SIZE), np.float32)
    marks = [_Marks(frames) for _ in rows]
    for index, (speech, starts, rates, _) in enumerate(placed):
        for said, start, rate, utterance in zip(speech, starts, rates, rows[index], strict=True):
            wave[index, start : start + len(said)] = said
            marks[index].add(utterance, start / SAMPLE_RATE, len(said) / SAMPLE_RATE, rate)
        wave[index] = disturbed(wave[index], noises, others, rng, strength)
    columns = (np.stack([getattr(m, name) for m in marks]) for name in ("early", "late", "guess", "state"))
    return Batch(torch.from_numpy(wave), *(torch.from_numpy(column) for column in columns))


def _place(row: list[Utterance], rng: np.random.Generator) -> tuple[list[Array], list[int], list[float], int]:
    """(waves at some other pitch and pace, their starts, how much faster each is, where the row ends)."""
    speech, starts, rates = [], [], []
    now = int(rng.uniform(0.0, 0.5) * SAMPLE_RATE)
    for utterance in row:
        rate = float(rng.uniform(*_RATES.get(utterance.source, _ANY_RATE))) if rng.random() < 0.7 else 1.0
        wave = as_float(utterance.wave)
        if not len(utterance.labels) and rng.random() < _PAUSED:
            wave = paused(wave, rng.uniform(0.2, 0.5))
        if rate != 1.0:
            wave = np.interp(np.arange(0, len(wave) - 1, rate), np.arange(len(wave)), wave).astype(np.float32)
        speech.append(wave)
        starts.append(now)
        rates.append(rate)
        gap = rng.uniform(2.0, 3.5) if rng.random() < 0.1 else rng.uniform(_SURE + 0.25, 1.5)
        now += len(wave) + int(gap * SAMPLE_RATE)
    return speech, starts, rates, now


class _Marks:
    """The labels of one row."""

    def __init__(self, frames: int) -> None:
        self.early = np.zeros(2 * frames, np.int64)
        self.late = np.zeros(2 * frames, np.int64)
        self.guess = np.full(2 * frames, UNLABELLED, np.int64)
        self.state = np.full(frames, QUIET, np.int64)
        self._heard = (np.arange(frames) + 1) * FRAME_SECONDS  # seconds heard at each frame's code
        self._columns = (np.arange(2 * frames) + 0.5) / 25

    def add(self, utterance: Utterance, start: float, length: float, rate: float) -> None:
        end = start + length
        for column, delay in ((self.early, 0.6 * _DELAY), (self.late, _DELAY)):
            times = self._columns - delay - start
            inside = (times >= 0) & (times < length)
            known = phones_at(utterance.labels, times * rate, LABEL_RATE)
            column[inside] = known[inside] if len(utterance.labels) else UNLABELLED
        intent = _INTENTS.get(utterance.intent, UNLABELLED)
        near = (self._columns > end + _GUESSED[0]) & (self._columns < end + _GUESSED[1])
        self.guess[near] = intent
        self._mark(start, start + 0.16, UNLABELLED)
        self._mark(start + 0.16, end + _UNSURE, SPEAKING)
        self._mark(end + _UNSURE, end + _SURE, UNLABELLED)
        self._mark(end + _SURE, end + _KEPT, UNLABELLED if intent < 0 else ASKED + intent)
        self._mark(end + _KEPT, end + _KEPT + 0.16, UNLABELLED)
        self._mark(end + _KEPT + 0.16, self._heard[-1] + 1, QUIET)

    def _mark(self, start: float, end: float, state: int) -> None:
        self.state[(self._heard > start) & (self._heard <= end)] = state


def losses(ear: Ear, data: Batch) -> tuple[Tensor, dict[str, float]]:
    """(loss, its parts and what is right)."""
    heard = ear(data.wave)
    early, late = (
        phone_loss(head(x), labels)
        for head, x, labels in (
            (ear.front_head, heard.front, data.early),
            (ear.middle_head, heard.middle, data.late),
        )
    )
    guess = F.cross_entropy(
        ear.guess_head(heard.middle).flatten(0, 1), data.guess.flatten(), ignore_index=UNLABELLED
    )
    states = heard.states.float()
    each = F.cross_entropy(
        states.flatten(0, 1), data.state.flatten(), ignore_index=UNLABELLED, reduction="none"
    ).view(data.state.shape)
    asked, turn = data.state >= ASKED, (data.state >= 0) & (data.state < ASKED)
    intent, taking = each[asked].mean(), each[turn].mean()
    over = (states.logsumexp(-1) - states[..., ASKED:].logsumexp(-1))[asked].mean()
    hit = states.argmax(-1) == data.state
    loss = 0.2 * early + 0.3 * late + 0.3 * guess + intent + 0.5 * taking + over
    parts = {"early": early, "late": late, "guess": guess, "intent": intent, "turn": taking, "over": over}
    shares = {"right": hit[asked].float().mean(), "turns right": hit[turn].float().mean()}
    return loss, {name: float(value.detach()) for name, value in (parts | shares).items()}


def phone_loss(logits: Tensor, phones: Tensor) -> Tensor:
    """Cross entropy in which silence counts less and what is not labelled not at all."""
    flat = phones.flatten()
    each = F.cross_entropy(logits.flatten(0, 1), flat, reduction="none", ignore_index=UNLABELLED)
    weight = torch.where(flat > 0, 1.0, 0.4) * (flat != UNLABELLED)
    return (each * weight).sum() / weight.sum().clamp(min=1.0)


class Shelf:
    """The corpus in memory by source and intent; new shards are taken in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: set[Path] = set()
        self.utterances: list[Utterance] = []
        self._by: dict[tuple[str, str], list[Utterance]] = {}
        self.refresh()

    def refresh(self) -> None:
        for path in sorted(self.folder.glob("*-????.npz")):
            if path in self.seen:
                continue
            source = path.name.split("-")[0]
            for utterance in load(path):
                if len(utterance.wave) < _LONGEST * SAMPLE_RATE:
                    self._add(source, utterance)
            self.seen.add(path)

    def _add(self, source: str, utterance: Utterance) -> None:
        """On the pile of the intent that the grammar gives it now, whatever it had when it was spoken."""
        intent = utterance.intent
        if intent not in (OTHER, UNKNOWN):
            intent = grammar.intent_of_question(utterance.text) or OTHER
        utterance = dataclasses.replace(utterance, intent=intent, source=source)
        self.utterances.append(utterance)
        self._by.setdefault((source, utterance.intent), []).append(utterance)

    def draw(self, draw: random.Random) -> Utterance:
        """One utterance, sources by their shares, intents all alike."""
        there = [name for name in _SOURCES if any(source == name for source, _ in self._by)]
        source = draw.choices(there, [_SOURCES[name] for name in there])[0]
        if (source, OTHER) in self._by and draw.random() < _NO_QUESTION:
            return draw.choice(self._by[source, OTHER])
        return draw.choice(self._by[source, draw.choice((*LABELS, *grammar.INTENTS))])

    def rows(self, draw: random.Random, count: int) -> list[list[Utterance]]:
        """Rows of two, alike in length, so that a batch holds little padding."""
        drawn = [[self.draw(draw), self.draw(draw)] for _ in range(4 * count)]
        drawn.sort(key=lambda row: sum(len(u.wave) for u in row))
        start = draw.randrange(3 * count + 1)
        return drawn[start : start + count]


def train(folder: Path, minutes: float, seed: int = 0) -> Ear:
    """Trains for so many minutes in all, counting those of earlier runs."""
    torch.manual_seed(seed)
    ear = Ear(EAR, PHONES)
    heads = [p for n, p in ear.named_parameters() if "head" in n or "first_in" in n]
    optimizer = optim.Optimizer(ear, muon=0.002, adam=1.5e-3, plain=[*heads, *ear.bank.parameters()])
    run = Run(folder / "ear.pt", minutes, {"ear": ear, "optimizer": optimizer})
    draw, rng = random.Random(seed + run.step), np.random.default_rng(seed + run.step)
    shelf, noises = Shelf(folder / "callers"), Noises(rng)
    while run.progress < 1:
        strength = min(_STRONGEST, 0.25 + 3 * run.progress)
        data = batch(shelf.rows(draw, ROWS), noises, shelf.utterances, rng, strength)
        with optim.precision(data.wave.device):
            loss, parts = losses(ear, data)
        optimizer.step(loss, optim.schedule(run.progress))
        run.record(parts)
        if run.due():
            run.report()
            shelf.refresh()
    refit(ear.eval(), shelf, noises, draw, rng, torch.Generator().manual_seed(seed))
    run.save()
    return ear


def load_ear(folder: Path) -> Ear:
    """The ear as trained so far. Raises FileNotFoundError before there is one."""
    state = load_state(folder / "ear.pt")
    if state is None:
        raise FileNotFoundError("no ear.pt: train the ear first")
    ear = Ear(EAR, PHONES)
    ear.load_state_dict(state["ear"])
    return ear.eval()


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
        ear(batch(shelf.rows(draw, ROWS), noises, shelf.utterances, rng, 0.7).wave).rest.flatten(0, 1)
        for _ in range(20)
    ]
    ear.fit(torch.cat(rows), generator)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), float(sys.argv[2]))
