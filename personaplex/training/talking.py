"""Second stage of the language model: talk with sound, from what copying has learned.

`python -m personaplex.training.talking FOLDER MINUTES` goes on from `FOLDER/talk.pt`, or begins from
`FOLDER/copying.pt`. It needs the words (see bank.py), no sound: the caller is the ear's states. Documents
without sound stay in the mix, or copying fades, and so does reading, or names that are new are mispronounced.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from personaplex.config import CODEBOOKS, TEXT_PAD
from personaplex.training import copying, grammar, optim
from personaplex.training.articulation import CODES, NAMES, codes, joined
from personaplex.training.bank import WORLDS, Word, Words, known_world
from personaplex.training.documents import (
    LEAD,
    Batch,
    Codes,
    Document,
    asked,
    heard,
    prompt,
    silence,
    written,
)
from personaplex.training.ear import LABELS, QUIET, SPEAKING
from personaplex.training.export import CONFIG
from personaplex.training.lm import Talker
from personaplex.training.reading import Reader
from personaplex.training.run import Run
from personaplex.training.run import load as load_state
from personaplex.training.vocabulary import Pieces, cached

_BATCH = 6
_TURNS = 3
_READ = 12  # documents of reading a step
_TIMES = {"cpu": 1, "cuda": 8}  # as many documents of each kind a step
_WORKERS = {"cpu": 0, "cuda": max(1, (os.cpu_count() or 2) - 3)}  # processes that lay documents out
_KINDS = (*copying.KINDS, "talk", "reading")
_MIX = (0.04, 0.08, 0.33, 0.55)
_INTERRUPTED = 0.15  # share of answers
_STOPS = 3  # frames from an interruption's begin to silence
_SURE = 2  # frames for which the ear tells the question before the agent answers
_KEPT = (8, 18)  # fewest and most frames for which it goes on telling
_DOUBTS = 0.15  # share of questions whose first frame tells another one
_WAVERS = 0.35  # share of answers during which the ear tells something else for a while, too late
_TOO_SOON = 0.2  # share of questions inside which a frame or two look like a question's end
_WAITING, _FIRST_PIECE, _FIRST_OF_SLOT = 0.3, 2.0, 3.0
_QUIET_AUDIBLE = 0.15  # share of the agent's silent frames that the depth transformer learns from


def talk(draw: random.Random, words: Words, turns: int = _TURNS, unseen: bool = False) -> Document:
    """A session: voice, role text, then questions and answers in time; some answers are interrupted."""
    known, role_text = grammar.world(draw, unseen=True) if unseen else known_world(draw.randrange(WORLDS))
    voice = draw.choice(NAMES)
    document = Document()
    prompt(document, words.pieces, role_text, sound=True, voice=draw.choice(words.samples(voice)))
    _listen(document, heard(draw.randint(2, 12), QUIET))
    for turn in range(turns):
        intent = draw.choice(LABELS)
        _ask(document, draw, intent)
        stop = turn + 1 < turns and draw.random() < _INTERRUPTED
        _answer(document, draw, words.answer(intent, known), voice, intent, stop)
    return document


def _ask(document: Document, draw: random.Random, intent: str) -> None:
    """The caller speaks until the ear has told the same question long enough."""
    count = draw.choice((draw.randint(4, 16), draw.randint(8, 40)))
    states = heard(count, SPEAKING)
    if draw.random() < 0.1 and count > 8:
        start = draw.randint(2, count - 3)
        states[start : start + draw.randint(1, 2)] = heard(1, QUIET)
    if draw.random() < _TOO_SOON:
        start = draw.choice((0, draw.randint(0, count - 3)))
        states[start : start + draw.randint(1, 2)] = asked(1, draw.choice(LABELS))
    sure = asked(_SURE, intent)
    if draw.random() < _DOUBTS:
        sure[:1] = asked(1, draw.choice(LABELS))
    _listen(document, np.concatenate([states, sure]))


def _answer(
    document: Document, draw: random.Random, said: list[Word], voice: str, intent: str, stop: bool
) -> None:
    """The agent answers; with `stop` the caller begins to speak and the agent falls silent."""
    sound = codes(joined([word.sound for word in said]), voice)
    length, kept = LEAD + len(sound) + 1, draw.randint(*_KEPT)
    agent = silence(length)
    agent[LEAD : LEAD + len(sound)] = sound
    text, weight, slot = _text(said, length)
    user = np.concatenate([_understood(draw, intent, kept), heard(max(0, length - kept), QUIET)])[:length]
    audible = [1.0] * length
    if stop:
        begun = draw.randint(4, max(5, length - 6))
        length = min(length, begun + _STOPS + 2)
        user[begun:] = heard(1, SPEAKING)
        agent[begun + _STOPS :] = silence(1)
        for index in range(begun + _STOPS - LEAD, length):
            text[index], weight[index], slot[index] = TEXT_PAD, 1.0, 0
    document.add(
        text[:length], weight[:length], slot=slot[:length], agent=agent[:length], user=user[:length],
        audible=audible[:length],
    )  # fmt: skip
    if not stop:
        rest = max(0, kept - length)
        _listen(document, np.concatenate([asked(rest, intent), heard(draw.randint(3, 20), QUIET)]))


def _understood(draw: random.Random, intent: str, kept: int) -> Codes:
    """The caller's codes behind a question; the ear may waver, which comes too late."""
    states = asked(kept, intent)
    if draw.random() < _WAVERS:
        start = draw.randrange(kept)
        other = heard(1, SPEAKING) if draw.random() < 0.15 else asked(1, draw.choice(LABELS))
        states[start : start + draw.choice((1, 2, 5, kept))] = other
    return states


