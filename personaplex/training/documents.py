"""What the language model is trained on: sequences of frames laid out as the engine lays out a session.

`repetition`: random pieces said again, which teaches copying. `dense`: a role text, then answers one after
the other without padding. Neither has sound; a question is there the ear's state alone. Talk with sound is
laid out in talking.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from torch import Tensor

from personaplex.config import CODEBOOKS, SILENCE_FRAMES, TEXT_BOS, TEXT_EOS, TEXT_PAD
from personaplex.training import grammar
from personaplex.training.ear import ASKED, LABELS
from personaplex.training.lm import SILENCE, START, streams
from personaplex.training.vocabulary import Pieces

LEAD, AHEAD = 1, 6  # frames by which the first word's text leads its sound, and the most for later ones
NOTHING = -1  # an audio token that embeds as zeros
SLOTS = ("name", "firm", "item", "price", "first_day", "last_day")
_FIRST_OF_SLOT = 3.0  # weight of a copied value's first piece
Codes = np.ndarray


@dataclass
class Document:
    """Frames of one sequence; the texts at `text[t]` are predicted from what stands before t."""

    text: list[int] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)  # of the text's loss
    slot: list[int] = field(default_factory=list)  # 0: no slot, else 1 + index in SLOTS
    agent: list[Codes] = field(default_factory=list)  # [n, 8] each
    user: list[Codes] = field(default_factory=list)
    audible: list[float] = field(default_factory=list)  # weight of the audio's loss

    def add(
        self,
        text: list[int],
        weight: float | list[float],
        *,
        slot: list[int] | None = None,
        agent: Codes | None = None,
        user: Codes | None = None,
        audible: float | list[float] = 0.0,
    ) -> None:
        count = len(text)
        self.text += text
        self.weight += weight if isinstance(weight, list) else [weight] * count
        self.slot += slot or [0] * count
        self.agent.append(nothing(count) if agent is None else agent)
        self.user.append(nothing(count) if user is None else user)
        self.audible += audible if isinstance(audible, list) else [audible] * count
        assert len(self.agent[-1]) == len(self.user[-1]) == count

    def __len__(self) -> int:
        return len(self.text)


def written(words: Sequence[Sequence[int]], sounds: Sequence[int]) -> list[int]:
    """The frame in which each word's text begins, of words whose sounds begin LEAD frames behind `sounds`.

    A word is spelled from its letters, so its text is there before its sound: AHEAD frames where the words
    before it leave room.
    """
    begins, free = [], 0
    for ids, sound in zip(words, sounds, strict=True):
        begins.append(max(free, sound + LEAD - AHEAD))
        free = begins[-1] + len(ids)
    return begins


def nothing(count: int) -> Codes:
    return np.full((count, CODEBOOKS), NOTHING, np.int64)


def silence(count: int) -> Codes:
    return np.full((count, CODEBOOKS), SILENCE, np.int64)


def repetition(draw: random.Random, pieces: Pieces, length: int = 160) -> Document:
    """Groups of 3 to 24 pieces, random or names', each said two or three times."""
    document = Document()
    document.add([TEXT_BOS], 0.0)
    while len(document) < length:
        count = draw.choice((3, 4, 6, 8, 12, 16, 24))
        group: list[int] = []
        if draw.random() < 0.5:
            group = [draw.randrange(TEXT_PAD + 1, pieces.size) for _ in range(count)]
        while len(group) < count:
            group += pieces.encode(grammar.name(draw, unseen=False))
        document.add([TEXT_BOS, *group], 0.0)
        for _ in range(draw.choice((1, 1, 2))):
            document.add([TEXT_EOS, *group], [0.0] + [1.0] * len(group), slot=[0] + [1] * len(group))
    return document


def asked(count: int, intent: str) -> Codes:
    """The caller's codes [count, 8] when a question of that intent is complete."""
    return heard(count, ASKED + LABELS.index(intent))


def heard(count: int, state: int) -> Codes:
    """The caller's codes [count, 8] in one of the ear's states; the other levels are not looked at."""
    codes = nothing(count)
    codes[:, 0] = state
    return codes


def slot_of(part: str) -> int:
    """1 + index in SLOTS of the slot inside a template's part; 0 where there is none."""
    return 1 + SLOTS.index(part[part.index("{") + 1 : part.index("}")]) if "{" in part else 0


