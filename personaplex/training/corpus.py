"""Shards of synthesised speech on disk: callers for the ear, the agent's sentences for the codec and the
model.

A shard is one `.npz`: all waves end to end as int16, their lengths, and what each says. Each is written
whole, from a seed of its own, so that a broken run goes on where it stopped. `python -m
personaplex.training.corpus callers|robots|agent FOLDER SHARDS [FIRST]`.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from personaplex.config import SAMPLE_RATE
from personaplex.training import grammar
from personaplex.training.articulation import NAMES, PERIODS, VOICES, codes, plan, said
from personaplex.training.others import SPEAKERS
from personaplex.training.synth import LABEL_RATE, Array, Speaker, caller, free, locked

CALLER_SHARD, AGENT_SHARD = 400, 300  # sentences run through the network a shard
OTHER_SHARD = {"robots": 1_000, "festival": 140, "joe": 140, "kokoro": 70}  # sentences
INTENTS = (*grammar.INTENTS, grammar.UNKNOWN)
OTHER = "other"  # speech for the phones' sake, in no dialogue
_VOICINGS, _AGENT_VOICINGS = 3, 2  # voices a sentence is said in
_ANY_WORDS = 0.75  # share of the agent's sentences that are names and words without an order
_ANY = (0.25, 0.2, 0.4, 0.15)  # of those: people's and made-up names, the dictionary's, its words, two in one
_CAPITALS = 0.6  # share of words spelled with a capital, as names are, whose pieces are others


@dataclass(frozen=True)
class Utterance:
    """One wave with what it says; `labels` are phones at LABEL_RATE (callers) or 8 codes a frame (agent)."""

    wave: NDArray[np.int16]
    labels: NDArray[np.uint8]
    text: str
    intent: str
    source: str = ""  # the kind of shard it lay in, where that matters


def save(path: Path, utterances: list[Utterance]) -> None:
    """Writes a shard; it is there whole or not at all."""
    part = path.with_suffix(".part.npz")
    arrays: dict[str, Any] = {
        "wave": np.concatenate([u.wave for u in utterances]),
        "lengths": np.array([len(u.wave) for u in utterances]),
        "labels": np.concatenate([u.labels for u in utterances]),
        "label_lengths": np.array([len(u.labels) for u in utterances]),
        "texts": np.array([u.text for u in utterances]),
        "intents": np.array([u.intent for u in utterances]),
    }
    np.savez(part, **arrays)
    os.replace(part, path)


def load(path: Path) -> list[Utterance]:
    with np.load(path) as file:
        waves = np.split(file["wave"], np.cumsum(file["lengths"])[:-1])
        labels = np.split(file["labels"], np.cumsum(file["label_lengths"])[:-1])
        rows = zip(waves, labels, file["texts"].tolist(), file["intents"].tolist(), strict=True)
        return [Utterance(*row) for row in rows]


def caller_sentence(draw: random.Random) -> tuple[str, str]:
    """(intent, text): a question, or speech for the phones' sake."""
    dice = draw.random()
    if dice < 0.55:
        intent = draw.choice((*grammar.INTENTS, grammar.UNKNOWN))
        return intent, grammar.question(draw, intent, unseen=False)
    if dice < 0.85:
        return OTHER, " ".join(draw.sample(grammar.lexicon(), draw.randint(1, 6)))
    known = grammar.facts(draw, unseen=False)
    lines = (
        f"my name is {known.name}",
        f"this is {known.name} from {known.firm}",
        f"i need the {known.item} for {grammar.spoken_number(known.price)} on {known.first_day}",
        grammar.answer(draw.choice(list(grammar.ANSWERS)), known),
    )
    return OTHER, draw.choice(lines)


def callers(speaker: Speaker, seed: int) -> Iterator[Utterance]:
    """One shard of callers, each sentence in several voices, silence trimmed."""
    draw, rng = random.Random(seed), np.random.default_rng(seed)
    for _ in range(CALLER_SHARD):
        intent, text = caller_sentence(draw)
        spoken = speaker.say(text, draw.uniform(0.75, 1.4))
        if spoken is None or not spoken.phones.any():
            continue
        said = np.nonzero(spoken.phones)[0]
        start, end = max(0, said[0] - 4), min(len(spoken.phones), said[-1] + 7)
        step = SAMPLE_RATE // LABEL_RATE
        for _ in range(_VOICINGS):
            wave = free(spoken, caller(draw), rng)[start * step : end * step]
            yield Utterance(as_int16(wave), spoken.phones[start:end], text, intent)