def _text(said: list[Word], length: int) -> tuple[list[int], list[float], list[int]]:
    """The text stream of an answer: each word's pieces ahead of its sound."""
    text, weight, slot = [TEXT_PAD] * length, [_WAITING] * length, [0] * length
    sounds = [0, *itertools.accumulate(len(word.sound) for word in said)][:-1]
    begins = written([word.pieces for word in said], sounds)
    for index, (word, begin) in enumerate(zip(said, begins, strict=True)):
        for offset, piece in enumerate(word.pieces):
            text[begin + offset], weight[begin + offset], slot[begin + offset] = piece, 1.0, word.slot
        weight[begin] = _FIRST_OF_SLOT if word.slot else 1.0 if index else _FIRST_PIECE
    return text, weight, slot


def _listen(document: Document, user: Codes) -> None:
    """The agent is silent while `user` is heard."""
    count = len(user)
    document.add([TEXT_PAD] * count, _WAITING, agent=silence(count), user=user, audible=0.05)


def loss(talker: Talker, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, its parts) of documents with sound."""
    audio = batch.audio
    hidden = talker.temporal(batch.text[:, :-1], audio[:, :-1])
    logits = talker.text_logits(hidden)
    each = F.cross_entropy(logits.flatten(0, 1).float(), batch.text[:, 1:].flatten(), reduction="none")
    weight = batch.weight[:, 1:].flatten()
    text = (each * weight).sum() / weight.sum().clamp(min=1.0)

    audible = batch.audible[:, 1:]
    valid = (audible > 0) & (audio[:, 1:, :CODEBOOKS] >= 0).all(-1)
    chosen = valid & ((audible > 0.5) | (torch.rand(audible.shape, device=audible.device) < _QUIET_AUDIBLE))
    targets = audio[:, 1:, :CODEBOOKS][chosen].clamp(max=CODES)
    depth = talker.depth(hidden[chosen], batch.text[:, 1:][chosen], targets)
    wrong = F.cross_entropy(depth.flatten(0, 1).float(), targets.t().flatten(), reduction="none")
    levels = wrong.view(CODEBOOKS, -1).mean(1)
    slots = each.view(batch.slot[:, 1:].shape)[batch.slot[:, 1:] > 0].mean()
    parts = {"text": text, "slots": slots, "phones": levels[:4].mean(), "next": levels[4],
             "periods": levels[5], "loudness": levels[6], "voice": levels[7]}  # fmt: skip
    total = text + 0.5 * levels.mean()
    return total, {name: value.detach() for name, value in parts.items()}


def start_from(talker: Talker, folder: Path) -> None:
    """Copying's weights."""
    state = load_state(folder / "copying.pt")
    if state is None:
        raise FileNotFoundError("no copying.pt: train copying first")
    talker.load_state_dict(state["talker"])
    talker.keep_constant()


