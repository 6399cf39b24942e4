"""Second stage of the language model: talk with sound, from what copying has learned.

`python -m personaplex.training.talking FOLDER MINUTES` goes on from `FOLDER/talk.pt`, or begins from
`FOLDER/copying.pt`. It needs the bank (see bank.py). Documents without sound stay in the mix, or copying
fades.
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

from personaplex.config import CODEBOOKS, TEXT_PAD
from personaplex.training import copying, optim
from personaplex.training.bank import Call, World, load_calls, load_ear, load_voices, load_worlds
from personaplex.training.documents import (
    HINTS,
    Batch,
    Codes,
    Document,
    answer_pieces,
    prompt,
    silence,
)
from personaplex.training.export import CONFIG
from personaplex.training.lm import CODES, Talker, precision, streams, training_device
from personaplex.training.run import Run
from personaplex.training.run import load as load_state
from personaplex.training.speaking import Fitted
from personaplex.training.vocabulary import Pieces, cached

_BATCH = 4
_TURNS = 3
_MIX = (0.08, 0.1, 0.12, 0.7)  # of repetition, dense, padded, talk
_INTERRUPTED = 0.2  # share of answers
_STOPS = 5  # frames from an interruption's begin to silence
_LEAD = 2  # frames by which a word's text leads its sound
_WAITING, _FIRST_PIECE, _FIRST_OF_SLOT = 0.3, 2.0, 3.0
_QUIET_AUDIBLE = 0.15  # share of the agent's silent frames that the depth transformer learns from


@dataclass(frozen=True)
class Bank:
    worlds: list[World]
    voices: dict[str, np.ndarray]
    calls: dict[str, list[Call]]


def talk(draw: random.Random, pieces: Pieces, bank: Bank, turns: int = _TURNS) -> Document:
    """A session: voice, role text, then questions and answers in time; some answers are interrupted."""
    world = draw.choice(bank.worlds)
    document = Document()
    prompt(document, draw, pieces, world.known, sound=True, voice=draw.choice(list(bank.voices[world.voice])))
    calls = [draw.choice(bank.calls[draw.choice(list(world.answers))]) for _ in range(turns)]
    if draw.random() < 0.5:
        _listen(document, _tail(calls[0], draw, draw.randint(3, 40)))
    heard = 0
    for turn, call in enumerate(calls):
        follower = calls[turn + 1] if turn + 1 < turns and draw.random() < _INTERRUPTED else None
        heard = _turn(document, draw, pieces, world, call, heard, follower)
    return document


def _turn(
    document: Document,
    draw: random.Random,
    pieces: Pieces,
    world: World,
    call: Call,
    heard: int,
    follower: Call | None,
) -> int:
    """The caller speaks, of whose words `heard` frames are over, then the agent, then nobody for a while.

    With a `follower` the next question begins during the answer, which soon ends; how many of its frames are
    over then is what is returned.
    """
    said = world.answers[call.intent]
    wait = max(heard, call.spoken + draw.randint(2, 5))
    _listen(document, call.codes[heard:wait])
    text, weight, slot = answer_text(pieces, call.intent, world, said.words)
    sounding = _LEAD - 1 + len(said.codes)  # the text begins before the sound
    length = max(sounding, len(text)) + 1
    agent = silence(length)
    agent[_LEAD - 1 : sounding] = said.codes
    begun = length
    if follower is not None:
        begun = draw.randint(4, max(5, sounding - 8))
        length = min(length, begun + _STOPS + 1, begun + follower.spoken)
        agent[begun + _STOPS :] = silence(1)
        kept = begun + _STOPS - _LEAD
        text, weight, slot = text[:kept], weight[:kept], slot[:kept]
    text = text[:length] + [TEXT_PAD] * (length - len(text))
    weight = weight[:length] + [_WAITING] * (length - len(weight))
    slot = slot[:length] + [0] * (length - len(slot))
    user = _tail(call, draw, min(begun, length), wait)
    if follower is not None:
        user = np.concatenate([user, follower.codes[: length - len(user)]])
    audible = [1.0] * min(length, sounding + 1)
    audible += [0.2] * (length - len(audible))
    document.add(text, weight, slot=slot, agent=agent[:length], user=user, audible=audible)
    if follower is not None:
        return length - min(begun, length)
    _listen(document, _tail(call, draw, draw.randint(4, 20)))
    return 0


def answer_text(
    pieces: Pieces, intent: str, world: World, starts: list[int]
) -> tuple[list[int], list[float], list[int]]:
    """The text stream of an answer: each word's pieces where the word begins, less the lead already given."""
    text: list[int] = []
    weight: list[float] = []
    slot: list[int] = []
    for (_, ids, place), start in zip(answer_pieces(pieces, intent, world.known), starts, strict=True):
        gap = max(0, start - 1 - len(text))
        first = _FIRST_OF_SLOT if place else _FIRST_PIECE if not text else 1.0
        text += [TEXT_PAD] * gap + ids
        weight += [_WAITING] * gap + [first] + [1.0] * (len(ids) - 1)
        slot += [0] * gap + [place] * len(ids)
    return text, weight, slot


def _listen(document: Document, user: Codes) -> None:
    """The agent is silent while `user` is heard."""
    count = len(user)
    document.add([TEXT_PAD] * count, _WAITING, agent=silence(count), user=user, audible=0.05)