def others(by: str, seed: int) -> Iterator[Utterance]:
    """One shard of questions by another synthesiser, without phones: for intents."""
    draw = random.Random(f"{by} {seed}")
    for index in range(OTHER_SHARD[by]):
        intent = INTENTS[index % len(INTENTS)]
        text = grammar.question(draw, intent, unseen=False)
        yield Utterance(as_int16(SPEAKERS[by](text, draw)), np.zeros(0, np.uint8), text, intent)


def agent(speaker: Speaker, seed: int) -> Iterator[Utterance]:
    """One shard of the agent's sentences, locked, each in some of its voices."""
    draw = random.Random(seed)
    for sentence in grammar.sentences(draw, AGENT_SHARD, unseen=False):
        text = words_in_a_row(draw) if draw.random() < _ANY_WORDS else sentence
        spoken = speaker.say(text)
        if spoken is None:
            continue
        laid = plan(spoken)
        words = said(spoken, laid, speaker.names)
        for voice in draw.sample(NAMES, _AGENT_VOICINGS):
            made = codes(words, voice)
            wave = as_int16(locked(spoken, VOICES[voice], laid.place, made[:, PERIODS]))
            yield Utterance(wave, made.astype(np.uint8).ravel(), text, OTHER)


def words_in_a_row(draw: random.Random) -> str:
    """Names and words without an order: more kinds of sounds next to one another than answers have, and
    spellings of them that answers about new names will have."""
    return " ".join(any_word(draw) for _ in range(draw.randint(3, 6))) + "."


def any_word(draw: random.Random) -> str:
    """A name or a word, often with a capital."""
    names, others = grammar.dictionary()
    kinds = (
        lambda: grammar.name(draw, unseen=False),
        lambda: draw.choice(names),
        lambda: draw.choice(others),
        lambda: _spliced(draw, names, others),
    )
    word = draw.choices(kinds, _ANY)[0]()
    return word.capitalize() if draw.random() < _CAPITALS else word


def _spliced(draw: random.Random, *lists: tuple[str, ...]) -> str:
    """The head of one word and the tail of another: spelled like a word, in no dictionary."""
    while True:
        head, tail = (draw.choice(draw.choice(lists)).lower() for _ in range(2))
        word = head[: draw.randint(2, len(head))] + tail[draw.randrange(len(tail) - 1) :]
        if 3 < len(word) < 11 and not grammar.held_back(word):
            return word


def agent_says(speaker: Speaker, text: str, voice: str) -> tuple[Array, NDArray[np.int64]] | None:
    """(wave [F * 1920], codes [F, 8]) of a sentence; None where its words cannot be told apart."""
    spoken = speaker.say(text)
    if spoken is None:
        return None
    laid = plan(spoken)
    made = codes(said(spoken, laid, speaker.names), voice)
    return locked(spoken, VOICES[voice], laid.place, made[:, PERIODS]), made


def as_int16(wave: Array) -> NDArray[np.int16]:
    return np.asarray(np.clip(wave, -1, 1) * 32767, np.int16)


def as_float(wave: NDArray[np.int16]) -> Array:
    return np.asarray(wave / np.float32(32767), np.float32)


def make(kind: str, folder: Path, shards: int, first: int = 0) -> None:
    """Writes the shards that `folder` lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(first, first + shards):
        path = folder / f"{kind}-{seed:04}.npz"
        if path.exists():
            continue
        utterances = list(_made(kind, seed))
        save(path, utterances)
        print(f"{path.name}: {sum(len(u.wave) for u in utterances) / SAMPLE_RATE / 60:.1f} min", flush=True)


def _made(kind: str, seed: int) -> Iterator[Utterance]:
    if kind in SPEAKERS:
        return others(kind, seed)
    return {"callers": callers, "agent": agent}[kind](_speaker(), seed)


@cache
def _speaker() -> Speaker:
    return Speaker()


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]) if len(sys.argv) > 4 else 0)
