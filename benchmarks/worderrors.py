"""Two transcripts compared: word errors, and how far off the times of equal words are. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from personaplex.words import Word

_SPOKEN = re.compile(r"[a-z0-9']+")


def plain(text: str) -> list[str]:
    """Words as they are compared: lower case, no punctuation."""
    return _SPOKEN.findall(text.lower().replace("-", " "))


def errors(said: Sequence[str], read: Sequence[str]) -> int:
    """The fewest words to insert, delete or replace to get from one to the other (Levenshtein)."""
    row = list(range(len(read) + 1))
    for i, word in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(read, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


def pairs(said: Sequence[Word], read: Sequence[Word]) -> list[tuple[Word, Word]]:
    """Words that both have, in order."""
    left, right = ([" ".join(plain(word.text)) for word in words] for words in (said, read))
    blocks = SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
    return [(said[a + i], read[b + i]) for a, b, size in blocks for i in range(size) if left[a + i]]
