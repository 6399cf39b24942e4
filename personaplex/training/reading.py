"""Sentences read aloud: where the language model learns how words are spoken.

Talks are mostly silence, and their new words are people's names alone. Here the agent reads answers, and
names and words of the natural voice's dictionary in a row, one sentence behind the other. The text is given
and not learned from. No sound is made: of a sentence its phones and their times are kept.
"""

from __future__ import annotations

import os
import random
import string
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from personaplex.config import CODEBOOKS, SILENCE_FRAMES, TEXT_PAD
from personaplex.training import grammar
from personaplex.training.articulation import NAMES, Said, codes, plan, said
from personaplex.training.bank import Words
from personaplex.training.corpus import any_word, words_in_a_row
from personaplex.training.documents import LEAD, Document, heard, silence, written
from personaplex.training.ear import QUIET
from personaplex.training.lm import SILENCE, START
from personaplex.training.vocabulary import Pieces, cached

SHARD = 3_000  # sentences
_LENGTH = 160  # frames, about, of a document
_SILENT_AUDIBLE = 0.05
_ANY_WORDS = 0.7  # share of sentences that are names and words without an order
_REPLACED = 0.4  # share of the words of other sentences, of answers, in whose place any word stands
_CUT_ANEW, _CUT = 0.3, 0.5  # share of words not in their usual pieces, and of those pieces that are cut


@dataclass(frozen=True)
class Sentence:
    """Words from the first to the last; word i begins `starts[i]` frames into `said`, which ends with it."""

    words: tuple[str, ...]
    starts: tuple[int, ...]
    said: Said

    def text(self, pieces: Pieces, draw: random.Random) -> list[int]:
        """[F + LEAD] ids, LEAD frames or more ahead of `said`; some words with room for it are cut anew."""
        stream = [TEXT_PAD] * (len(self.said) + LEAD)
        every = [pieces.encode(word) for word in self.words]
        rooms = np.diff([*self.starts, len(self.said)]).tolist()
        for index, (word, room) in enumerate(zip(self.words, rooms, strict=True)):
            if draw.random() < _CUT_ANEW and len(cut := pieces.cut(word, draw, _CUT)) <= room:
                every[index] = cut
        for ids, begin in zip(every, written(every, self.starts), strict=True):
            stream[begin : begin + len(ids)] = ids
        return stream


def sentence(words: Words, text: str) -> Sentence | None:
    """`text` as the agent reads it; None where its words cannot be told apart."""
    spoken = words.speaker.say(text)
    if spoken is None:
        return None
    every = tuple(text.split())
    laid = plan(spoken, [len(words.pieces.encode(word)) for word in every])
    first, end = laid.starts[0], laid.starts[-1]
    heard = said(spoken, laid, words.speaker.names).part(first, end)
    return Sentence(every, tuple(start - first for start in laid.starts[:-1]), heard)


def make(folder: Path, shards: int, first: int = 0) -> None:
    """Writes the shards that `FOLDER/reading` lacks."""
    (folder / "reading").mkdir(exist_ok=True)
    words = Words(folder, Pieces(cached(folder)))
    for seed in range(first, first + shards):
        path = folder / "reading" / f"reading-{seed:04}.npz"
        if not path.exists():
            _save(path, list(_drawn(words, random.Random(seed))))
            print(path.name, flush=True)


def _drawn(words: Words, draw: random.Random) -> Iterator[Sentence]:
    for answer in grammar.sentences(draw, SHARD, unseen=False):
        made = sentence(words, words_in_a_row(draw) if draw.random() < _ANY_WORDS else _mixed(answer, draw))
        if made is not None:
            yield made


def _mixed(answer: str, draw: random.Random) -> str:
    """An answer that says what no answer says, lest words be said by what is usually said there."""
    return " ".join(
        any_word(draw) + word[len(word.rstrip(string.punctuation)) :] if draw.random() < _REPLACED else word
        for word in answer.split()
    )


def _save(path: Path, made: list[Sentence]) -> None:
    part = path.with_suffix(".part.npz")
    np.savez_compressed(
        part,
        texts=np.array([" ".join(one.words) for one in made]),
        starts=np.concatenate([np.asarray(one.starts, np.int16) for one in made]),
        rows=np.concatenate([one.said.rows() for one in made]),
        lengths=np.array([len(one.said) for one in made]),
    )
    os.replace(part, path)


def load(folder: Path) -> list[Sentence]:
    """The sentences of all shards."""
    return [one for path in sorted((folder / "reading").glob("reading-????.npz")) for one in _load(path)]


def _load(path: Path) -> Iterator[Sentence]:
    with np.load(path) as file:
        texts = [tuple(text.split()) for text in file["texts"].tolist()]
        starts = np.split(file["starts"], np.cumsum([len(words) for words in texts])[:-1])
        rows = np.split(file["rows"], np.cumsum(file["lengths"])[:-1])
    for words, begins, part in zip(texts, starts, rows, strict=True):
        yield Sentence(words, tuple(begins.tolist()), Said.of_rows(part))


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
            read = draw.choice(self.sentences)
            _read(document, read.text(self.words.pieces, draw), read.said, voice, draw.randint(1, 3))
        return document


def _read(document: Document, text: list[int], sound: Said, voice: str, behind: int) -> None:
    """One sentence and `behind` silent frames."""
    count = len(text) + behind
    agent = silence(count)
    agent[LEAD : LEAD + len(sound)] = codes(sound, voice)
    audible = [_SILENT_AUDIBLE] * LEAD + [1.0] * (len(sound) + 1) + [_SILENT_AUDIBLE] * (behind - 1)
    document.add(text + [TEXT_PAD] * behind, 0.0, agent=agent, user=heard(count, QUIET), audible=audible)


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