def _tail(call: Call, draw: random.Random, count: int, start: int | None = None) -> Codes:
    """`count` frames of the caller's silence, from `start` or anywhere, over again where they end."""
    quiet = call.codes[call.spoken + 4 :]
    index = np.arange(count) + draw.randrange(len(quiet))
    frames = quiet[index % len(quiet)]
    if start is not None:
        kept = (
            call.codes[start : start + min(count, call.spoken + 4 - start)]
            if start < call.spoken + 4
            else quiet[:0]
        )
        frames = np.concatenate([kept, frames])[:count]
    return frames


def loss(talker: Talker, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """(loss, its parts) of documents with sound."""
    audio = streams(batch.agent, batch.user)
    audio = torch.where(batch.agent[..., :1] < 0, -1, audio)  # padding behind the shorter documents
    hidden = talker.temporal(batch.text[:, :-1], audio[:, :-1])
    logits = talker.text_logits(hidden)
    each = F.cross_entropy(logits.flatten(0, 1).float(), batch.text[:, 1:].flatten(), reduction="none")
    weight = batch.weight[:, 1:].flatten()
    text = (each * weight).sum() / weight.sum()

    audible = batch.audible[:, 1:]
    valid = (audible > 0) & (audio[:, 1:, :CODEBOOKS] >= 0).all(-1)
    chosen = valid & ((audible > 0.5) | (torch.rand(audible.shape, device=audible.device) < _QUIET_AUDIBLE))
    targets = audio[:, 1:, :CODEBOOKS][chosen]
    targets = targets.clamp(max=CODES)
    depth = talker.depth(hidden[chosen], batch.text[:, 1:][chosen], targets)
    codes = F.cross_entropy(depth.flatten(0, 1).float(), targets.t().flatten(), reduction="none").view(
        CODEBOOKS, -1
    )
    loud = (targets < CODES).all(-1)
    levels = codes[:, loud].mean(1)
    parts = {"text": text, "first": levels[0], "second": levels[1], "last": levels[-1]}
    slots = each.view(batch.slot[:, 1:].shape)[batch.slot[:, 1:] > 0]
    parts["slots"] = slots.mean()
    emphasis = torch.linspace(1.4, 0.6, CODEBOOKS, device=codes.device)[:, None]
    total = text + 0.25 * (codes * emphasis).mean()
    return total, {name: float(value.detach()) for name, value in parts.items()}


@torch.no_grad()
def start_from(talker: Talker, folder: Path) -> None:
    """Copying's weights, and audio tables that begin as projections of what their codes mean."""
    state = load_state(folder / "copying.pt")
    if state is None:
        raise FileNotFoundError("no copying.pt: train copying first")
    talker.load_state_dict(state["talker"])
    ear, fitted = load_ear(folder), Fitted.load(folder / "analysis.pt")
    generator = torch.Generator().manual_seed(7)
    for side, books in ((0, fitted.analysis.books), (1, ear.books)):
        size = sum(book.var(0).sum() for book in books) ** 0.5
        for width, tables in (
            (CONFIG.lm.temporal.dim, talker.lm.emb),
            (CONFIG.lm.depth.dim, talker.lm.depformer_emb),
        ):
            project = torch.randn(books.shape[2], width, generator=generator) / size * 0.6
            if width == CONFIG.lm.depth.dim and side == 1:
                continue
            for level in range(CODEBOOKS if width != CONFIG.lm.depth.dim else CODEBOOKS - 1):
                tables[side * CODEBOOKS + level].weight[:CODES] = books[level] @ project
    talker.keep_constant()


def train(folder: Path, minutes: float, seed: int = 0) -> Talker:
    """Trains for so many minutes of a core in all, counting those of earlier runs."""
    torch.manual_seed(seed)
    pieces, device = Pieces(cached(folder)), training_device()
    bank = Bank(load_worlds(folder), load_voices(folder), load_calls(folder))
    talker = Talker(CONFIG.lm, hints=len(HINTS)).to(device)
    talker.frugal = device.type == "cuda"
    optimizer = optim.Optimizer(talker, muon=0.6 * copying.MUON, adam=copying.ADAM, plain=talker.plain())
    run = Run(folder / "talk.pt", minutes, {"talker": talker, "optimizer": optimizer})
    if not run.step:
        start_from(talker, folder)
    draw, held = random.Random(seed + run.step), random.Random(999)
    tests = [Batch.of(copying.documents(2, held, pieces, unseen=True)).to(device) for _ in range(6)]
    while run.progress < 1:
        kind = draw.choices((0, 1, 2, 3), _MIX)[0]
        if kind < 3:
            batch = Batch.of(copying.documents(kind, draw, pieces)).to(device)
            with precision(device):
                total, _ = copying.text_loss(talker, batch)
            parts = {copying.KINDS[kind]: float(total.detach())}
        else:
            batch = Batch.of([talk(draw, pieces, bank) for _ in range(_BATCH)]).to(device)
            with precision(device):
                total, parts = loss(talker, batch)
        optimizer.step(total, optim.schedule(run.progress, warm=0.02, decay_from=0.3))
        talker.keep_constant()
        run.record(parts)
        if run.due():
            run.report({slot: right for slot, (right, _) in copying.exact_slots(talker, tests).items()})
    run.save()
    return talker


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), float(sys.argv[2]))
