"""What was said in a record, as words with times. No model is needed: the text is in the record.

The agent's text is the model's own; the user's is there where the service transcribed it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from personaplex.record.format import Record
from personaplex.words import Word, from_json, spelled

TEXT = "text"  # type of the events that carry the agent's: `frame` and `text`
USER_TEXT = "user_text"  # and the user's: a segment as words.as_json has it


def user_words(record: Record) -> list[Word]:
    """The user's words in order of time; what is no segment is left out."""
    found: list[Word] = []
    for event in record.events:
        if event.type == USER_TEXT:
            with contextlib.suppress(ValueError):
                found += from_json(event.fields).words
    return sorted(found, key=lambda word: word.start)


def words(record: Record) -> list[Word]:
    """The agent's words in order, each with the times of the frames that spell it."""
    return spelled(_pieces(record))


def as_json(record: Record) -> dict[str, object]:
    """The transcript as it is written: who and when, then a word a row."""
    head = record.head
    return {
        "session": head.session,
        "began": head.began,
        "seconds": round(record.seconds, 2),
        "voice": head.persona.voice,
        "text_prompt": head.persona.text_prompt,
        "ended": record.ended,
        "words": _rows(words(record)),
        "user_words": _rows(user_words(record)),
    }


def _rows(found: Iterable[Word]) -> list[dict[str, object]]:
    return [{"text": word.text, "start": word.start, "end": word.end} for word in found]


def alignments(record: Record) -> dict[str, object]:
    """The transcript as fine-tuning reads it beside a stereo file: [word, [start, end], speaker]."""
    head = record.head
    rows = [[word.text, [word.start, word.end], "SPEAKER_MAIN"] for word in words(record)]
    return {"alignments": rows, "text_prompt": head.persona.text_prompt, "voice": head.persona.voice}


def _pieces(record: Record) -> Iterator[tuple[int, str]]:
    """Pieces of text with their frames; what an event claims beyond the record is left out."""
    for event in record.events:
        frame, text = event.fields.get("frame"), event.fields.get("text")
        if event.type != TEXT or not isinstance(frame, int) or not isinstance(text, str):
            continue
        if 0 <= frame < record.span:
            yield frame, text