class Course(IterableDataset[tuple[str, Batch]]):
    """Batches without end, kinds of documents by their shares; each worker of a loader has its own."""

    def __init__(self, words: Words, reader: Reader, times: int, seed: int) -> None:
        self.words, self.reader, self.times, self.seed = words, reader, times, seed

    def __iter__(self) -> Iterator[tuple[str, Batch]]:
        worker = get_worker_info()
        draw = random.Random(self.seed * 1_000 + (worker.id if worker else 0))
        while True:
            kind = draw.choices(_KINDS, _MIX)[0]
            yield kind, Batch.of(self._documents(kind, draw))

    def _documents(self, kind: str, draw: random.Random) -> list[Document]:
        if kind in copying.KINDS:
            number = copying.KINDS.index(kind)
            return [d for _ in range(self.times) for d in copying.documents(number, draw, self.words.pieces)]
        if kind == "reading":
            return [self.reader.document(draw) for _ in range(self.times * _READ)]
        return [talk(draw, self.words) for _ in range(self.times * _BATCH)]


def train(folder: Path, minutes: float, seed: int = 0) -> Talker:
    """Trains for so many minutes in all, counting those of earlier runs."""
    torch.manual_seed(seed)
    words, device = Words(folder, Pieces(cached(folder))), optim.training_device()
    talker = Talker(CONFIG.lm).to(device)
    talker.frugal = optim.short_of_memory(device)
    optimizer = optim.Optimizer(talker, muon=0.6 * copying.MUON, adam=copying.ADAM, plain=talker.plain())
    held, reader = random.Random(999), Reader(folder, words)
    tests = [Batch.of([talk(held, words, unseen=True) for _ in range(_BATCH)]).to(device) for _ in range(5)]
    run = Run(folder / "talk.pt", minutes, {"talker": talker, "optimizer": optimizer}, device)
    if not run.step:
        start_from(talker, folder)
    course = Course(words, reader, _TIMES[device.type], seed + run.step)
    batches = iter(DataLoader(course, batch_size=None, num_workers=_WORKERS[device.type]))
    while run.progress < 1:
        kind, batch = next(batches)
        batch = batch.to(device)
        with optim.precision(device):
            if kind in copying.KINDS:
                total, _ = copying.text_loss(talker, batch)
                parts = {kind: total}
            else:
                total, parts = loss(talker, batch)
        optimizer.step(total, optim.schedule(run.progress, warm=0.02, decay_from=0.3))
        talker.keep_constant()
        run.record({"reading": parts["phones"]} if kind == "reading" else parts)
        if run.due():
            run.report(measured(talker, tests))
    run.report(measured(talker, tests))
    return talker


@torch.no_grad()
def measured(talker: Talker, tests: list[Batch]) -> dict[str, float]:
    """Values copied whole, and losses, on talks about unseen facts."""
    slots = {slot: right for slot, (right, _) in copying.exact_slots(talker, tests).items()}
    losses = [loss(talker, batch)[1] for batch in tests]
    return slots | {
        f"{name} unseen": float(np.mean([float(row[name]) for row in losses])) for name in ("text", "phones")
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), float(sys.argv[2]))