def value_of(known: grammar.Facts, slot: int) -> str:
    field_name = SLOTS[slot - 1]
    return grammar.spoken_number(known.price) if field_name == "price" else str(getattr(known, field_name))


def answer_pieces(pieces: Pieces, intent: str, known: grammar.Facts) -> list[tuple[str, list[int], int]]:
    """(word, its pieces, slot) of an answer, word by word."""
    words = []
    for part in grammar.template(intent, known).split():
        slot = slot_of(part)
        if not slot:
            words.append((part, pieces.encode(part), 0))
            continue
        opened, closed = part.index("{"), part.index("}")
        value = (part[:opened] + value_of(known, slot) + part[closed + 1 :]).split()
        words += [(word, pieces.encode(word), slot) for word in value]
    return words


def prompt(
    document: Document,
    pieces: Pieces,
    role_text: str,
    sound: bool,
    voice: Codes | None = None,
) -> None:
    """The system prompt's phases behind the start tokens: voice, silence, role text, silence."""
    role = pieces.prompt(role_text)
    if sound:
        start = np.full((1, CODEBOOKS), START, np.int64)
        document.add([pieces.size], 0.0, agent=start, user=start)
    phases = [SILENCE_FRAMES, len(role), SILENCE_FRAMES]
    texts = [[TEXT_PAD] * SILENCE_FRAMES, role, [TEXT_PAD] * SILENCE_FRAMES]
    if voice is not None:
        document.add([TEXT_PAD] * len(voice), 0.0, agent=voice, user=heard(len(voice), SILENCE))
    for count, text in zip(phases, texts, strict=True):
        if sound:
            document.add(text, 0.0, agent=silence(count), user=heard(count, SILENCE))
        else:
            document.add(text, 0.0)


def dense(draw: random.Random, pieces: Pieces, unseen: bool = False, turns: int = 10) -> Document:
    """A role text and answers, each behind the hint of its question and before EOS."""
    known, role_text = grammar.world(draw, unseen)
    document = Document()
    prompt(document, pieces, role_text, sound=False)
    for _ in range(turns):
        intent = _intent(draw)
        document.add([TEXT_PAD], 0.0, user=asked(1, intent))
        for _word, ids, slot in answer_pieces(pieces, intent, known):
            document.add(ids, _weights(ids, slot), slot=[slot] * len(ids))
        document.add([TEXT_EOS], 1.0)
    return document


def _intent(draw: random.Random) -> str:
    return draw.choice(("hello", "name", "price", "open", "name", *LABELS))


def _weights(ids: list[int], slot: int) -> list[float]:
    return [_FIRST_OF_SLOT if slot else 1.0] + [1.0] * (len(ids) - 1)


@dataclass(frozen=True)
class Batch:
    """Documents side by side; all [N, T], codes [N, T, 8]."""

    text: Tensor
    weight: Tensor
    slot: Tensor
    agent: Tensor
    user: Tensor
    audible: Tensor

    @classmethod
    def of(cls, documents: list[Document]) -> Batch:
        longest = max(len(d) for d in documents)

        def rows(name: str, fill: float, dtype: torch.dtype) -> Tensor:
            out = torch.full((len(documents), longest), fill, dtype=dtype)
            for row, document in zip(out, documents, strict=True):
                row[: len(document)] = torch.tensor(getattr(document, name), dtype=dtype)
            return out

        def codes(name: str) -> Tensor:
            out = torch.full((len(documents), longest, CODEBOOKS), NOTHING, dtype=torch.int64)
            for row, document in zip(out, documents, strict=True):
                row[: len(document)] = torch.from_numpy(np.concatenate(getattr(document, name)))
            return out

        return cls(
            rows("text", TEXT_PAD, torch.int64),
            rows("weight", 0.0, torch.float32),
            rows("slot", 0, torch.int64),
            codes("agent"),
            codes("user"),
            rows("audible", 0.0, torch.float32),
        )

    @property
    def audio(self) -> Tensor:
        """The streams' inputs [N, T, 16]; of the caller's, the first level alone."""
        audio = streams(self.agent, self.user)
        audio[..., :CODEBOOKS][self.agent[..., 0] < 0] = NOTHING  # no start tokens where there is no sound
        audio[..., CODEBOOKS + 1 :] = NOTHING
        return audio

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, part.name).to(device) for part in fields(self)))
