"""The agent's words as codes, whoever's voice says them: what dialogues are put together from.

Each word is spoken once, inside a sentence, and has the same codes wherever the agent says it. A bank speaks
the words it lacks and keeps them: `python -m personaplex.training.bank FOLDER` fills `FOLDER/words.npz`.
"""

from __future__ import annotations

import random
import string
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from personaplex.training import grammar
from personaplex.training.articulation import NAMES, Said, codes, joined, plan, said
from personaplex.training.documents import slot_of, value_of
from personaplex.training.synth import Speaker
from personaplex.training.vocabulary import Pieces, cached

WORLDS = 30_000  # agents in the talks that are trained on
SAMPLE_FRAMES = 12  # of a voice prompt
_SAMPLE_TEXTS = (
    "I am happy to talk to you.",
    "Please ask me anything you like.",
    "It is a lovely day, is it not?",
)
EXAMPLE = grammar.Facts("Anna", "Green Hotel", "hotel", "garden tour", 20, "Monday", "Friday")
_LAST, _INSIDE = "My name is {}.", "We have {} here."  # sentences for names and for other values


@dataclass(frozen=True)
class Word:
    """A word of an answer: its pieces, its slot (0: none) and how it sounds."""

    pieces: list[int]
    slot: int
    sound: Said


class Words:
    """Every word's sound, at least as many frames long as it has pieces."""

    def __init__(self, folder: Path, pieces: Pieces) -> None:
        self.pieces = pieces
        self._path = folder / "words.npz"
        self._held: dict[str, Said] = {}
        if self._path.exists():
            with np.load(self._path) as file:
                rows = np.split(file["rows"], np.cumsum(file["lengths"])[:-1])
                self._held = dict(zip(file["keys"].tolist(), map(Said.of_rows, rows), strict=True))

    @cached_property
    def speaker(self) -> Speaker:
        """The natural voice, loaded when a word is missing."""
        return Speaker()

    def answer(self, intent: str, known: grammar.Facts) -> list[Word]:
        """The words of an answer."""
        made: list[Word] = []
        told = dict.fromkeys(grammar.fields(grammar.template(intent, known)))
        sentence = grammar.answer(intent, grammar.Facts(**{field: getattr(EXAMPLE, field) for field in told}))
        example = 0  # of this template part in the sentence about the example's facts
        for part in grammar.template(intent, known).split():
            if "{" in part:
                slot, opened, closed = slot_of(part), part.index("{"), part.index("}")
                value = (part[:opened] + value_of(known, slot) + part[closed + 1 :]).split()
                made += [self._valued(word, slot) for word in value]
                example += len(value_of(EXAMPLE, slot).split())
            else:
                ids = self.pieces.encode(part)
                sound = self._sound(sentence, example, len(ids))
                made.append(Word(ids, 0, sound))
                example += 1
        return made

    def _valued(self, word: str, slot: int) -> Word:
        ids, plain = self.pieces.encode(word), word.strip(string.punctuation)
        form, index = (_LAST, 3) if slot == 1 else (_INSIDE, 2)
        return Word(ids, slot, self._sound(form.format(plain), index, len(ids)))

    def samples(self, voice: str) -> list[np.ndarray]:
        """Codes [SAMPLE_FRAMES, 8] for voice prompts."""
        made = [joined([self._sound(text, i, 1) for i in range(len(text.split()))]) for text in _SAMPLE_TEXTS]
        return [codes(one, voice)[:SAMPLE_FRAMES] for one in made]

    def save(self) -> None:
        np.savez_compressed(
            self._path,
            keys=np.array(list(self._held)),
            rows=np.concatenate([word.rows() for word in self._held.values()]),
            lengths=np.array([len(word) for word in self._held.values()]),
        )

    def _sound(self, text: str, index: int, least: int) -> Said:
        key = f"{text}|{index}|{least}"
        if key not in self._held:
            self._held[key] = self._say(text, index, least)
        return self._held[key]

    def _say(self, text: str, index: int, least: int) -> Said:
        spoken = self.speaker.say(text)
        if spoken is None:
            raise ValueError(f"the words of {text!r} cannot be told apart")
        floor = [1] * len(spoken.words)
        floor[index] = least
        laid = plan(spoken, floor)
        return said(spoken, laid, self.speaker.names).part(laid.starts[index], laid.starts[index + 1])


def known_world(number: int) -> tuple[grammar.Facts, str]:
    """World `number` of those that are trained on, 0 .. WORLDS - 1."""
    return grammar.world(random.Random(number))


def fill(folder: Path) -> None:
    """Speaks all words of the agents that are trained on."""
    words = Words(folder, Pieces(cached(folder)))
    for number in range(WORLDS):
        known, _role = known_world(number)
        for intent in grammar.ANSWERS:
            words.answer(intent, known)
    words.samples(NAMES[0])
    words.save()


if __name__ == "__main__":
    fill(Path(sys.argv[1]))
