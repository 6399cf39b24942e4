"""The agent's words with their times: from its own text stream, from a file, or by Whisper.

`output.json` holds `{"text", "chunks": [{"text", "timestamp": [start, end]}]}`, as Full-Duplex-Bench has it;
ours adds `pieces`, the text stream as [frame, piece], from which words are made anew whenever the sound is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from personaplex.config import FRAME_SECONDS, Pcm
from personaplex.evaluation.dataset import BadSample, numbers
from personaplex.evaluation.speech import Span, Word, nearest
from personaplex.files import read_bounded
from personaplex.transcription import whisper

Source = Literal["text", "file", "whisper"]
Pieces = Sequence[tuple[int, str]]

LONGEST_S = 1.0  # of a word in the text stream
_FILE_LIMIT = 2**26
_FRAME_LIMIT = 2**31


@dataclass(frozen=True)
class Transcript:
    """Words in order, and which share of them was written without being heard (text stream only)."""

    words: tuple[Word, ...]
    unheard: float | None = None


def from_pieces(pieces: Pieces, segments: Sequence[Span], seconds: float) -> Transcript:
    """Words of the text stream. A piece with a leading space starts a word, at its frame's time.

    A word ends where the next one starts, at most 1 s later and with the speech it falls into; one without
    speech within 0.4 s is dropped: what is written need not be said.
    """
    starts: list[tuple[float, str]] = []
    for frame, piece in pieces:
        if starts and not piece.startswith(" "):
            starts[-1] = (starts[-1][0], starts[-1][1] + piece)
        elif piece.strip():
            starts.append((frame * FRAME_SECONDS, piece.strip()))
    words = []
    for number, (start, text) in enumerate(starts):
        index = nearest(segments, start)
        if index is None:
            continue
        following = starts[number + 1][0] if number + 1 < len(starts) else seconds
        end = min(following, start + LONGEST_S, max(start, segments[index].end))
        words.append(Word(text, start, max(start, end)))
    return Transcript(tuple(words), 1 - len(words) / len(starts) if starts else None)


def chunks(words: Sequence[Word]) -> dict[str, Any]:
    """As `output.json` holds them."""
    return {
        "text": " ".join(word.text for word in words),
        "chunks": [{"text": word.text, "timestamp": [word.start, word.end]} for word in words],
    }


def load(path: Path) -> dict[str, Any]:
    """An `output.json`. Raises BadSample when it is missing or something else."""
    try:
        data = json.loads(read_bounded(path, _FILE_LIMIT))
    except (OSError, ValueError, RecursionError) as error:
        raise BadSample(f"{path.name} is missing or no JSON") from error
    if not isinstance(data, dict) or not isinstance(data.get("chunks"), list):
        raise BadSample(f"{path.name} holds no chunks")
    return data


def from_chunks(data: dict[str, Any], name: str) -> Transcript:
    """Words of an `output.json`; a missing end stays None. Raises BadSample."""
    words = []
    for chunk in data["chunks"]:
        times = chunk.get("timestamp") if isinstance(chunk, dict) else None
        if not isinstance(times, list) or len(times) != 2 or not isinstance(chunk.get("text"), str):
            raise BadSample(f"{name}: a chunk has no text or no [start, end]")
        start, end = numbers(times[:1]), None if times[1] is None else numbers(times[1:])
        if start is None or (times[1] is not None and end is None):
            raise BadSample(f"{name}: a chunk's times are not seconds")
        if chunk["text"].strip():
            words.append(Word(chunk["text"].strip(), start[0], end[0] if end else None))
    return Transcript(tuple(sorted(words, key=lambda word: word.start)))


def within_speech(heard: Transcript, segments: Sequence[Span]) -> Transcript:
    """Words that overlap a segment start and end in it: Whisper lets first words begin in silence.

    One that overlaps several belongs to the one it shares most with; one that overlaps none stays.
    """
    words = []
    for word in heard.words:
        span = Span(word.start, word.start if word.end is None else word.end)
        speech = max(segments, key=span.overlap, default=span)
        if span.overlap(speech):
            word = Word(word.text, max(span.start, speech.start), min(span.end, speech.end))
        words.append(word)
    return Transcript(tuple(words), heard.unheard)


def pieces_of(data: dict[str, Any], name: str) -> Pieces:
    """The text stream in an `output.json`. Raises BadSample when it has none."""
    found = data.get("pieces")
    if not isinstance(found, list):
        raise BadSample(f"{name} has no text stream: score it with --transcript file")
    for one in found:
        if not (isinstance(one, list) and len(one) == 2 and isinstance(one[1], str)):
            raise BadSample(f"{name}: pieces are not [frame, text]")
        if isinstance(one[0], bool) or not isinstance(one[0], int) or not 0 <= one[0] < _FRAME_LIMIT:
            raise BadSample(f"{name}: a piece's frame is no number")
    return [(frame, piece) for frame, piece in found]


class Whisper:
    """Word times by faster-whisper."""

    def __init__(self, model: str) -> None:
        """`model`: a name or a folder that faster-whisper knows. Raises ConfigError without the package."""
        self._whisper = whisper.Whisper(whisper.Options(model, device="auto", compute="default", threads=0))

    def words(self, pcm16k: Pcm) -> Transcript:
        """Of float32 [samples] at 16 kHz."""
        found = self._whisper.words(pcm16k)
        return Transcript(tuple(Word(word.text, word.start, word.end) for word in found))
