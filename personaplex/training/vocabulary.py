"""The tokenizer of `talk`: a sentencepiece vocabulary trained on the grammar's own sentences."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path

import sentencepiece

from personaplex.config import TEXT_BOS, TEXT_EOS, TEXT_EPAD, TEXT_PAD
from personaplex.training import grammar

SIZE = 320
TAG = "<system>"
_PUNCTUATION = list(".,?!:;$()-'&/")


def train(seed: int = 0, size: int = SIZE) -> bytes:
    """The model file: punctuation and digits are pieces of their own, so that a name has the same pieces in
    the role text and in the answer.
    """
    draw = random.Random(seed)
    lines: list[str] = []
    for _ in range(4000):
        known = grammar.facts(draw, unseen=False)
        lines.append(grammar.role_text(draw, known))
        lines += [grammar.answer(intent, known) for intent in draw.sample(list(grammar.ANSWERS), 3)]
        lines += [grammar.name(draw, unseen=False) for _ in range(4)]
    lines.append("".join(chr(code) for code in range(33, 127)) * 40)
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        model_type="bpe",
        vocab_size=size,
        character_coverage=1.0,
        unk_id=TEXT_EPAD,
        bos_id=TEXT_BOS,
        eos_id=TEXT_EOS,
        pad_id=TEXT_PAD,
        user_defined_symbols=[TAG, *_PUNCTUATION],
        split_digits=True,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


class Pieces:
    """Text to ids, whole texts or word by word."""

    def __init__(self, model: bytes) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size: int = self.model.get_piece_size()
        self._ids = {self.model.id_to_piece(i): i for i in range(TEXT_PAD + 1, self.size)}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.model.encode(text)
        return ids

    def cut(self, text: str, draw: random.Random, share: float) -> list[int]:
        """`text` in smaller pieces than `encode` makes: a share of them is cut in two, and of the parts."""
        made: list[int] = []
        waiting = self.encode(text)[::-1]
        while waiting:
            piece = self.model.id_to_piece(waiting[-1])
            ways = [
                (self._ids[piece[:k]], self._ids[piece[k:]])
                for k in range(1 + piece.startswith("▁"), len(piece))
                if piece[:k] in self._ids and piece[k:] in self._ids
            ]
            if ways and draw.random() < share:
                waiting[-1:] = draw.choice(ways)[::-1]
            else:
                made.append(waiting.pop())
        return made

    def prompt(self, role_text: str) -> list[int]:
        """A role text as the engine encodes it."""
        return self.encode(f"{TAG} {role_text} {TAG}")

    def decode(self, ids: list[int]) -> str:
        """Text of ids; special ids give nothing."""
        pieces = [self.model.id_to_piece(i) for i in ids if i > TEXT_PAD]
        return "".join(pieces).replace("▁", " ").strip()


def cached(folder: Path) -> bytes:
    """The tokenizer in `folder`, trained on first use."""
    path = folder / "tokenizer.model"
    if not path.exists():
        path.write_bytes(train())
    return path.read_bytes()


if __name__ == "__main__":
    pieces = Pieces(cached(Path(sys.argv[1])))
    text = (
        "You work for Pearl Clinic which is a clinic and your name is Ceertta. My name is Ceertta, price $8."
    )
    print([pieces.model.id_to_piece(i) for i in pieces.prompt(text)])
