"""Two transcripts compared: the words as they are counted, and those that both have. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from personaplex.words import Word

_SPOKEN = re.compile(r"[a-z0-9']+")


def plain(text: str) -> list[str]:
    """Words as they are compared: lower case, no punctuation."""
    return _SPOKEN.findall(text.lower().replace("-", " "))


def pairs(said: Sequence[Word], read: Sequence[Word]) -> list[tuple[Word, Word]]:
    """Words that both have, in order."""
    left, right = ([" ".join(plain(word.text)) for word in words] for words in (said, read))
    blocks = SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
    return [(said[a + i], read[b + i]) for a, b, size in blocks for i in range(size) if left[a + i]]
