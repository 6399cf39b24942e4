"""Words with times -> the agent's text stream: a token a frame, padding between the words.

A word's pieces begin in the frame in which the word does and go on frame by frame; a word that comes before
the last one is spelled begins behind it. The frame before a word that follows padding holds EPAD, as in the
model's own training. Knows no sound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from personaplex.config import FRAME_SECONDS, TEXT_EPAD, TEXT_PAD
from personaplex.finetune.source import Unusable, Word

_SHOWN = 5
LATEST_FRAMES = 25  # by which a word's text may be late, 2 s: people do not speak faster than this for long


@dataclass(frozen=True)
class Spelling:
    """How words become text. `lead` frames by which text comes before its sound; `end_of_padding`: whether
    EPAD is written."""

    lead: int = 0
    end_of_padding: bool = True


def text_stream(
    words: Sequence[Word], frames: int, encode: Callable[[str], list[int]], spelling: Spelling
) -> list[int]:
    """The token of each of `frames` frames. Raises Unusable for words that cannot be spelled, or not in time.

    `encode` gives a word's token ids, none of which is padding unless the word has no spelling.
    """
    stream = [TEXT_PAD] * frames
    unknown: list[str] = []
    free, lost = 0, 0
    for word in words:
        ids = encode(word.text)
        if not ids or TEXT_EPAD in ids or TEXT_PAD in ids:
            unknown.append(word.text)
            continue
        wanted = max(0, int(word.start / FRAME_SECONDS + 1e-6) - spelling.lead)
        start = max(wanted, free)
        if start - wanted > LATEST_FRAMES:
            raise Unusable(
                f"its transcript is off: at {word.start:.2f} s the text is {start - wanted} frames behind "
                "the sound, more words than can be said in that time"
            )
        if spelling.end_of_padding and start > free:
            stream[start - 1] = TEXT_EPAD
        for offset, token in enumerate(ids):
            if start + offset < frames:
                stream[start + offset] = token
            else:
                lost += 1
        free = start + len(ids)
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise Unusable(f"words that this tokenizer cannot spell: {', '.join(unknown[:_SHOWN])}{more}")
    if lost > LATEST_FRAMES:
        raise Unusable(f"its transcript is off: the last words need {lost} frames more than there are")
    return stream
