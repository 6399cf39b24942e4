"""Sentences read aloud: where the language model learns how words are spoken.

Talks are mostly silence, and their new words are people's names alone. Here the agent reads the corpus of its
own speech, half of it names and made-up words in a row, one sentence behind the other. The text is given and
not learned from.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from personaplex.config import CODEBOOKS, SILENCE_FRAMES, TEXT_PAD
from personaplex.training.articulation import NAMES, VOICE
from personaplex.training.bank import Words
from personaplex.training.corpus import Utterance, load
from personaplex.training.documents import Codes, Document, heard, silence
from personaplex.training.ear import QUIET
from personaplex.training.lm import SILENCE, START
from personaplex.training.vocabulary import Pieces

LEAD = 2  # frames by which a word's text leads its sound
_LENGTH = 160  # frames, about, of a document
_SILENT_AUDIBLE = 0.05


@dataclass(frozen=True)
class Sentence:
    """`text` [F + LEAD] leads `codes` [F, 8] by LEAD frames."""

    text: list[int]
    codes: Codes


def sentence(read: Utterance, pieces: Pieces) -> Sentence | None:
    """One of the agent's utterances from its first word to its last; None where pieces outrun the sound."""
    first, end = int(read.starts[0]), int(read.starts[-1])
    text = [TEXT_PAD] * (end - first + LEAD)
    for word, (start, following) in zip(read.text.split(), pairwise(read.starts.tolist()), strict=True):
        ids = pieces.encode(word)
        if len(ids) > following - start:
            return None
        text[start - first : start - first + len(ids)] = ids
    return Sentence(text, read.labels.reshape(-1, CODEBOOKS)[first:end].astype(np.int64))


class Reader:
    """The corpus by voice."""

    def __init__(self, folder: Path, words: Words) -> None:
        self.words = words
        self.sentences: dict[int, list[Sentence]] = defaultdict(list)
        for path in sorted((folder / "agent").glob("agent-????.npz")):
            for read in load(path):
                made = sentence(read, words.pieces)
                if made is not None:
                    self.sentences[int(made.codes[0, VOICE])].append(made)

    def document(self, draw: random.Random) -> Document:
        """A session of one voice in which nobody asks and the agent reads."""
        voice = draw.choice(sorted(self.sentences))
        document = Document()
        start = np.full((1, CODEBOOKS), START, np.int64)
        document.add([self.words.pieces.size], 0.0, agent=start, user=start)
        sample = draw.choice(self.words.samples(NAMES[voice]))
        document.add([TEXT_PAD] * len(sample), 0.0, agent=sample, user=heard(len(sample), SILENCE))
        quiet = silence(SILENCE_FRAMES)
        document.add([TEXT_PAD] * len(quiet), 0.0, agent=quiet, user=heard(len(quiet), SILENCE))
        while len(document) < _LENGTH:
            _read(document, draw.choice(self.sentences[voice]), draw.randint(1, 3))
        return document


def _read(document: Document, read: Sentence, behind: int) -> None:
    """One sentence and `behind` silent frames."""
    count = len(read.text) + behind
    agent = silence(count)
    agent[LEAD : LEAD + len(read.codes)] = read.codes
    audible = [_SILENT_AUDIBLE] * LEAD + [1.0] * (len(read.codes) + 1) + [_SILENT_AUDIBLE] * (behind - 1)
    document.add(read.text + [TEXT_PAD] * behind, 0.0, agent=agent, user=heard(count, QUIET), audible=audible)
