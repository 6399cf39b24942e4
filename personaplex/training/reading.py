"""Sentences read aloud: where the language model learns how words are spoken.

Talks are mostly silence, and their new words are people's names alone. Here the agent reads answers, and
names and words of the natural voice's dictionary in a row, one sentence behind the other. The text is given
and not learned from. No sound is made: of a sentence its phones and their times are kept.
"""

from __future__ import annotations

import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from personaplex.config import CODEBOOKS, SILENCE_FRAMES, TEXT_PAD
from personaplex.training import grammar
from personaplex.training.articulation import NAMES, Said, codes, plan, said
from personaplex.training.bank import Words
from personaplex.training.corpus import words_in_a_row
from personaplex.training.documents import Document, heard, silence
from personaplex.training.ear import QUIET
from personaplex.training.lm import SILENCE, START
from personaplex.training.vocabulary import Pieces, cached

LEAD = 2  # frames by which a word's text leads its sound
_LENGTH = 160  # frames, about, of a document
_SILENT_AUDIBLE = 0.05
_ANY_WORDS = 0.85  # share of sentences that are names and words without an order


@dataclass(frozen=True)
class Sentence:
    """`text` [F + LEAD] leads `said`, F frames, by LEAD frames."""

    text: list[int]
    said: Said


def sentence(words: Words, text: str) -> Sentence | None:
    """`text` from its first word to its last; None where its words cannot be told apart."""
    spoken = words.speaker.say(text)
    if spoken is None:
        return None
    ids = [words.pieces.encode(word) for word in text.split()]
    laid = plan(spoken, [len(word) for word in ids])
    first, end = laid.starts[0], laid.starts[-1]
    stream = [TEXT_PAD] * (end - first + LEAD)
    for word, start in zip(ids, laid.starts, strict=False):
        stream[start - first : start - first + len(word)] = word
    return Sentence(stream, said(spoken, laid, words.speaker.names).part(first, end))


def make(folder: Path, count: int, seed: int = 0) -> None:
    """Writes `FOLDER/reading.npz`, so many sentences, if it is not there."""
    path = folder / "reading.npz"
    if path.exists():
        return
    words, draw = Words(folder, Pieces(cached(folder))), random.Random(seed)
    answers = grammar.sentences(draw, count, unseen=False)
    drawn = (words_in_a_row(draw) if draw.random() < _ANY_WORDS else answer for answer in answers)
    made = [one for text in drawn if (one := sentence(words, text)) is not None]
    part = path.with_suffix(".part.npz")
    np.savez(
        part,
        texts=np.concatenate([np.asarray(one.text, np.int16) for one in made]),
        rows=np.concatenate([one.said.rows() for one in made]),
        lengths=np.array([len(one.said) for one in made]),
    )
    os.replace(part, path)


def load(folder: Path) -> list[Sentence]:
    with np.load(folder / "reading.npz") as file:
        lengths = file["lengths"]
        rows = np.split(file["rows"], np.cumsum(lengths)[:-1])
        texts = np.split(file["texts"], np.cumsum(lengths + LEAD)[:-1])
    return [Sentence(text.tolist(), Said.of_rows(part)) for text, part in zip(texts, rows, strict=True)]


class Reader:
    """Sentences read by any voice."""

    def __init__(self, folder: Path, words: Words) -> None:
        self.words, self.sentences = words, load(folder)

    def document(self, draw: random.Random) -> Document:
        """A session of one voice in which nobody asks and the agent reads."""
        voice = draw.choice(NAMES)
        document = Document()
        start = np.full((1, CODEBOOKS), START, np.int64)
        document.add([self.words.pieces.size], 0.0, agent=start, user=start)
        sample = draw.choice(self.words.samples(voice))
        document.add([TEXT_PAD] * len(sample), 0.0, agent=sample, user=heard(len(sample), SILENCE))
        quiet = silence(SILENCE_FRAMES)
        document.add([TEXT_PAD] * len(quiet), 0.0, agent=quiet, user=heard(len(quiet), SILENCE))
        while len(document) < _LENGTH:
            _read(document, draw.choice(self.sentences), voice, draw.randint(1, 3))
        return document


def _read(document: Document, read: Sentence, voice: str, behind: int) -> None:
    """One sentence and `behind` silent frames."""
    count = len(read.text) + behind
    agent = silence(count)
    agent[LEAD : LEAD + len(read.said)] = codes(read.said, voice)
    audible = [_SILENT_AUDIBLE] * LEAD + [1.0] * (len(read.said) + 1) + [_SILENT_AUDIBLE] * (behind - 1)
    document.add(read.text + [TEXT_PAD] * behind, 0.0, agent=agent, user=heard(count, QUIET), audible=audible)


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]))
